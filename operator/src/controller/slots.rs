//! How many pods of a job the nodes of a class take at the same time. Pure.
//!
//! A node takes as many as its allocatable resources hold of what one pod asks for: the slot of the node agent or of another
//! device plugin, processors and memory; and no more pods than its kubelet takes. What other pods than those of runs hold is not
//! known here, so a node may take fewer.

use crate::config::Config;
use crate::controller::observe::device_class;
use crate::controller::validate::ValidJob;
use joulecast_crds::DeviceClass;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

/// Pods that a kubelet takes unless it is told otherwise.
const PODS: f64 = 110.0;

/// What a node that pods can be bound to has to give.
#[derive(Debug, Clone, PartialEq)]
pub struct Room {
    /// Class of the node.
    pub device_class: DeviceClass,
    /// Allocatable amounts by resource; nothing where the node does not tell.
    pub allocatable: BTreeMap<String, f64>,
}

impl Room {
    /// Reads a node.
    #[must_use]
    pub fn of(node: &Node) -> Self {
        let told = node.status.iter().flat_map(|status| status.allocatable.iter().flatten());
        let allocatable = told.filter_map(|(name, quantity)| Some((name.clone(), amount(quantity)?))).collect();
        Self { device_class: device_class(node), allocatable }
    }

    /// How many pods fit that ask for so much each; nothing where the node does not tell.
    fn takes(&self, asked: &BTreeMap<String, f64>) -> Option<u32> {
        if self.allocatable.is_empty() {
            return None;
        }
        let fits = |(name, wanted): (&String, &f64)| {
            let there = self.allocatable.get(name).copied().unwrap_or(0.0);
            // A hair more than there is: amounts are decimals, 0.3 / 0.1 is not.
            (there / wanted * (1.0 + 1e-9)).floor()
        };
        let pods = self.allocatable.get("pods").copied().unwrap_or(PODS);
        Some(asked.iter().map(fits).fold(pods, f64::min).clamp(0.0, f64::from(u32::MAX)) as u32)
    }
}

/// Whether an allocatable resource is of those that are looked at: processors, memory, pods, and what device plugins offer.
#[must_use]
pub fn is_looked_at(resource: &str) -> bool {
    matches!(resource, "cpu" | "memory" | "pods") || resource.contains('/')
}

/// How many pods of a job the nodes of a class take at the same time; nothing where one of them does not tell.
#[must_use]
pub fn slots(rooms: &[Room], class: DeviceClass, job: &ValidJob, config: &Config) -> Option<u32> {
    let asked = asked(class, job, config);
    let own = rooms.iter().filter(|room| room.device_class == class);
    own.map(|room| room.takes(&asked)).try_fold(0u32, |all, one| Some(all.saturating_add(one?)))
}

/// What a run of a job on a class asks for; limits stand for requests that are not named, as Kubernetes has it.
fn asked(class: DeviceClass, job: &ValidJob, config: &Config) -> BTreeMap<String, f64> {
    let resources = job.pod.resources.as_ref().unwrap_or(&config.pod_defaults.resources);
    let named = resources.limits.iter().chain(&resources.requests).flatten();
    let mut asked: BTreeMap<String, f64> =
        named.filter_map(|(name, quantity)| Some((name.clone(), amount(quantity)?))).collect();
    for device in config.device_resources(class) {
        asked.entry(device.to_owned()).or_insert(1.0);
    }
    asked.retain(|name, wanted| is_looked_at(name) && *wanted > 0.0);
    asked
}

/// A quantity as a number: a decimal with one of Kubernetes' suffixes, or with an exponent.
fn amount(Quantity(text): &Quantity) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let suffixed = || SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)));
    let number = |text: &str| text.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
    number(text).or_else(|| suffixed().and_then(|(text, factor)| Some(number(text)? * factor)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use crate::controller::validate::validate;
    use serde_json::json;

    fn room(class: DeviceClass, allocatable: serde_json::Value) -> Room {
        let mut node = samples::node("n", None);
        node.metadata.labels = Some([("joulecast.dev/device-class".to_owned(), class.to_string())].into());
        node.status = Some(serde_json::from_value(json!({ "allocatable": allocatable })).unwrap());
        Room::of(&node)
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, value) in [
            ("2", 2.0),
            ("400m", 0.4),
            ("1Gi", 1_073_741_824.0),
            ("1e3", 1000.0),
            ("2E", 2e18),
            ("1536Mi", 1_610_612_736.0),
            ("7k", 7000.0),
        ] {
            assert_eq!(amount(&Quantity(text.into())), Some(value), "{text}");
        }
        for wrong in ["", "x", "-1", "1Xi", "inf", "m"] {
            assert_eq!(amount(&Quantity(wrong.into())), None, "{wrong}");
        }
    }

    #[test]
    fn a_class_takes_what_fits_onto_each_of_its_nodes() {
        let mut job = samples::job();
        let valid = |job: &joulecast_crds::InferenceJob| validate(job, &samples::models()).unwrap();
        let rooms = [
            room(DeviceClass::Cpu, json!({"cpu": "3900m", "memory": "16Gi"})),
            room(DeviceClass::Cpu, json!({"cpu": "8", "memory": "2Gi"})),
            room(DeviceClass::Cuda, json!({"cpu": "8", "memory": "64Gi", "joulecast.dev/cuda": "4"})),
        ];
        // The default is one processor and 1 GiB a pod.
        let of = |class, job: &joulecast_crds::InferenceJob| slots(&rooms, class, &valid(job), &samples::config());
        assert_eq!((of(DeviceClass::Cpu, &job), of(DeviceClass::Cuda, &job)), (Some(3 + 2), Some(4)));
        let asked = json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "4", "memory": "20Gi"}});
        job.spec.pod_template.resources = Some(serde_json::from_value(asked).unwrap());
        assert_eq!(of(DeviceClass::Cuda, &job), Some(3), "a limit stands for a request that is not named");
        assert_eq!(of(DeviceClass::Cpu, &job), Some(0));
        let with_agent = {
            let mut config = samples::config();
            config.slots.insert(DeviceClass::Cpu);
            config
        };
        assert_eq!(slots(&rooms, DeviceClass::Cpu, &valid(&samples::job()), &with_agent), Some(0), "no agent, no slot");
        let one =
            [room(DeviceClass::Cuda, json!({"cpu": "8", "memory": "64Gi", "joulecast.dev/cuda": "4", "pods": "2"}))];
        assert_eq!(slots(&one, DeviceClass::Cuda, &valid(&samples::job()), &samples::config()), Some(2));
        let silent = [Room { device_class: DeviceClass::Cpu, allocatable: BTreeMap::new() }];
        assert_eq!(slots(&silent, DeviceClass::Cpu, &valid(&samples::job()), &samples::config()), None);
        assert_eq!(slots(&[], DeviceClass::Cpu, &valid(&samples::job()), &samples::config()), Some(0));
    }
}
