//! Second verb: what is to be done, over a snapshot. Pure.

use crate::config::{Config, PullPolicy};
use crate::profile_run::finish;
use crate::profile_run::observe::{Snapshot, child_name};
use joulecast_crds::inference_model::{Artifact, ClaimPath};
use joulecast_crds::profile_report::ProfileReport;
use joulecast_crds::{EnergyModel, InferenceModel};
use kube::ResourceExt;
use sha2::{Digest, Sha256};

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// Something has to come first; its word and sentence for a condition.
    Wait {
        /// Word.
        reason: &'static str,
        /// Sentence.
        message: String,
    },
    /// Start to measure.
    Launch(Box<Launch>),
    /// Bring the child's mutable fields up to date.
    Adjust {
        /// Its name.
        name: String,
        /// `spec.suspend`.
        suspend: bool,
    },
    /// It ends in this model.
    Complete {
        /// The model.
        model: Box<EnergyModel>,
        /// What the last pod said.
        report: Box<ProfileReport>,
    },
    /// It ends without.
    Fail {
        /// Word.
        reason: String,
        /// Sentence.
        message: String,
        /// What the last pod said, if it said something.
        report: Option<Box<ProfileReport>>,
    },
}

/// A Job that measures.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Its name.
    pub name: String,
    /// Where the model lies.
    pub artifact: ClaimPath,
    /// Image.
    pub image: String,
    /// When the kubelet pulls it.
    pub pull_policy: PullPolicy,
    /// Seed of the order of points.
    pub seed: i64,
}

/// The seed of a campaign: the one that was asked for, else one made of its UID.
#[must_use]
pub fn seed(snapshot: &Snapshot) -> i64 {
    let stored = snapshot.status().seed;
    snapshot.run.spec.seed.or(stored).unwrap_or_else(|| {
        let digest = Sha256::digest(snapshot.run.uid().unwrap_or_default().as_bytes());
        i64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
    })
}

/// Decides.
#[must_use]
pub fn decide(snapshot: &Snapshot, config: &Config) -> Step {
    let run = &snapshot.run;
    if snapshot.status().completion_time.is_some() {
        return Step::Keep;
    }
    match &snapshot.child {
        Some(child) if !child.ours => Step::Wait {
            reason: "NameTaken",
            message: format!("Job {} belongs to another object: it has to be deleted first", child.name),
        },
        Some(child) if child.deleting => Step::Wait {
            reason: "Deleting",
            message: format!("Job {} is being deleted; it will be created again", child.name),
        },
        Some(child) if child.complete => finish::complete(snapshot),
        Some(child) if child.failed.is_some() => {
            let (word, message) = child.failed.clone().unwrap_or_default();
            finish::failed(snapshot, &word, &message)
        }
        Some(child) if child.suspend != run.spec.suspend => {
            Step::Adjust { name: child.name.clone(), suspend: run.spec.suspend }
        }
        Some(_) => Step::Keep,
        None if run.spec.suspend => Step::Keep,
        // The seed is stored before anything acts on it.
        None if snapshot.status().seed.is_none() => Step::Keep,
        None => launch(snapshot, config),
    }
}

fn launch(snapshot: &Snapshot, config: &Config) -> Step {
    let wait = |reason, message| Step::Wait { reason, message };
    let spec = &snapshot.run.spec;
    let (engine, provider) = (spec.engine, spec.provider);
    if !engine.providers().contains(&provider) {
        return Step::Fail {
            reason: "ProviderUnknown".into(),
            message: format!("engine {engine} has no provider {provider}: make another ProfileRun"),
            report: None,
        };
    }
    let Some(model) = &snapshot.model else {
        let namespace = snapshot.run.namespace().unwrap_or_default();
        let message = format!("InferenceModel {} not found in namespace {namespace}: create it", spec.model.name);
        return wait("ModelMissing", message);
    };
    let Some(artifact) = artifact(model, engine) else {
        let formats = engine.formats().iter().map(|format| format.as_str()).collect::<Vec<_>>().join(", ");
        let message = format!(
            "InferenceModel {} has no artifact in a format that {engine} reads ({formats}): add one",
            spec.model.name
        );
        return wait("ArtifactMissing", message);
    };
    let Some(runtime) = config.runtimes.iter().find(|runtime| runtime.offers(engine, provider)) else {
        let message = format!(
            "no runtime image offers {engine} with provider {provider}: add one under runtimes in the chart's values"
        );
        return wait("ImageMissing", message);
    };
    let class = provider.device_class();
    if !snapshot.classes.contains(&class) {
        return wait("NodeMissing", format!("no node of class {class}"));
    }
    Step::Launch(Box::new(Launch {
        name: child_name(&snapshot.run.name_any()),
        artifact,
        image: runtime.image.clone(),
        pull_policy: runtime.pull_policy,
        seed: seed(snapshot),
    }))
}

/// The model's first artifact in the format that the engine likes best.
fn artifact(model: &InferenceModel, engine: joulecast_crds::EngineName) -> Option<ClaimPath> {
    let of = |format| model.spec.artifacts.iter().find(move |artifact: &&Artifact| artifact.format == format);
    engine.formats().iter().find_map(|format| of(*format)).and_then(|a| a.source.persistent_volume_claim.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples::config;
    use crate::profile_run::samples::{self, Builder};

    fn waits(snapshot: &Snapshot) -> (&'static str, String) {
        match decide(snapshot, &config()) {
            Step::Wait { reason, message } => (reason, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_seed_is_stored_before_anything_is_started() {
        let new = Builder::new().build();
        assert_eq!(decide(&new, &config()), Step::Keep);
        let made = seed(&new);
        let stored = Builder::new().seeded(made).build();
        let Step::Launch(launch) = decide(&stored, &config()) else { panic!() };
        assert_eq!((launch.name.as_str(), launch.seed), ("grid-profile", made));
        let given = Builder::new().spec(|spec| spec.seed = Some(7)).seeded(7).build();
        assert_eq!(seed(&given), 7);
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut snapshot = Builder::new().seeded(1).build();
        snapshot.model = None;
        assert!(waits(&snapshot).1.contains("InferenceModel demo not found in namespace team"));
        let mut snapshot = Builder::new().seeded(1).build();
        snapshot.classes.clear();
        assert_eq!(waits(&snapshot), ("NodeMissing", "no node of class cpu".into()));
        let onnx = Builder::new().seeded(1).spec(|spec| spec.engine = joulecast_crds::EngineName::Onnx).build();
        assert_eq!(waits(&onnx).0, "ArtifactMissing");
        let cuda = Builder::new().seeded(1).spec(|spec| spec.provider = joulecast_crds::Provider::Cuda).build();
        assert_eq!(waits(&cuda).0, "ImageMissing");
        let odd = Builder::new().seeded(1).spec(|spec| spec.provider = joulecast_crds::Provider::Openvino).build();
        assert!(matches!(decide(&odd, &config()), Step::Fail { .. }));
    }

    #[test]
    fn pausing_and_going_on_changes_the_child() {
        let paused = Builder::new().seeded(1).spec(|spec| spec.suspend = true);
        assert_eq!(decide(&paused.build(), &config()), Step::Keep, "nothing was started yet");
        let running = Builder::new().seeded(1).spec(|spec| spec.suspend = true).child(|_| ()).build();
        assert!(matches!(decide(&running, &config()), Step::Adjust { suspend: true, .. }));
        let going_on = Builder::new().seeded(1).child(|child| child.suspend = true).build();
        assert!(matches!(decide(&going_on, &config()), Step::Adjust { suspend: false, .. }));
        let foreign = Builder::new().seeded(1).child(|child| child.ours = false).build();
        assert_eq!(waits(&foreign).0, "NameTaken");
    }

    #[test]
    fn a_finished_child_ends_the_campaign() {
        let report = serde_json::to_string(&samples::report()).unwrap();
        let complete = Builder::new().seeded(1).child(|child| child.complete = true).pod(0, &report).build();
        let Step::Complete { model, .. } = decide(&complete, &config()) else { panic!() };
        assert_eq!(model.spec.key.model, "demo");
        let lost = Builder::new().seeded(1).child(|child| child.complete = true).build();
        let Step::Fail { reason, message, .. } = decide(&lost, &config()) else { panic!() };
        assert!(reason == "ReportMissing" && message.contains("samples"), "{message}");
        let mut failed = samples::report();
        failed.fit = None;
        failed.failure =
            Some(joulecast_crds::report::Failure { reason: "ModelInvalid".into(), message: "broken".into() });
        let failed = Builder::new()
            .seeded(1)
            .child(|child| child.failed = Some(("PodFailurePolicy".into(), "exit code 78".into())))
            .pod(78, &serde_json::to_string(&failed).unwrap())
            .build();
        let Step::Fail { reason, message, .. } = decide(&failed, &config()) else { panic!() };
        assert!(reason == "ModelInvalid" && message.contains("broken"), "{reason}: {message}");
    }
}
