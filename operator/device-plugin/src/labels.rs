//! What the agent says of its node in the API: labels and annotations under `joulecast.dev/`, and nothing else. The
//! chart's ValidatingAdmissionPolicy holds it to its own node and to these keys.

use crate::clock::Clock;
use crate::node_meter::NodeMeter;
use crate::service::Service;
use joulecast_crds::names::{
    ANNOTATION_IDLE_MILLIWATTS, ANNOTATION_MAX_MILLIWATTS, LABEL_CPU_MODEL, LABEL_DEVICE_CLASS, LABEL_GPU_PRODUCT,
    LABEL_METER,
};
use joulecast_meter::Host;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

/// What is said; a key that is not here is left as it is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Labels.
    pub labels: BTreeMap<&'static str, String>,
    /// Annotations.
    pub annotations: BTreeMap<&'static str, String>,
}

/// The facts of this node, whose GPUs are called so; none if it has none that is ours.
#[must_use]
pub fn facts(host: &Host, meter: &NodeMeter, gpus: &[String]) -> Facts {
    let mut facts = Facts::default();
    if !gpus.is_empty() {
        facts.labels.insert(LABEL_DEVICE_CLASS, "cuda".to_owned());
    } else if !has_nvidia_device(host) {
        // A node whose NVIDIA devices are not ours to see keeps the class that somebody else gave it.
        facts.labels.insert(LABEL_DEVICE_CLASS, "cpu".to_owned());
    }
    // A model is fitted for one product: a node with several has none that it could be told by.
    if let Some(product) = gpus.first().filter(|first| gpus.iter().all(|gpu| gpu == *first)) {
        facts.labels.insert(LABEL_GPU_PRODUCT, label_value(product));
    }
    let nvml = meter.gpus().next().is_some();
    let kind = if meter.lacks().is_some() {
        "none"
    } else if nvml {
        "nvml"
    } else {
        "rapl"
    };
    facts.labels.insert(LABEL_METER, kind.to_owned());
    if let Some(model) = host.cpu_model().map(|model| label_value(&model)).filter(|model| !model.is_empty()) {
        facts.labels.insert(LABEL_CPU_MODEL, model);
    }
    if let Some(idle) = meter.idle() {
        facts.annotations.insert(ANNOTATION_IDLE_MILLIWATTS, idle.0.to_string());
    }
    if let Some(max) = meter.max() {
        facts.annotations.insert(ANNOTATION_MAX_MILLIWATTS, max.0.to_string());
    }
    facts
}

impl Facts {
    /// Takes over the idle power that was told before if it is within a twentieth of this one: it is measured again and
    /// again, and a write for each percent would be a write every few seconds.
    pub fn keep_idle(&mut self, before: &Self) {
        let idle = |facts: &Self| facts.annotations.get(ANNOTATION_IDLE_MILLIWATTS)?.parse::<u64>().ok();
        if let Some((now, told)) = idle(self).zip(idle(before))
            && now.abs_diff(told) * 20 <= told
        {
            self.annotations.insert(ANNOTATION_IDLE_MILLIWATTS, told.to_string());
        }
    }
}

/// Whether a display controller or accelerator of NVIDIA is on the PCI bus.
fn has_nvidia_device(host: &Host) -> bool {
    let Ok(devices) = fs::read_dir(host.path("/sys/bus/pci/devices")) else { return false };
    devices.flatten().any(|device| {
        let text = |name| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        // PCI class 03: display controllers, 3D controllers among them.
        text("vendor").trim() == "0x10de" && text("class").starts_with("0x03")
    })
}

/// A text in the characters of a label's value: letters, digits, `-`, `_` and `.`, at most 63, letters or digits at both
/// ends. Trademark signs in parentheses are dropped, other runs of characters become one `-`.
#[must_use]
pub fn label_value(text: &str) -> String {
    let text = text.replace("(R)", "").replace("(TM)", "").replace("(r)", "").replace("(tm)", "");
    let mut value = String::new();
    for character in text.chars() {
        match character {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '.' => value.push(character),
            _ if value.ends_with('-') => {}
            _ => value.push('-'),
        }
    }
    let alphanumeric = |character: char| !character.is_ascii_alphanumeric();
    let value: String = value.trim_matches(alphanumeric).chars().take(63).collect();
    value.trim_matches(alphanumeric).to_owned()
}

/// Writes the facts to the node of this name.
///
/// # Errors
/// As the API server gives them.
pub async fn publish(nodes: &Api<Node>, node: &str, facts: &Facts) -> Result<(), kube::Error> {
    let patch = json!({"metadata": {"labels": facts.labels, "annotations": facts.annotations}});
    nodes.patch_metadata(node, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
}

/// How often the node's labels are written again if nothing changed: somebody may have removed them.
const TELL_EVERY: Duration = Duration::from_secs(600);
/// How often is looked whether something changed; also the pause after a failure.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Keeps the node's labels and annotations until it is aborted; `gpus` are the product names of its GPUs.
pub async fn keep(service: Arc<Service>, host: Host, gpus: Vec<String>, node: String) {
    let client = match kube::Client::try_default().await {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!("the node's labels are not kept: no API server is known: {error}");
            return;
        }
    };
    let nodes: Api<Node> = Api::all(client);
    let clock = Clock::system();
    let mut told: Option<(Duration, Facts)> = None;
    loop {
        let mut current = facts(&host, service.metering().meter(), &gpus);
        if let Some((_, before)) = &told {
            current.keep_idle(before);
        }
        let now = clock.since_boot();
        if told.as_ref().is_none_or(|(at, before)| *before != current || now.saturating_sub(*at) > TELL_EVERY) {
            match publish(&nodes, &node, &current).await {
                Ok(()) => {
                    tracing::info!(node, labels = ?current.labels, annotations = ?current.annotations, "the node is labelled");
                    told = Some((now, current));
                }
                Err(error) => tracing::warn!(node, "the node's labels cannot be written: {error}; trying again"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Takes off all nodes what agents wrote to them; for when the release is uninstalled.
///
/// # Errors
/// As the API server gives them.
pub async fn forget(nodes: &Api<Node>) -> Result<usize, kube::Error> {
    let labelled = nodes.list_metadata(&ListParams::default().labels(LABEL_METER)).await?;
    for node in &labelled.items {
        let of_node = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
        let ours = [LABEL_METER, LABEL_CPU_MODEL, LABEL_GPU_PRODUCT];
        let mut labels: BTreeMap<&str, Option<()>> = ours.map(|key| (key, None)).into();
        // Any other class, and `cuda` on a node whose GPUs are not metered, were given by somebody else.
        match (of_node(LABEL_DEVICE_CLASS), of_node(LABEL_METER)) {
            (Some("cpu"), _) | (Some("cuda"), Some("nvml")) => drop(labels.insert(LABEL_DEVICE_CLASS, None)),
            _ => {}
        }
        let annotations = [ANNOTATION_IDLE_MILLIWATTS, ANNOTATION_MAX_MILLIWATTS].map(|key| (key, None::<()>));
        let annotations: BTreeMap<&str, Option<()>> = annotations.into();
        let patch = json!({"metadata": {"labels": labels, "annotations": annotations}});
        let name = node.metadata.name.as_deref().unwrap_or_default();
        nodes.patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        tracing::info!(node = name, "labels and annotations are taken off");
    }
    Ok(labelled.items.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_power_is_told_again_when_it_changed_by_more_than_a_twentieth() {
        let facts = |idle: Option<u64>| Facts {
            annotations: idle.map(|idle| (ANNOTATION_IDLE_MILLIWATTS, idle.to_string())).into_iter().collect(),
            ..Facts::default()
        };
        for (told, now, want) in [
            (Some(20_000), Some(20_900), Some(20_000)),
            (Some(20_000), Some(18_999), Some(18_999)),
            (None, Some(5), Some(5)),
            (Some(5), None, None),
        ] {
            let mut later = facts(now);
            later.keep_idle(&facts(told));
            assert_eq!(later, facts(want), "{told:?} {now:?}");
        }
    }

    #[test]
    fn any_text_becomes_a_label_value() {
        for (text, value) in [
            ("Intel(R) Xeon(R) Processor", "Intel-Xeon-Processor"),
            ("AMD EPYC 7763 64-Core Processor", "AMD-EPYC-7763-64-Core-Processor"),
            ("  (odd) @ 2.10GHz  ", "odd-2.10GHz"),
            ("---", ""),
            ("µ", ""),
            (
                "01234567890123456789012345678901234567890123456789012345678901 / tail",
                "01234567890123456789012345678901234567890123456789012345678901",
            ),
        ] {
            assert_eq!(label_value(text), value, "{text:?}");
            assert!(value.len() <= 63);
        }
    }
}
