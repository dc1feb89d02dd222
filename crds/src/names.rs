//! Names that manifests, scripts and other processes hold on to. Changing one is an API change.

/// API group of all kinds.
pub const GROUP: &str = "joulecast.dev";
/// Field manager of everything that the operator applies.
pub const FIELD_MANAGER: &str = "joulecast-operator";

/// Node label: `cpu` or `cuda`; a node without it counts as `cpu`.
pub const LABEL_DEVICE_CLASS: &str = "joulecast.dev/device-class";
/// Node label: which meter the node has (`rapl`, `nvml`, `none`).
pub const LABEL_METER: &str = "joulecast.dev/meter";
/// Node label: model of the CPU, in label characters.
pub const LABEL_CPU_MODEL: &str = "joulecast.dev/cpu-model";
/// Node label: product name of the GPU, in label characters.
pub const LABEL_GPU_PRODUCT: &str = "joulecast.dev/gpu-product";

/// Node annotation: power of the node's metered domains when idle, in milliwatts; absent until it was measured.
pub const ANNOTATION_IDLE_MILLIWATTS: &str = "joulecast.dev/idle-milliwatts";
/// Node annotation: design power of the node's packages, in milliwatts; absent where the kernel does not tell it.
pub const ANNOTATION_MAX_MILLIWATTS: &str = "joulecast.dev/max-milliwatts";

/// Label of child objects: name of the InferenceJob that they belong to.
pub const LABEL_JOB: &str = "joulecast.dev/inference-job";
/// Label of child objects: UID of the InferenceJob that they belong to, which tells a job from one of the same name.
pub const LABEL_JOB_UID: &str = "joulecast.dev/inference-job-uid";
/// Label of child objects: the plan's epoch, a number that grows with every plan of the job.
pub const LABEL_EPOCH: &str = "joulecast.dev/epoch";
/// Label of child objects: index of the chosen configuration in `status.plan.chosen`.
pub const LABEL_CONFIGURATION: &str = "joulecast.dev/configuration";
/// Label of what measures for a ProfileRun: its name.
pub const LABEL_PROFILE_RUN: &str = "joulecast.dev/profile-run";
/// Label of what measures for a ProfileRun: its UID.
pub const LABEL_PROFILE_RUN_UID: &str = "joulecast.dev/profile-run-uid";
/// Label of child objects: index of the block of lines, where a configuration has several pods; one without it is of block 0.
pub const LABEL_SHARD: &str = "joulecast.dev/shard";
/// Label of child objects: number of the attempt, from 1; one without it is a first attempt.
pub const LABEL_ATTEMPT: &str = "joulecast.dev/attempt";
/// Label of child objects: what they do, `plan`, `run` or `merge`; one without it is a `run`.
pub const LABEL_TASK: &str = "joulecast.dev/task";

/// Label of an InferenceJob that is to be planned and never started, `true`: what `joulecast plan -f` creates.
pub const LABEL_PLAN_ONLY: &str = "joulecast.dev/plan-only";

/// Finalizer of runtime pods: the operator removes it once the pod's report is in the status of its job.
pub const FINALIZER_REPORT: &str = "joulecast.dev/report";

/// Extended resource: one slot is one CPU package, the meter's domain.
pub const RESOURCE_CPU: &str = "joulecast.dev/cpu";
/// Extended resource: one slot is one GPU or one MIG instance.
pub const RESOURCE_CUDA: &str = "joulecast.dev/cuda";

/// Variable that the node agent sets in a container that holds a slot: path of the slot's metering socket.
pub const ENV_METER_SOCKET: &str = "JOULECAST_METER_SOCKET";
/// Variable that the node agent sets in a container that holds a CPU slot: the CPUs of its package, as a hint (`0-3,8`).
pub const ENV_SLOT_CPUS: &str = "JOULECAST_SLOT_CPUS";

/// Variable that carries the run specification as JSON into a runtime pod.
pub const ENV_RUN_SPEC: &str = "JOULECAST_RUN_SPEC";
/// Variable that carries the plan specification as JSON into a plan pod.
pub const ENV_PLAN_SPEC: &str = "JOULECAST_PLAN_SPEC";
/// Variable that carries the secret of the run's progress endpoint into a runtime pod.
pub const ENV_PROGRESS_TOKEN: &str = "JOULECAST_PROGRESS_TOKEN";
/// Variable that carries the pod's own name (from `metadata.name`) into a runtime pod: it tells attempts apart. The host
/// name does not: all pods of one index of an indexed Job have the same.
pub const ENV_POD_NAME: &str = "JOULECAST_POD_NAME";
/// Variable that tells a pod the index of its block of lines, by the name that it has in the pods of indexed Jobs.
pub const ENV_COMPLETION_INDEX: &str = "JOB_COMPLETION_INDEX";
/// Variables that carry the keys of buckets into runtime pods: access key id, secret access key and, where the key is of a
/// session, its token.
pub mod bucket_variables {
    /// Of the bucket that holds the requests.
    pub const INPUT: [&str; 3] =
        ["JOULECAST_INPUT_ACCESS_KEY_ID", "JOULECAST_INPUT_SECRET_ACCESS_KEY", "JOULECAST_INPUT_SESSION_TOKEN"];
    /// Of the bucket that is to hold the results.
    pub const OUTPUT: [&str; 3] =
        ["JOULECAST_OUTPUT_ACCESS_KEY_ID", "JOULECAST_OUTPUT_SECRET_ACCESS_KEY", "JOULECAST_OUTPUT_SESSION_TOKEN"];
    /// The keys of a Secret that hold them, in the same order; the last one may be missing.
    pub const SECRET_KEYS: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
}
/// Port of a runtime pod on which `/progress` and `/metrics` answer.
pub const PROGRESS_PORT: u16 = 9100;
/// Name of the only container of a runtime pod.
pub const CONTAINER: &str = "runtime";
/// Longest termination message that the kubelet keeps, in bytes.
pub const TERMINATION_MESSAGE_BYTES: usize = 4096;

/// Exit codes of `joulecast-runtime`, which the operator reads to tell what to do about a failure.
pub mod exit {
    /// All lines have a result (failed lines included).
    pub const DONE: u8 = 0;
    /// A failure of the run that another attempt may not repeat (IO error, engine failure).
    pub const FAILED: u8 = 1;
    /// Wrong command line.
    pub const USAGE: u8 = 2;
    /// The device went away under the run (a GPU that fell off the bus): another node may do better.
    pub const DEVICE_LOST: u8 = 75;
    /// The run can never work as specified: missing model, unreadable input, engine not in this build.
    pub const INVALID: u8 = 78;
    /// Stopped before all lines had a result, with a report: on request (SIGTERM; the requests in flight were finished as
    /// far as they fitted into the grace period), or because a newer attempt took over (reason `Superseded`).
    pub const STOPPED: u8 = 143;
}
