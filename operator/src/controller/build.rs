//! Fourth verb: the objects of a decision. Pure.
//!
//! The pods satisfy the `restricted` Pod Security Standard: no root, no privilege escalation, no capabilities, the
//! runtime's default seccomp profile, a read-only root file system; and they hold no API token.

use crate::config::Config;
use crate::controller::decide::{ChildAction, Decision, Launch, fitted};
use crate::controller::facts::Place;
use crate::controller::objects;
use crate::controller::plan_step::job::{input_path, inside, output_path, plan_job};
use crate::controller::validate::{InputFile, OutputFile, ValidJob};
use crate::progress::ProgressKey;
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::names::{
    CONTAINER, ENV_COMPLETION_INDEX, ENV_POD_NAME, ENV_PROGRESS_TOKEN, ENV_RUN_SPEC, FINALIZER_REPORT, LABEL_ATTEMPT,
    LABEL_CONFIGURATION, LABEL_DEVICE_CLASS, LABEL_EPOCH, LABEL_JOB, LABEL_JOB_UID, LABEL_SHARD, LABEL_TASK,
    PROGRESS_PORT,
};
use joulecast_crds::run_spec::{RunIdentity, RunSpec, Task, VERSION};
use joulecast_crds::{DeviceClass, InferenceJob};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EnvVarSource, NodeAffinity,
    NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
    PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements, SeccompProfile, SecurityContext, Volume,
    VolumeMount,
};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Resource;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// User and group of a runtime pod, and the group of its volumes.
pub const RUN_AS: i64 = 65_532;
/// Seconds that a run has to stop and report after it was asked to.
const GRACE_SECONDS: u32 = 30;
/// Sequences that are decoded together where no prediction says what is best.
const BATCH: u32 = 1;
/// Where the volumes stand in the pod.
const MODEL_DIR: &str = "/model";
pub(super) const INPUT_DIR: &str = "/input";
pub(super) const OUTPUT_DIR: &str = "/output";

/// What is to be sent to the API, built and not yet applied.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Prepared {
    /// Namespace of everything.
    pub namespace: String,
    /// To be applied first, so that no run is ever reachable by all.
    pub network_policy: Option<Box<NetworkPolicy>>,
    /// The Job of a plan step, to be applied.
    pub plan: Option<Box<Job>>,
    /// To be applied.
    pub children: Vec<Job>,
    /// To be merged into the child of this name.
    pub child_patches: Vec<(String, Value)>,
    /// To be merged (strategically) into the pods of these names.
    pub pod_patches: Vec<(String, Value)>,
}

/// Builds.
#[must_use]
pub fn build(decision: &Decision, job: Option<&ValidJob>, config: &Config, key: &ProgressKey) -> Prepared {
    let mut prepared = Prepared {
        pod_patches: decision.release.iter().map(|(name, uid)| (name.clone(), release_patch(uid))).collect(),
        ..Prepared::default()
    };
    if let (Some(ask), Some(job)) = (&decision.ask, job) {
        prepared.network_policy = network_policy(ask.question.spec.run.epoch, job, config).map(Box::new);
        prepared.plan = Some(Box::new(plan_job(ask, job, config)));
    }
    for action in &decision.children {
        match (action, job) {
            (ChildAction::Launch(launch), Some(job)) => {
                prepared.network_policy = network_policy(launch.place.epoch, job, config).map(Box::new);
                prepared.children.push(child_job(launch, job, config, key));
            }
            (ChildAction::Suspend { name, suspend }, _) => {
                prepared.child_patches.push((name.clone(), json!({"spec": {"suspend": suspend}})));
            }
            (ChildAction::Launch(_) | ChildAction::Blocked { .. }, _) => {}
        }
    }
    prepared
}

/// A strategic merge patch that takes the report finalizer, and nothing else, off the pod of this UID.
#[must_use]
pub fn release_patch(uid: &str) -> Value {
    json!({"metadata": {"uid": uid, "$deleteFromPrimitiveList/finalizers": [FINALIZER_REPORT]}})
}

/// The labels of everything of an epoch.
pub(super) fn labels(epoch: u32, job: &ValidJob) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "joulecast-runtime".to_owned()),
        ("app.kubernetes.io/managed-by", "joulecast-operator".to_owned()),
        (LABEL_JOB, job.name.clone()),
        (LABEL_JOB_UID, job.uid.clone()),
        (LABEL_EPOCH, epoch.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// The labels of everything of an attempt.
fn labels_of_attempt(launch: &Launch, job: &ValidJob) -> BTreeMap<String, String> {
    let Place { epoch, configuration, shard, attempt } = launch.place;
    let mut labels = labels(epoch, job);
    labels.extend([
        (LABEL_CONFIGURATION.to_owned(), configuration.to_string()),
        (LABEL_SHARD.to_owned(), shard.to_string()),
        (LABEL_ATTEMPT.to_owned(), attempt.to_string()),
        (LABEL_TASK.to_owned(), if launch.task == Task::Merge { "merge" } else { "run" }.to_owned()),
    ]);
    labels
}

pub(super) fn metadata(name: String, labels: BTreeMap<String, String>, job: &ValidJob) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(job.namespace.clone()),
        labels: Some(labels),
        // Without blockOwnerDeletion, which would need a further permission where owner references are enforced.
        owner_references: Some(vec![OwnerReference {
            api_version: InferenceJob::api_version(&()).into_owned(),
            kind: InferenceJob::kind(&()).into_owned(),
            name: job.name.clone(),
            uid: job.uid.clone(),
            controller: Some(true),
            block_owner_deletion: None,
        }]),
        ..ObjectMeta::default()
    }
}

/// A Job that starts its pod once: whether there is another attempt is the operator's decision, by what was at fault.
fn child_job(launch: &Launch, job: &ValidJob, config: &Config, key: &ProgressKey) -> Job {
    let mut pod_labels = job.pod.labels.clone();
    pod_labels.extend(labels_of_attempt(launch, job));
    Job {
        metadata: metadata(launch.name.clone(), labels_of_attempt(launch, job), job),
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            completions: Some(1),
            parallelism: Some(1),
            suspend: Some(job.suspend),
            // A pod that is being deleted may still report: it has failed when it has ended, not before.
            pod_replacement_policy: Some("Failed".into()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(pod_labels),
                    finalizers: Some(vec![FINALIZER_REPORT.into()]),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod_spec(launch, job, config, key)),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Into how many blocks the lines of a launch's configuration are divided.
fn shards(launch: &Launch, job: &ValidJob) -> u32 {
    if launch.task == Task::Merge { 1 } else { job.parallelism }
}

fn pod_spec(launch: &Launch, job: &ValidJob, config: &Config, key: &ProgressKey) -> PodSpec {
    let models: Vec<_> = launch.artifact.iter().map(|artifact| (MODEL_DIR.to_owned(), artifact)).collect();
    let (volumes, volume_mounts) = volumes(&models, job);
    let pod = &job.pod;
    PodSpec {
        restart_policy: Some("Never".into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(i64::from(GRACE_SECONDS)),
        security_context: Some(pod_security()),
        affinity: (launch.task == Task::Run).then(|| affinity(launch.chosen.device_class)),
        node_selector: (!pod.node_selector.is_empty()).then(|| pod.node_selector.clone()),
        tolerations: (!pod.tolerations.is_empty()).then(|| pod.tolerations.clone()),
        image_pull_secrets: (!pod.image_pull_secrets.is_empty()).then(|| pod.image_pull_secrets.clone()),
        containers: vec![Container {
            name: CONTAINER.into(),
            image: Some(launch.image.clone()),
            image_pull_policy: Some(launch.pull_policy.as_str().into()),
            args: Some(vec!["pod".into()]),
            env: Some(environment(launch, job, config, key)),
            ports: Some(vec![ContainerPort {
                name: Some("progress".into()),
                container_port: i32::from(PROGRESS_PORT),
                protocol: Some("TCP".into()),
                ..ContainerPort::default()
            }]),
            resources: Some(resources(launch, job, config)),
            termination_message_policy: Some("File".into()),
            security_context: Some(container_security()),
            volume_mounts: Some(volume_mounts),
            ..Container::default()
        }],
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// What `restricted` asks of a pod.
#[must_use]
pub fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(RUN_AS),
        run_as_group: Some(RUN_AS),
        fs_group: Some(RUN_AS),
        // A large volume is not walked through again for every pod.
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), ..SeccompProfile::default() }),
        ..PodSecurityContext::default()
    }
}

/// What `restricted` asks of a container.
#[must_use]
pub fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".into()]) }),
        ..SecurityContext::default()
    }
}

/// Nodes of the class; those without a label are of class `cpu`, so it excludes the others instead of asking for it.
pub(crate) fn affinity(class: DeviceClass) -> Affinity {
    let requirement = if class == DeviceClass::Cpu {
        let others = DeviceClass::ALL.iter().filter(|other| **other != class).map(ToString::to_string).collect();
        NodeSelectorRequirement { key: LABEL_DEVICE_CLASS.into(), operator: "NotIn".into(), values: Some(others) }
    } else {
        NodeSelectorRequirement {
            key: LABEL_DEVICE_CLASS.into(),
            operator: "In".into(),
            values: Some(vec![class.to_string()]),
        }
    };
    Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: vec![NodeSelectorTerm {
                    match_expressions: Some(vec![requirement]),
                    match_fields: None,
                }],
            }),
            preferred_during_scheduling_ignored_during_execution: None,
        }),
        ..Affinity::default()
    }
}

fn resources(launch: &Launch, job: &ValidJob, config: &Config) -> ResourceRequirements {
    let mut resources = job.pod.resources.clone().unwrap_or_else(|| config.pod_defaults.resources.clone());
    // Whoever merges computes nothing.
    let devices = if launch.task == Task::Merge { vec![] } else { config.device_resources(launch.chosen.device_class) };
    for device in devices {
        resources.limits.get_or_insert_default().entry(device.into()).or_insert_with(|| Quantity("1".into()));
    }
    resources
}

fn environment(launch: &Launch, job: &ValidJob, config: &Config, key: &ProgressKey) -> Vec<EnvVar> {
    let run = run_spec(launch, job, config);
    let token = key.token(&run.run);
    // Strings, numbers and enums only: it has no way to fail.
    let run = serde_json::to_string(&run).expect("a run specification serializes");
    let own_name = EnvVarSource {
        field_ref: Some(ObjectFieldSelector { api_version: None, field_path: "metadata.name".into() }),
        ..EnvVarSource::default()
    };
    let given = [(ENV_RUN_SPEC, run), (ENV_PROGRESS_TOKEN, token)].map(|(name, value)| EnvVar {
        name: name.into(),
        value: Some(value),
        value_from: None,
    });
    let own_name = EnvVar { name: ENV_POD_NAME.into(), value: None, value_from: Some(own_name) };
    let block = (shards(launch, job) > 1).then(|| EnvVar {
        name: ENV_COMPLETION_INDEX.into(),
        value: Some(launch.place.shard.to_string()),
        value_from: None,
    });
    given.into_iter().chain([own_name]).chain(block).chain(objects::variables(job)).collect()
}

fn run_spec(launch: &Launch, job: &ValidJob, config: &Config) -> RunSpec {
    RunSpec {
        version: VERSION,
        run: RunIdentity {
            namespace: job.namespace.clone(),
            job: job.name.clone(),
            job_uid: job.uid.clone(),
            epoch: launch.place.epoch,
            configuration: launch.place.configuration,
        },
        model: launch.chosen.model.clone(),
        model_path: inside(MODEL_DIR, launch.artifact.as_ref().map_or("", |artifact| artifact.path.as_str())),
        artifact_digest: launch.artifact_digest.clone(),
        engine: launch.chosen.engine,
        provider: launch.chosen.provider,
        device_class: launch.chosen.device_class,
        input_path: input_path(job),
        output_path: output_path(job),
        input_object: objects::input(job).map(objects::told),
        output_object: objects::output(job).map(objects::told),
        task: launch.task,
        shards: shards(launch, job),
        rest: launch.rest,
        assignment: launch.assignment.clone(),
        batch: launch.chosen.batch.and_then(|batch| u32::try_from(batch).ok()).unwrap_or(BATCH),
        threads: None,
        watts: config.watts,
        forecast: launch.forecast.as_deref().cloned(),
        grace_seconds: GRACE_SECONDS,
    }
}

/// The volumes, one for each claim however often it is used, and where they are mounted.
pub(super) fn volumes(models: &[(String, &ClaimPath)], job: &ValidJob) -> (Vec<Volume>, Vec<VolumeMount>) {
    let mut claims: Vec<(&str, &ClaimPath, bool)> =
        models.iter().map(|(directory, claim)| (directory.as_str(), *claim, true)).collect();
    if let InputFile::Claim(claim) = &job.input {
        claims.push((INPUT_DIR, claim, true));
    }
    if let OutputFile::Claim(claim) = &job.output {
        claims.push((OUTPUT_DIR, claim, false));
    }
    let mut volumes: Vec<Volume> = Vec::new();
    let mut mounts = Vec::new();
    for (directory, claim, read_only) in &claims {
        let of_claim = |volume: &&Volume| {
            volume.persistent_volume_claim.as_ref().is_some_and(|source| source.claim_name == claim.claim_name)
        };
        let name = if let Some(volume) = volumes.iter().find(of_claim) {
            volume.name.clone()
        } else {
            let name = directory.trim_start_matches('/').replace('/', "-");
            let only_read = claims.iter().all(|(_, other, ro)| other.claim_name != claim.claim_name || *ro);
            volumes.push(Volume {
                name: name.clone(),
                persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                    claim_name: claim.claim_name.clone(),
                    read_only: only_read.then_some(true),
                }),
                ..Volume::default()
            });
            name
        };
        mounts.push(mount(&name, directory, *read_only));
    }
    if let InputFile::ConfigMap(key) = &job.input {
        // The whole map, not the key: a missing key is then told by the run, not by a mount that fails for ever.
        volumes.push(Volume {
            name: "input".into(),
            config_map: Some(ConfigMapVolumeSource { name: key.name.clone(), ..ConfigMapVolumeSource::default() }),
            ..Volume::default()
        });
        mounts.push(mount("input", INPUT_DIR, true));
    }
    if let Some((volume, mount)) = objects::scratch(job) {
        volumes.push(volume);
        mounts.push(mount);
    }
    (volumes, mounts)
}

fn mount(volume: &str, directory: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: directory.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}

/// Lets in the operator and the configured peers to the progress port, and nothing out but to the servers of its buckets.
fn network_policy(epoch: u32, job: &ValidJob, config: &Config) -> Option<NetworkPolicy> {
    let peers = config.network_policy.as_ref()?;
    let from = std::iter::once(&peers.operator).chain(&peers.extra_from).cloned().collect();
    Some(NetworkPolicy {
        metadata: metadata(fitted(&job.name, &format!("-{epoch}")), labels(epoch, job), job),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from([(LABEL_JOB_UID.to_owned(), job.uid.clone())])),
                match_expressions: None,
            }),
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(from),
                ports: Some(vec![NetworkPolicyPort {
                    port: Some(IntOrString::Int(i32::from(PROGRESS_PORT))),
                    protocol: Some("TCP".into()),
                    end_port: None,
                }]),
            }]),
            egress: objects::egress(job),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::decide::decide;
    use crate::controller::samples::{self, SnapshotBuilder};
    use crate::controller::validate::validate;
    use joulecast_crds::inference_job::InferenceJobSpec;
    use joulecast_crds::names::{RESOURCE_CPU, RESOURCE_CUDA};
    use joulecast_crds::{EngineName, Provider};

    fn built(change: impl FnOnce(&mut InferenceJobSpec), config: &Config) -> Prepared {
        let snapshot = SnapshotBuilder::new().planned().spec(change).build();
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        let decision = decide(&snapshot, Ok(&job), config);
        build(&decision, Some(&job), config, &samples::progress_key())
    }

    fn pod(prepared: &Prepared) -> PodSpec {
        prepared.children[0].spec.as_ref().unwrap().template.spec.clone().unwrap()
    }

    #[test]
    fn the_objects_of_the_sample_are_those_on_file() {
        let prepared = built(|_| (), &samples::config());
        for (name, object) in [
            ("child_job", serde_yaml::to_string(&prepared.children[0]).unwrap()),
            ("network_policy", serde_yaml::to_string(&prepared.network_policy).unwrap()),
        ] {
            let path = format!("{}/tests/golden/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
            if std::env::var_os("REWRITE").is_some() {
                std::fs::write(&path, &object).unwrap();
            }
            let expected = std::fs::read_to_string(&path).unwrap();
            assert_eq!(object, expected, "{path} is stale: REWRITE=1 cargo test --release -p joulecast-operator");
        }
    }

    #[test]
    fn a_claim_used_twice_is_one_volume() {
        let same = ClaimPath { claim_name: "work".into(), path: "in.jsonl".into() };
        let prepared = built(
            |spec| {
                spec.input.config_map = None;
                spec.input.persistent_volume_claim = Some(same);
                spec.output.persistent_volume_claim =
                    Some(ClaimPath { claim_name: "work".into(), path: "out.jsonl".into() });
            },
            &samples::config(),
        );
        let pod = pod(&prepared);
        let volumes = pod.volumes.unwrap();
        let names: Vec<_> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["model", "input"]);
        assert_eq!(volumes[1].persistent_volume_claim.as_ref().unwrap().read_only, None, "it is written to");
        assert_eq!(volumes[0].persistent_volume_claim.as_ref().unwrap().read_only, Some(true));
        let mounts = pod.containers[0].volume_mounts.clone().unwrap();
        let facts: Vec<_> = mounts.iter().map(|m| (m.name.as_str(), m.mount_path.as_str(), m.read_only)).collect();
        assert_eq!(
            facts,
            [("model", "/model", Some(true)), ("input", "/input", Some(true)), ("input", "/output", None)]
        );
    }

    #[test]
    fn objects_need_a_disk_and_no_volumes_of_the_job() {
        let prepared = built(
            |spec| {
                let object = |key: &str| {
                    json!({"s3": {"bucket": "batches", "key": key, "region": "eu-1",
                    "endpoint": "http://minio:9000", "credentialsSecret": {"name": "bucket"}}})
                };
                spec.input = serde_json::from_value(object("in.jsonl")).unwrap();
                spec.output = serde_json::from_value(object("out.jsonl")).unwrap();
            },
            &samples::config(),
        );
        let pod = pod(&prepared);
        let names: Vec<_> = pod.volumes.as_ref().unwrap().iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["model", "scratch"]);
        let environment = pod.containers[0].env.as_ref().unwrap();
        assert!(environment.iter().any(|variable| variable.name == "JOULECAST_OUTPUT_SECRET_ACCESS_KEY"));
        let run: RunSpec = serde_json::from_str(environment[0].value.as_ref().unwrap()).unwrap();
        assert_eq!(
            (run.input_path.as_str(), run.output_path.as_str()),
            ("/scratch/input.jsonl", "/scratch/output.jsonl")
        );
        let output = run.output_object.unwrap();
        assert_eq!((output.key.as_str(), output.signed, output.path_style), ("out.jsonl", true, true));
        let policy = prepared.network_policy.unwrap().spec.unwrap();
        assert_eq!(policy.egress.unwrap()[0].ports.as_ref().unwrap().len(), 3);
    }

    #[test]
    fn the_run_reads_back_what_the_operator_wrote() {
        let prepared = built(|_| (), &samples::config());
        let env = pod(&prepared).containers[0].env.clone().unwrap();
        let run: RunSpec = serde_json::from_str(env[0].value.as_ref().unwrap()).unwrap();
        assert_eq!((run.engine, run.provider), (EngineName::Candle, Provider::Cpu));
        assert_eq!(
            (run.model_path.as_str(), run.input_path.as_str(), run.output_path.as_str()),
            ("/model/tiny", "/input/requests.jsonl", "/output/out/results.jsonl")
        );
        assert_eq!(env[1].value.clone().unwrap(), samples::progress_key().token(&run.run));
    }

    #[test]
    fn overrides_add_but_do_not_weaken() {
        let prepared = built(
            |spec| {
                spec.pod_template.labels.insert("team".into(), "a".into());
                spec.pod_template.node_selector.insert("zone".into(), "b".into());
            },
            &samples::config(),
        );
        let template = prepared.children[0].spec.as_ref().unwrap().template.clone();
        let labels = template.metadata.unwrap().labels.unwrap();
        assert_eq!((labels["team"].as_str(), labels[LABEL_JOB].as_str()), ("a", "hello"));
        let pod = template.spec.unwrap();
        assert_eq!(pod.node_selector.unwrap()["zone"], "b");
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!(pod.security_context.unwrap().run_as_non_root, Some(true));
    }

    #[test]
    fn each_of_several_pods_knows_its_block_and_the_merge_needs_neither_model_nor_device() {
        let snapshot = SnapshotBuilder::new().planned().spec(|spec| spec.parallelism = 3).build();
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        let config = samples::config();
        let decision = decide(&snapshot, Ok(&job), &config);
        let build = |decision: &Decision| build(decision, Some(&job), &config, &samples::progress_key());
        let prepared = build(&decision);
        for (shard, child) in prepared.children.iter().enumerate() {
            let spec = child.spec.clone().unwrap();
            assert_eq!((spec.completions, spec.backoff_limit), (Some(1), Some(0)));
            let environment = spec.template.spec.unwrap().containers[0].env.clone().unwrap();
            let index = environment.iter().find(|variable| variable.name == ENV_COMPLETION_INDEX).unwrap();
            assert_eq!(index.value.as_deref(), Some(shard.to_string().as_str()));
            assert_eq!(child.metadata.labels.as_ref().unwrap()[LABEL_SHARD], shard.to_string());
        }
        assert_eq!(prepared.children.len(), 3);
        let run = |prepared: &Prepared| -> RunSpec {
            serde_json::from_str(pod(prepared).containers[0].env.as_ref().unwrap()[0].value.as_ref().unwrap()).unwrap()
        };
        assert_eq!((run(&prepared).shards, run(&prepared).task), (3, Task::Run));

        let mut merging = decision.clone();
        merging.children.truncate(1);
        let [ChildAction::Launch(launch)] = &mut merging.children[..] else { panic!("{decision:?}") };
        launch.task = Task::Merge;
        (launch.artifact, launch.artifact_digest) = (None, None);
        launch.chosen.device_class = DeviceClass::Cuda;
        let prepared = build(&merging);
        let pod = pod(&prepared);
        assert_eq!((run(&prepared).shards, run(&prepared).task), (1, Task::Merge));
        assert!(pod.affinity.is_none() && pod.volumes.unwrap().iter().all(|volume| volume.name != "model"));
        assert!(!pod.containers[0].resources.clone().unwrap().limits.unwrap().contains_key(RESOURCE_CUDA));
        assert_eq!(prepared.children[0].spec.as_ref().unwrap().completions, Some(1));
    }

    #[test]
    fn without_peers_there_is_no_policy() {
        let mut config = samples::config();
        config.network_policy = None;
        assert!(built(|_| (), &config).network_policy.is_none());
    }

    #[test]
    fn a_slot_is_asked_for_where_the_configuration_says_so() {
        let limit = |config: &Config, own: Option<&str>| {
            let with = |spec: &mut InferenceJobSpec| {
                let limits = own.map(|own| BTreeMap::from([(RESOURCE_CPU.to_owned(), Quantity(own.into()))]));
                spec.pod_template.resources = own.map(|_| ResourceRequirements { limits, ..Default::default() });
            };
            let limits = pod(&built(with, config)).containers[0].resources.clone().unwrap().limits.unwrap();
            limits.get(RESOURCE_CPU).map(|amount| amount.0.clone())
        };
        let mut config = samples::config();
        assert_eq!(limit(&config, None), None);
        config.slots.insert(DeviceClass::Cpu);
        assert_eq!(limit(&config, None).as_deref(), Some("1"));
        assert_eq!(limit(&config, Some("2")).as_deref(), Some("2"), "what the job says is not touched");
    }

    #[test]
    fn a_gpu_is_asked_for_by_class_and_slot() {
        let terms = affinity(DeviceClass::Cuda).node_affinity.unwrap();
        let terms = terms.required_during_scheduling_ignored_during_execution.unwrap().node_selector_terms;
        assert_eq!(terms[0].match_expressions.as_ref().unwrap()[0].operator, "In");
    }
}
