//! The plan pod as a Job: the runtime's image, the job's volumes and every candidate's model, no device, no API token, and
//! no network beyond that of the job's runs (their policy holds for it too).

use super::Ask;
use crate::config::Config;
use crate::controller::build::{self, INPUT_DIR, OUTPUT_DIR};
use crate::controller::objects::{self, SCRATCH_DIR};
use crate::controller::validate::{InputFile, OutputFile, ValidJob};
use joulecast_crds::names::{CONTAINER, ENV_PLAN_SPEC, LABEL_TASK, exit};
use joulecast_crds::run_spec::BucketObject;
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{Container, EnvVar, PodSpec, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Annotation of a plan Job: the question, as JSON.
pub const ANNOTATION_QUESTION: &str = "joulecast.dev/plan-question";
/// Value of [`LABEL_TASK`] on a plan Job and its pod.
pub const TASK: &str = "plan";
/// How often a plan pod that failed is repeated.
const BACKOFF_LIMIT: i32 = 2;

/// Where the files of a model stand in the plan pod.
#[must_use]
pub fn model_directory(place: usize) -> String {
    format!("/models/{place}")
}

/// A path inside a mounted volume.
#[must_use]
pub fn inside(directory: &str, path: &str) -> String {
    if path.is_empty() { directory.to_owned() } else { format!("{directory}/{path}") }
}

/// Where the requests stand in every pod of the job.
#[must_use]
pub fn input_path(job: &ValidJob) -> String {
    match &job.input {
        InputFile::Claim(claim) => inside(INPUT_DIR, &claim.path),
        InputFile::ConfigMap(key) => inside(INPUT_DIR, &key.key),
        InputFile::Object(_) => inside(SCRATCH_DIR, "input.jsonl"),
    }
}

/// Where the results stand in every pod of the job, in the end.
#[must_use]
pub fn output_path(job: &ValidJob) -> String {
    match &job.output {
        OutputFile::Claim(claim) => inside(OUTPUT_DIR, &claim.path),
        OutputFile::Object(_) => inside(SCRATCH_DIR, "output.jsonl"),
    }
}

/// Where the assignment stands in every pod of the job: among the parts of its results (docs/results.md).
#[must_use]
pub fn assignment_path(job: &ValidJob, epoch: u32) -> String {
    format!("{}{}", output_path(job), beside_output(job, epoch))
}

fn beside_output(job: &ValidJob, epoch: u32) -> String {
    format!(".parts/{}/plan-{epoch}.assignment", job.uid)
}

/// The object that holds the assignment, where the output is one.
#[must_use]
pub fn assignment_object(job: &ValidJob, epoch: u32) -> Option<BucketObject> {
    objects::output(job).map(|output| objects::told(&objects::beside(output, &beside_output(job, epoch))))
}

fn environment(spec: String, job: &ValidJob) -> Vec<EnvVar> {
    let spec = EnvVar { name: ENV_PLAN_SPEC.into(), value: Some(spec), value_from: None };
    std::iter::once(spec).chain(objects::variables(job)).collect()
}

/// The Job that answers a question.
#[must_use]
pub fn plan_job(ask: &Ask, job: &ValidJob, config: &Config) -> Job {
    let Ask { name, question, runtime: image } = ask;
    let epoch = question.spec.run.epoch;
    let mut labels = build::labels(epoch, job);
    labels.insert(LABEL_TASK.to_owned(), TASK.to_owned());
    let mut pod_labels = job.pod.labels.clone();
    pod_labels.extend(labels.clone());
    let spec = serde_json::to_string(&question.spec).expect("a specification serializes");
    let mut metadata = build::metadata(name.clone(), labels, job);
    metadata.annotations = Some([(ANNOTATION_QUESTION.to_owned(), spec.clone())].into());
    let models: Vec<_> =
        question.artifacts.iter().enumerate().map(|(place, claim)| (model_directory(place), claim)).collect();
    let (volumes, volume_mounts) = build::volumes(&models, job);
    let pod = &job.pod;
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(BACKOFF_LIMIT),
            completions: Some(1),
            parallelism: Some(1),
            // An answer that will not change is given once.
            pod_failure_policy: Some(PodFailurePolicy {
                rules: vec![PodFailurePolicyRule {
                    action: "FailJob".into(),
                    on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
                        container_name: Some(CONTAINER.into()),
                        operator: "In".into(),
                        values: [exit::USAGE, exit::INVALID].map(i32::from).into(),
                    }),
                    on_pod_conditions: None,
                }],
            }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(pod_labels), ..ObjectMeta::default() }),
                spec: Some(PodSpec {
                    restart_policy: Some("Never".into()),
                    automount_service_account_token: Some(false),
                    enable_service_links: Some(false),
                    security_context: Some(build::pod_security()),
                    node_selector: (!pod.node_selector.is_empty()).then(|| pod.node_selector.clone()),
                    tolerations: (!pod.tolerations.is_empty()).then(|| pod.tolerations.clone()),
                    image_pull_secrets: (!pod.image_pull_secrets.is_empty()).then(|| pod.image_pull_secrets.clone()),
                    containers: vec![Container {
                        name: CONTAINER.into(),
                        image: Some(image.image.clone()),
                        image_pull_policy: Some(image.pull_policy.as_str().into()),
                        args: Some(vec!["plan".into()]),
                        env: Some(environment(spec, job)),
                        resources: Some(config.pod_defaults.resources.clone()),
                        termination_message_policy: Some("File".into()),
                        security_context: Some(build::container_security()),
                        volume_mounts: Some(volume_mounts),
                        ..Container::default()
                    }],
                    volumes: Some(volumes),
                    ..PodSpec::default()
                }),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}
