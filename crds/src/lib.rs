//! Everything that two processes of Joulecast must agree on: the kinds of the API, the run specification that the
//! operator hands to a runtime pod, the report that comes back, and the names of labels, resources and variables.
//!
//! Invariants: nothing here is async, does IO or talks to a cluster. Floats never stand in the API: energy is an integer
//! of millijoules, fractions and coefficients are strings.
#![forbid(unsafe_code)]
#![allow(clippy::duplicated_attributes, reason = "the derive takes one `printcolumn` per column")]
#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a function, where `pub` reaches nowhere")]

pub mod decimal;
pub mod energy_model;
pub mod engine;
pub mod inference_job;
pub mod inference_model;
pub mod learning;
pub mod names;
pub mod plan_step;
pub mod planned;
pub mod profile_report;
pub mod profile_run;
pub mod report;
pub mod run_spec;
pub mod s3;
mod upstream;

pub use decimal::Decimal;
pub use energy_model::{EnergyModel, EnergyModelSpec, EnergyModelStatus};
pub use engine::{ArtifactFormat, DeviceClass, EngineName, Provider};
pub use inference_job::{InferenceJob, InferenceJobSpec, InferenceJobStatus};
pub use inference_model::{InferenceModel, InferenceModelSpec};
pub use profile_run::{ProfileRun, ProfileRunSpec, ProfileRunStatus};

use kube::CustomResourceExt;

/// One definition per kind, in the order of their file names: (file name below `charts/joulecast/templates/crds`, CRD).
#[must_use]
pub fn definitions()
-> Vec<(&'static str, k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition)> {
    vec![
        ("energymodels", EnergyModel::crd()),
        ("inferencejobs", InferenceJob::crd()),
        ("inferencemodels", InferenceModel::crd()),
        ("profileruns", ProfileRun::crd()),
    ]
}
