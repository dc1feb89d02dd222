//! Third verb: the objects of a campaign. Pure. The pod satisfies the `restricted` Pod Security Standard and holds no API
//! token; what it is to do stands in its arguments.

use crate::config::Config;
use crate::controller::build::{RUN_AS, affinity, container_security};
use crate::profile_run::decide::Launch;
use crate::profile_run::observe::identity;
use crate::progress::ProgressKey;
use joulecast_crds::ProfileRun;
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::names::{
    CONTAINER, ENV_PROGRESS_TOKEN, LABEL_PROFILE_RUN, LABEL_PROFILE_RUN_UID, PROGRESS_PORT, exit,
};
use joulecast_crds::profile_run::{Budget, Grid, Pace, Repetitions};
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
    PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EnvVar, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    ResourceRequirements, SeccompProfile, Volume, VolumeMount,
};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource, ResourceExt};
use std::collections::BTreeMap;

/// Seconds that a pod has to stop and report after it was asked to.
const GRACE_SECONDS: i64 = 30;
/// Where the volumes stand in the pod.
const MODEL_DIR: &str = "/model";
const SAMPLES_DIR: &str = "/samples";

/// What is to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// To be applied first.
    pub network_policy: Option<NetworkPolicy>,
    /// The Job that measures.
    pub child: Job,
}

/// Builds.
#[must_use]
pub fn build(run: &ProfileRun, launch: &Launch, config: &Config, key: &ProgressKey) -> Prepared {
    Prepared { network_policy: network_policy(run, launch, config), child: child(run, launch, config, key) }
}

fn labels(run: &ProfileRun) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "joulecast-runtime".to_owned()),
        ("app.kubernetes.io/managed-by", "joulecast-operator".to_owned()),
        (LABEL_PROFILE_RUN, run.name_any()),
        (LABEL_PROFILE_RUN_UID, run.uid().unwrap_or_default()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

fn metadata(run: &ProfileRun, launch: &Launch) -> ObjectMeta {
    ObjectMeta {
        name: Some(launch.name.clone()),
        namespace: run.namespace(),
        labels: Some(labels(run)),
        // Without blockOwnerDeletion, which would need a further permission where owner references are enforced.
        owner_references: Some(vec![OwnerReference {
            api_version: ProfileRun::api_version(&()).into_owned(),
            kind: ProfileRun::kind(&()).into_owned(),
            name: run.name_any(),
            uid: run.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        }]),
        ..ObjectMeta::default()
    }
}

fn child(run: &ProfileRun, launch: &Launch, config: &Config, key: &ProgressKey) -> Job {
    let mut pod_labels = run.spec.pod_template.labels.clone();
    pod_labels.extend(labels(run));
    Job {
        metadata: metadata(run, launch),
        spec: Some(JobSpec {
            backoff_limit: Some(run.spec.backoff_limit.max(0)),
            completions: Some(1),
            parallelism: Some(1),
            suspend: Some(run.spec.suspend),
            pod_failure_policy: Some(pod_failure_policy()),
            // Two pods at once would measure each other.
            pod_replacement_policy: Some("Failed".into()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(pod_labels), ..ObjectMeta::default() }),
                spec: Some(pod_spec(run, launch, config, key)),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

fn pod_spec(run: &ProfileRun, launch: &Launch, config: &Config, key: &ProgressKey) -> PodSpec {
    let pod = &run.spec.pod_template;
    let (volumes, volume_mounts) = volumes(&launch.artifact, &run.spec.samples.persistent_volume_claim);
    PodSpec {
        restart_policy: Some("Never".into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE_SECONDS),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(RUN_AS),
            run_as_group: Some(RUN_AS),
            fs_group: Some(RUN_AS),
            fs_group_change_policy: Some("OnRootMismatch".into()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), ..SeccompProfile::default() }),
            ..PodSecurityContext::default()
        }),
        affinity: Some(affinity(run.spec.provider.device_class())),
        node_selector: (!pod.node_selector.is_empty()).then(|| pod.node_selector.clone()),
        tolerations: (!pod.tolerations.is_empty()).then(|| pod.tolerations.clone()),
        image_pull_secrets: (!pod.image_pull_secrets.is_empty()).then(|| pod.image_pull_secrets.clone()),
        containers: vec![Container {
            name: CONTAINER.into(),
            image: Some(launch.image.clone()),
            image_pull_policy: Some(launch.pull_policy.as_str().into()),
            args: Some(arguments(run, launch, config)),
            env: Some(vec![EnvVar {
                name: ENV_PROGRESS_TOKEN.into(),
                value: Some(key.token(&identity(run))),
                value_from: None,
            }]),
            ports: Some(vec![ContainerPort {
                name: Some("progress".into()),
                container_port: i32::from(PROGRESS_PORT),
                protocol: Some("TCP".into()),
                ..ContainerPort::default()
            }]),
            resources: Some(resources(run, config)),
            termination_message_policy: Some("File".into()),
            security_context: Some(container_security()),
            volume_mounts: Some(volume_mounts),
            ..Container::default()
        }],
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// The command line of `joulecast-runtime profile`.
fn arguments(run: &ProfileRun, launch: &Launch, config: &Config) -> Vec<String> {
    // Without `..`: a new field of the API cannot be forgotten here.
    let spec = &run.spec;
    let Grid { tokens_in, tokens_out } = &spec.grid;
    let Repetitions { min, max, relative_half_width } = &spec.repetitions;
    let Pace { idle_baseline_seconds, warm_up_seconds, cool_down_milliseconds, least_window_milliseconds } = &spec.pace;
    let Budget { seconds, joules } = &spec.budget;
    let list = |values: &[i32]| values.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let mut arguments = vec!["profile".to_owned()];
    let mut add = |option: &str, value: String| arguments.extend([format!("--{option}"), value]);
    add("model", inside(MODEL_DIR, &launch.artifact.path));
    add("model-name", spec.model.name.clone());
    add("engine", spec.engine.to_string());
    add("provider", spec.provider.to_string());
    add("samples", inside(SAMPLES_DIR, &spec.samples.persistent_volume_claim.path));
    add("batch-sizes", list(&spec.batch_sizes));
    add("tokens-in", list(tokens_in));
    add("tokens-out", list(tokens_out));
    add("seed", launch.seed.to_string());
    add("repeat-min", min.to_string());
    add("repeat-max", max.to_string());
    add("relative-half-width", relative_half_width.clone());
    add("idle-seconds", idle_baseline_seconds.to_string());
    add("warm-up-seconds", warm_up_seconds.to_string());
    add("cool-down-milliseconds", cool_down_milliseconds.to_string());
    add("least-window-milliseconds", least_window_milliseconds.to_string());
    add("budget-seconds", seconds.to_string());
    if let Some(joules) = joules {
        add("budget-joules", joules.to_string());
    }
    if let Some(watts) = config.watts {
        let in_watts = |milliwatts: u64| format!("{}.{:03}", milliwatts / 1000, milliwatts % 1000);
        add("busy-watts", in_watts(watts.busy_milliwatts_per_cpu));
        add("idle-watts", in_watts(watts.idle_milliwatts_per_cpu));
    }
    add("run-uid", run.uid().unwrap_or_default());
    arguments
}

fn inside(directory: &str, path: &str) -> String {
    match path.trim_matches('/') {
        "" | "." => directory.to_owned(),
        path => format!("{directory}/{path}"),
    }
}

fn resources(run: &ProfileRun, config: &Config) -> ResourceRequirements {
    let own = run.spec.pod_template.resources.clone();
    let mut resources = own.unwrap_or_else(|| config.pod_defaults.resources.clone());
    // Without a slot of the agent its samples are estimates.
    for device in config.device_resources(run.spec.provider.device_class()) {
        resources.limits.get_or_insert_default().entry(device.into()).or_insert_with(|| Quantity("1".into()));
    }
    resources
}

/// The volumes, one if model and samples lie on the same claim, and where they are mounted.
fn volumes(model: &ClaimPath, samples: &ClaimPath) -> (Vec<Volume>, Vec<VolumeMount>) {
    let volume = |name: &str, claim: &ClaimPath, read_only: bool| Volume {
        name: name.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.claim_name.clone(),
            read_only: read_only.then_some(true),
        }),
        ..Volume::default()
    };
    let mount = |volume: &str, directory: &str, read_only: bool| VolumeMount {
        name: volume.to_owned(),
        mount_path: directory.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    if model.claim_name == samples.claim_name {
        let mounts = vec![mount("samples", MODEL_DIR, true), mount("samples", SAMPLES_DIR, false)];
        return (vec![volume("samples", samples, false)], mounts);
    }
    (
        vec![volume("model", model, true), volume("samples", samples, false)],
        vec![mount("model", MODEL_DIR, true), mount("samples", SAMPLES_DIR, false)],
    )
}

/// Lets in the operator and the configured peers to the progress port, and nothing out: measuring needs no network.
fn network_policy(run: &ProfileRun, launch: &Launch, config: &Config) -> Option<NetworkPolicy> {
    let peers = config.network_policy.as_ref()?;
    let from = std::iter::once(&peers.operator).chain(&peers.extra_from).cloned().collect();
    let uid = BTreeMap::from([(LABEL_PROFILE_RUN_UID.to_owned(), run.uid().unwrap_or_default())]);
    Some(NetworkPolicy {
        metadata: metadata(run, launch),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector { match_labels: Some(uid), match_expressions: None }),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(from),
                ports: Some(vec![NetworkPolicyPort {
                    port: Some(IntOrString::Int(i32::from(PROGRESS_PORT))),
                    protocol: Some("TCP".into()),
                    end_port: None,
                }]),
            }]),
            egress: None,
        }),
    })
}

/// A run that can never work fails at once; one that was asked to stop (suspended, evicted) or that its node took away is
/// repeated without counting as a failure.
fn pod_failure_policy() -> PodFailurePolicy {
    let on_exit = |action: &str, codes: &[u8]| PodFailurePolicyRule {
        action: action.into(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(CONTAINER.into()),
            operator: "In".into(),
            values: codes.iter().copied().map(i32::from).collect(),
        }),
        on_pod_conditions: None,
    };
    let invalid = on_exit("FailJob", &[exit::USAGE, exit::INVALID]);
    let stopped = on_exit("Ignore", &[exit::STOPPED]);
    let disrupted = PodFailurePolicyRule {
        action: "Ignore".into(),
        on_exit_codes: None,
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: "DisruptionTarget".into(),
            status: "True".into(),
        }]),
    };
    PodFailurePolicy { rules: vec![invalid, stopped, disrupted] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples as jobs;
    use crate::profile_run::decide::{Step, decide};
    use crate::profile_run::samples::Builder;
    use joulecast_crds::DeviceClass;
    use joulecast_crds::ProfileRunSpec;
    use joulecast_crds::names::RESOURCE_CPU;

    fn built(change: impl FnOnce(&mut ProfileRunSpec), config: &Config) -> Prepared {
        let snapshot = Builder::new().seeded(7).spec(change).build();
        let Step::Launch(launch) = decide(&snapshot, config) else { panic!("it can start") };
        build(&snapshot.run, &launch, config, &jobs::progress_key())
    }

    fn pod(prepared: &Prepared) -> PodSpec {
        prepared.child.spec.as_ref().unwrap().template.spec.clone().unwrap()
    }

    #[test]
    fn the_arguments_say_all_that_the_campaign_asks_for() {
        let mut config = jobs::config();
        config.watts = Some(joulecast_crds::run_spec::WattSettings {
            busy_milliwatts_per_cpu: 7050,
            idle_milliwatts_per_cpu: 1500,
        });
        let arguments = pod(&built(|spec| spec.budget.joules = Some(500), &config)).containers[0].args.clone().unwrap();
        let line = arguments.join(" ");
        for part in [
            "profile --model /model/tiny --model-name demo --engine candle --provider cpu --samples /samples/grid.csv",
            "--tokens-in 8,16,32 --tokens-out 8,16",
            "--seed 7 --repeat-min 3 --repeat-max 10 --relative-half-width 0.05",
            "--idle-seconds 5 --warm-up-seconds 5 --cool-down-milliseconds 0 --least-window-milliseconds 500",
            "--budget-seconds 3600 --budget-joules 500 --busy-watts 7.050 --idle-watts 1.500 --run-uid",
        ] {
            assert!(line.contains(part), "{part:?} is not in {line}");
        }
    }

    #[test]
    fn the_pod_is_restricted_and_has_no_token() {
        let prepared = built(|_| (), &jobs::config());
        let pod = pod(&prepared);
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!(pod.security_context.as_ref().unwrap().run_as_non_root, Some(true));
        assert_eq!(pod.containers[0].security_context, Some(container_security()));
        assert_eq!(pod.volumes.as_ref().unwrap().len(), 2);
        let policy = prepared.network_policy.unwrap().spec.unwrap();
        assert_eq!(policy.egress, None);
        let selected = policy.pod_selector.unwrap().match_labels.unwrap();
        let labels = prepared.child.spec.unwrap().template.metadata.unwrap().labels.unwrap();
        assert!(selected.iter().all(|(key, value)| labels.get(key) == Some(value)));
    }

    #[test]
    fn where_there_is_a_node_agent_a_slot_is_asked_for() {
        let mut config = jobs::config();
        let limit = |config: &Config| {
            let resources = pod(&built(|_| (), config)).containers[0].resources.clone();
            resources.and_then(|resources| resources.limits?.get(RESOURCE_CPU).cloned())
        };
        assert_eq!(limit(&config), None);
        config.slots.insert(DeviceClass::Cpu);
        assert_eq!(limit(&config), Some(Quantity("1".into())));
    }

    #[test]
    fn model_and_samples_on_one_claim_are_one_volume() {
        let same = |spec: &mut ProfileRunSpec| spec.samples.persistent_volume_claim.claim_name = "models".into();
        let pod = pod(&built(same, &jobs::config()));
        assert_eq!(pod.volumes.unwrap().len(), 1);
        let mounts = pod.containers[0].volume_mounts.clone().unwrap();
        assert_eq!(mounts.iter().map(|m| m.read_only).collect::<Vec<_>>(), [Some(true), None]);
    }
}
