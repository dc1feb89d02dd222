//! What the agent says of its node in the API: labels and annotations under `joulecast.dev/`, and nothing else. The
//! chart's ValidatingAdmissionPolicy holds it to its own node and to these keys.

use crate::node_meter::NodeMeter;
use joulecast_crds::names::{
    ANNOTATION_IDLE_MILLIWATTS, ANNOTATION_MAX_MILLIWATTS, LABEL_CPU_MODEL, LABEL_DEVICE_CLASS, LABEL_METER,
};
use joulecast_meter::Host;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;

/// What is said; a key that is not here is left as it is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Labels.
    pub labels: BTreeMap<&'static str, String>,
    /// Annotations.
    pub annotations: BTreeMap<&'static str, String>,
}

/// The facts of this node.
#[must_use]
pub fn facts(host: &Host, meter: &NodeMeter) -> Facts {
    let mut facts = Facts::default();
    // A node whose NVIDIA devices are not ours to see keeps the class that somebody else gave it.
    if !has_nvidia_device(host) {
        facts.labels.insert(LABEL_DEVICE_CLASS, "cpu".to_owned());
    }
    facts.labels.insert(LABEL_METER, if meter.lacks().is_none() { "rapl" } else { "none" }.to_owned());
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

/// Takes off all nodes what agents wrote to them; for when the release is uninstalled.
///
/// # Errors
/// As the API server gives them.
pub async fn forget(nodes: &Api<Node>) -> Result<usize, kube::Error> {
    let labelled = nodes.list_metadata(&ListParams::default().labels(LABEL_METER)).await?;
    for node in &labelled.items {
        let class = node.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_DEVICE_CLASS));
        let mut labels: BTreeMap<&str, Option<()>> = [LABEL_METER, LABEL_CPU_MODEL].map(|key| (key, None)).into();
        // Another class was given by somebody else.
        if class.is_some_and(|class| class == "cpu") {
            labels.insert(LABEL_DEVICE_CLASS, None);
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
