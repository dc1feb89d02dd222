//! The operator's configuration file (`--config FILE`, YAML), which the chart renders from its values.
//!
//! ```yaml
//! runtimes:                       # what can run: at least one image
//! - image: localhost/joulecast/runtime:0.1.0
//!   pullPolicy: IfNotPresent      # Always, IfNotPresent (default) or Never
//!   engines: [candle]
//!   providers: [cpu]
//! podDefaults:
//!   resources:                    # of a runtime container whose job names none; this is the default
//!     requests: {cpu: "1", memory: 1Gi}
//!     limits: {cpu: "1", memory: 1Gi}
//! slots: [cpu]                    # classes of nodes whose runs ask for a slot of the node agent; none if absent
//! gpuResource: nvidia.com/gpu     # what gives a run its GPU; the node agent's own slot if absent
//! watts:                          # power of one CPU where a node has no meter; the runtime's own table if absent
//!   busyMilliwattsPerCpu: 7000
//!   idleMilliwattsPerCpu: 1500
//! networkPolicy:                  # one NetworkPolicy per job; none is made if the key is absent
//!   operator:                     # a NetworkPolicyPeer that selects the operator's own pods
//!     namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: joulecast}}
//!     podSelector: {matchLabels: {app.kubernetes.io/name: joulecast-operator}}
//!   extraFrom: []                 # further peers that may read the runs' metrics, for example Prometheus
//! energyModels:
//!   learnFrom: [Measured]         # joules that may correct an EnergyModel; add Modelled on a cluster without meters
//! devices:                        # data-sheet figures by class of devices, for predictions before anything was measured
//!   cpu: {memoryGigabytesPerSecond: 80, gigaflops: 1500, idleWatts: 20, maxWatts: 120}
//! retries:                        # of attempts that failed; these are the defaults
//!   unreachableSeconds: 60        # a run whose node cannot be reached for so long is started elsewhere (1..=86400)
//!   startSeconds: 300             # a pod whose image or container cannot be made for so long is given up (1..=86400)
//!   firstSeconds: 10              # before a run that failed is repeated; doubles with every failure in a row (1..=3600)
//!   longestSeconds: 300           # the longest such time (firstSeconds..=86400)
//!   stragglerSeconds: 120         # work that the last of several pods must have left for it to be divided (1..=86400)
//!   strandedSeconds: 60           # a pod that no node can take waits so long before another plan is asked for (1..=86400)
//!   replanSeconds: 60             # between an answer to that and asking once more for another plan (1..=86400)
//!   infrastructure: 100           # how many runs of a job the cluster may take away before the job is Failed (0..=100000)
//! planning:                       # of jobs whose candidates are predicted; these are the defaults
//!   timeLimitSeconds: 30          # after which the solver answers with what it has (1..=3600)
//!   loadMegabytesPerSecond: 1000  # of a model's files: what starting a configuration at all costs (1..=1000000)
//! progressSeconds: 2              # how often a run's progress is read, and at most written to its status (1..=300)
//! ```
//!
//! Keys that are not listed here are refused with their line. Inside `resources`, `operator` and `extraFrom` the
//! fields are those of Kubernetes.
//!
//! # Access that the operator needs
//!
//! Cluster-wide, or in the namespace of `--watch-namespace` (then `nodes` and `energymodels` alone need a ClusterRole):
//!
//! | group | resource | verbs | for |
//! |---|---|---|---|
//! | joulecast.dev | inferencejobs | list, watch, delete | what is wanted; delete for `ttlSecondsAfterFinished` |
//! | joulecast.dev | inferencejobs/status | patch | the one status write |
//! | joulecast.dev | inferencemodels | list, watch | where artifacts lie |
//! | joulecast.dev | energymodels | list, watch, create, patch | what predicts; ProfileRuns end in one |
//! | joulecast.dev | energymodels/status | patch | what finished jobs have taught |
//! | joulecast.dev | profileruns | list, watch, create, patch | what is to be measured; one that follows a drift |
//! | joulecast.dev | profileruns/status | patch | the one status write |
//! | batch | jobs | list, watch, create, patch | child Jobs by server-side apply; suspend |
//! | (core) | pods | list, watch, patch | reports and progress; patch removes the report finalizer |
//! | (core) | nodes | list, watch | which device classes there are, and which nodes cannot be reached |
//! | networking.k8s.io | networkpolicies | create, patch | one policy per job; leave out without `networkPolicy` |
//! | events.k8s.io | events | create, patch | the story of a job |
//! | coordination.k8s.io | leases | get, update | which replica works: the one Lease of the release, in its own namespace |
//!
//! Nothing else: no Secrets, no ConfigMaps, no PersistentVolumeClaims (a missing claim is told by the pod's own
//! conditions). Child objects are deleted by garbage collection through owner references without
//! `blockOwnerDeletion`, so `inferencejobs/finalizers` is not needed.

use joulecast_crds::names::{RESOURCE_CPU, RESOURCE_CUDA};
use joulecast_crds::report::EnergySource;
use joulecast_crds::run_spec::WattSettings;
use joulecast_crds::{DeviceClass, EngineName, Provider};
use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Runtime images with what each can run; the first that offers an engine with a provider is used.
    pub runtimes: Vec<Runtime>,
    /// What pods get where their job says nothing.
    #[serde(default)]
    pub pod_defaults: PodDefaults,
    /// Classes of nodes whose runs ask for a slot of the node agent, and so for its meter.
    #[serde(default)]
    pub slots: BTreeSet<DeviceClass>,
    /// Extended resource of another device plugin that gives runs their GPUs; the node agent's slot is then the right to be
    /// metered, and is asked for beside it where `slots` names `cuda`. Absent: the slot is the GPU.
    #[serde(default)]
    pub gpu_resource: Option<String>,
    /// Power of one CPU for the model-based estimate on nodes without a meter.
    #[serde(default)]
    pub watts: Option<WattSettings>,
    /// Who may reach the progress port of runs; without it no NetworkPolicy is made.
    #[serde(default)]
    pub network_policy: Option<NetworkPolicyConfig>,
    /// How EnergyModels learn.
    #[serde(default)]
    pub energy_models: EnergyModelsConfig,
    /// Data-sheet figures by class of devices.
    #[serde(default)]
    pub devices: BTreeMap<DeviceClass, DeviceFigures>,
    /// When a failed attempt is repeated, and when one is given up.
    #[serde(default)]
    pub retries: Retries,
    /// How plans are made.
    #[serde(default)]
    pub planning: Planning,
    /// Seconds between two readings of a run's progress, which is also the shortest time between two writes of it.
    #[serde(default = "default_progress_seconds")]
    pub progress_seconds: u32,
}

fn default_progress_seconds() -> u32 {
    2
}

/// When a failed attempt is repeated, and when one is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Retries {
    /// Seconds after which a run whose node cannot be reached is started elsewhere.
    pub unreachable_seconds: u32,
    /// Seconds after which a pod is given up whose image or container cannot be made.
    pub start_seconds: u32,
    /// Seconds before a run that failed is repeated; they double with every failure in a row.
    pub first_seconds: u32,
    /// The most that they become.
    pub longest_seconds: u32,
    /// Where several pods work on a configuration: seconds of work that one of them must have left, when all others are
    /// done, for the rest to be divided among all.
    pub straggler_seconds: u32,
    /// Seconds that a pod which no node can take waits before another plan of its job is asked for.
    pub stranded_seconds: u32,
    /// Seconds after such a plan, or after an answer that there is none, before another one is asked for.
    pub replan_seconds: u32,
    /// How many runs of a job the cluster may take away before the job is Failed.
    pub infrastructure: i32,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            unreachable_seconds: 60,
            start_seconds: 300,
            first_seconds: 10,
            longest_seconds: 300,
            straggler_seconds: 120,
            stranded_seconds: 60,
            replan_seconds: 60,
            infrastructure: 100,
        }
    }
}

/// One runtime image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Runtime {
    /// Image reference.
    pub image: String,
    /// When the kubelet pulls it.
    #[serde(default)]
    pub pull_policy: PullPolicy,
    /// Engines that its build contains.
    pub engines: Vec<EngineName>,
    /// Execution providers that its build contains; it offers each engine with those of them that the engine knows.
    pub providers: Vec<Provider>,
}

impl Runtime {
    /// Whether this image runs the engine with the provider.
    #[must_use]
    pub fn offers(&self, engine: EngineName, provider: Provider) -> bool {
        self.engines.contains(&engine) && self.providers.contains(&provider) && engine.providers().contains(&provider)
    }
}

/// When the kubelet pulls an image.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum PullPolicy {
    /// At every start.
    Always,
    /// If the node lacks it.
    #[default]
    IfNotPresent,
    /// Never; the node must have it.
    Never,
}

impl PullPolicy {
    /// The name in a pod.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// What pods get where their job says nothing.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodDefaults {
    /// Resources of the runtime container.
    #[serde(default = "default_resources")]
    pub resources: ResourceRequirements,
}

impl Default for PodDefaults {
    fn default() -> Self {
        Self { resources: default_resources() }
    }
}

fn default_resources() -> ResourceRequirements {
    let amounts =
        BTreeMap::from([("cpu".to_owned(), Quantity("1".into())), ("memory".to_owned(), Quantity("1Gi".into()))]);
    ResourceRequirements { requests: Some(amounts.clone()), limits: Some(amounts), ..Default::default() }
}

/// How EnergyModels learn.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EnergyModelsConfig {
    /// The kinds of joules that may correct a model. Measured alone, unless a cluster has no meters: an estimate that
    /// anybody's pod makes of itself must not correct a model that everybody is placed by.
    #[serde(default = "measured_alone")]
    pub learn_from: Vec<EnergySource>,
}

fn measured_alone() -> Vec<EnergySource> {
    vec![EnergySource::Measured]
}

impl Default for EnergyModelsConfig {
    fn default() -> Self {
        Self { learn_from: measured_alone() }
    }
}

/// Data-sheet figures of one device (one slot) of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceFigures {
    /// Memory bandwidth in 10^9 bytes per second.
    pub memory_gigabytes_per_second: u32,
    /// Peak arithmetic in 10^9 operations per second, for the number format that engines compute in.
    pub gigaflops: u32,
    /// Power without work in watts.
    pub idle_watts: u32,
    /// Largest power in watts, the power cap if there is one.
    pub max_watts: u32,
}

/// How plans are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Planning {
    /// Seconds after which the solver answers with what it has.
    pub time_limit_seconds: u32,
    /// Megabytes of a model's files that a run loads in a second: what starting a configuration at all costs.
    pub load_megabytes_per_second: u32,
}

impl Default for Planning {
    fn default() -> Self {
        Self { time_limit_seconds: 30, load_megabytes_per_second: 1000 }
    }
}

/// Who may reach the progress port of runs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkPolicyConfig {
    /// Selects the operator's own pods.
    pub operator: NetworkPolicyPeer,
    /// Further peers, for example Prometheus.
    #[serde(default)]
    pub extra_from: Vec<NetworkPolicyPeer>,
}

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not such a file; the message names key and line.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Key, line and what is wrong.
        message: String,
    },
    /// A value is out of its range.
    #[error("{}: {key}: {message}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        message: String,
    },
}

impl Config {
    /// The extended resources of which a run on nodes of a class asks for one each.
    #[must_use]
    pub fn device_resources(&self, class: DeviceClass) -> Vec<&str> {
        let of_agent = self.slots.contains(&class);
        match (class, self.gpu_resource.as_deref()) {
            // Without a slot it runs, and estimates its energy.
            (DeviceClass::Cpu, _) => of_agent.then_some(RESOURCE_CPU).into_iter().collect(),
            // Without a slot it would see no GPU.
            (DeviceClass::Cuda, None) => vec![RESOURCE_CUDA],
            (DeviceClass::Cuda, Some(gpu)) => {
                [Some(gpu), of_agent.then_some(RESOURCE_CUDA)].into_iter().flatten().collect()
            }
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown or missing key, or a value out of range.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Parses and checks the text of a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = serde_yaml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.to_owned(), message: error.to_string() })?;
        let wrong = |key: String, message: &str| {
            Err(ConfigError::Value { path: path.to_owned(), key, message: message.to_owned() })
        };
        if config.runtimes.is_empty() {
            return wrong("runtimes".into(), "is empty: name at least one runtime image");
        }
        for (index, runtime) in config.runtimes.iter().enumerate() {
            let at = |field: &str| format!("runtimes[{index}].{field}");
            if runtime.image.trim().is_empty() {
                return wrong(at("image"), "is empty: give an image reference");
            }
            if runtime.engines.is_empty() {
                return wrong(at("engines"), "is empty: name the engines that the image contains");
            }
            if runtime.providers.is_empty() {
                return wrong(at("providers"), "is empty: name the providers that the image contains");
            }
        }
        let is_name =
            |name: &str| name.split_once('/').is_some_and(|(domain, name)| domain.contains('.') && !name.is_empty());
        if config.gpu_resource.as_deref().is_some_and(|name| !is_name(name)) {
            return wrong("gpuResource".into(), "is no extended resource: a name such as nvidia.com/gpu is wanted");
        }
        for (class, figures) in &config.devices {
            let DeviceFigures { memory_gigabytes_per_second, gigaflops, idle_watts, max_watts } = figures;
            let at = |field: &str| format!("devices.{class}.{field}");
            for (field, value) in [
                ("memoryGigabytesPerSecond", memory_gigabytes_per_second),
                ("gigaflops", gigaflops),
                ("maxWatts", max_watts),
            ] {
                if *value == 0 {
                    return wrong(at(field), "must be at least 1");
                }
            }
            if idle_watts > max_watts {
                return wrong(at("idleWatts"), "is above maxWatts");
            }
        }
        if config.energy_models.learn_from.contains(&EnergySource::Unavailable) {
            return wrong("energyModels.learnFrom".into(), "may hold Measured and Modelled");
        }
        let Retries {
            unreachable_seconds,
            start_seconds,
            first_seconds,
            longest_seconds,
            straggler_seconds,
            stranded_seconds,
            replan_seconds,
            infrastructure,
        } = config.retries;
        for (key, value, least, most) in [
            ("unreachableSeconds", i64::from(unreachable_seconds), 1, 86_400),
            ("startSeconds", i64::from(start_seconds), 1, 86_400),
            ("firstSeconds", i64::from(first_seconds), 1, 3600),
            ("longestSeconds", i64::from(longest_seconds), i64::from(first_seconds), 86_400),
            ("stragglerSeconds", i64::from(straggler_seconds), 1, 86_400),
            ("strandedSeconds", i64::from(stranded_seconds), 1, 86_400),
            ("replanSeconds", i64::from(replan_seconds), 1, 86_400),
            ("infrastructure", i64::from(infrastructure), 0, 100_000),
        ] {
            if !(least..=most).contains(&value) {
                return wrong(format!("retries.{key}"), &format!("is {value}: must be between {least} and {most}"));
            }
        }
        let Planning { time_limit_seconds, load_megabytes_per_second } = config.planning;
        for (key, value, most) in [
            ("timeLimitSeconds", time_limit_seconds, 3600),
            ("loadMegabytesPerSecond", load_megabytes_per_second, 1_000_000),
        ] {
            if !(1..=most).contains(&value) {
                return wrong(format!("planning.{key}"), &format!("is {value}: must be between 1 and {most}"));
            }
        }
        if !(1..=300).contains(&config.progress_seconds) {
            return wrong("progressSeconds".into(), "must be between 1 and 300");
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("config.yaml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_short_file_gets_the_documented_defaults() {
        let config = parse("runtimes: [{image: r:1, engines: [candle], providers: [cpu]}]").unwrap();
        assert_eq!(config.runtimes[0].pull_policy, PullPolicy::IfNotPresent);
        assert_eq!(config.progress_seconds, 2);
        assert_eq!(config.retries, Retries::default());
        assert_eq!(config.pod_defaults.resources.limits.unwrap()["memory"].0, "1Gi");
        assert!(config.network_policy.is_none() && config.watts.is_none() && config.slots.is_empty());
        assert!(config.runtimes[0].offers(EngineName::Candle, Provider::Cpu));
        assert!(!config.runtimes[0].offers(EngineName::Candle, Provider::Cuda));
    }

    #[test]
    fn a_gpu_comes_from_its_slot_or_from_another_plugin() {
        let with = |lines: &str| {
            let config =
                parse(&format!("runtimes: [{{image: r:1, engines: [candle], providers: [cpu]}}]\n{lines}")).unwrap();
            let of = |class| config.device_resources(class).into_iter().map(str::to_owned).collect::<Vec<_>>();
            (of(DeviceClass::Cpu), of(DeviceClass::Cuda))
        };
        for (lines, cpu, cuda) in [
            ("", &[][..], &["joulecast.dev/cuda"][..]),
            ("slots: [cpu, cuda]", &["joulecast.dev/cpu"], &["joulecast.dev/cuda"]),
            ("gpuResource: nvidia.com/gpu", &[], &["nvidia.com/gpu"]),
            ("slots: [cuda]\ngpuResource: nvidia.com/gpu", &[], &["nvidia.com/gpu", "joulecast.dev/cuda"]),
        ] {
            assert_eq!(
                with(lines),
                (cpu.iter().map(ToString::to_string).collect(), cuda.iter().map(ToString::to_string).collect()),
                "{lines}"
            );
        }
        let wrong = "runtimes: [{image: r:1, engines: [candle], providers: [cpu]}]\ngpuResource: gpu";
        assert!(parse(wrong).unwrap_err().contains("gpuResource"));
    }

    #[test]
    fn the_file_in_the_documentation_is_accepted() {
        let text: String = include_str!("config.rs")
            .lines()
            .skip_while(|line| *line != "//! ```yaml")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| format!("{}\n", line.strip_prefix("//! ").unwrap()))
            .collect();
        let config = parse(&text).unwrap();
        assert!(config.network_policy.unwrap().operator.pod_selector.is_some());
        assert_eq!(config.retries, Retries::default(), "the documented values are the defaults");
        assert_eq!(config.watts.unwrap().busy_milliwatts_per_cpu, 7000);
    }

    #[test]
    fn wrong_files_are_refused_with_file_key_and_line() {
        for (text, expected) in [
            ("runtimes:\n- image: r:1\n  engine: [candle]\n", &["config.yaml", "`engine`", "line 3"][..]),
            ("runtimes: []\n", &["config.yaml", "runtimes", "at least one"]),
            ("runtimes: [{image: '', engines: [candle], providers: [cpu]}]", &["runtimes[0].image"]),
            ("runtimes: [{image: r, engines: [], providers: [cpu]}]", &["runtimes[0].engines"]),
            ("runtimes: [{image: r, engines: [candle], providers: []}]", &["runtimes[0].providers"]),
            ("runtimes:\n- image: r\n  engines: [tensorrt]\n  providers: [cpu]\n", &["tensorrt", "line 3", "candle"]),
            (
                "runtimes: [{image: r, engines: [candle], providers: [cpu]}]\nprogressSeconds: 0\n",
                &["progressSeconds", "between 1 and 300"],
            ),
            (
                "runtimes: [{image: r, engines: [candle], providers: [cpu]}]\nretries: {firstSeconds: 20, longestSeconds: 5}\n",
                &["retries.longestSeconds", "is 5", "between 20 and"],
            ),
            ("runtimes: [{image: r, engines: [candle], providers: [cpu]}]\nretries: {forever: 1}\n", &["forever"]),
            ("{}", &["runtimes"]),
            (
                "runtimes: [{image: r, engines: [candle], providers: [cpu]}]\ndevices: {cpu: {memoryGigabytesPerSecond: 9, gigaflops: 9, idleWatts: 9, maxWatts: 8}}\n",
                &["devices.cpu.idleWatts", "above maxWatts"],
            ),
            (
                "runtimes: [{image: r, engines: [candle], providers: [cpu]}]\nenergyModels: {learnFrom: [Unavailable]}\n",
                &["energyModels.learnFrom", "Measured"],
            ),
        ] {
            let message = parse(text).unwrap_err();
            for part in expected {
                assert!(message.contains(part), "{text:?}: {message:?} lacks {part:?}");
            }
        }
    }
}
