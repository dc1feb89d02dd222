//! A drifted EnergyModel is measured again, where the ProfileRun that it comes from asks for that (`onDrift: MeasureAgain`).
//!
//! Decided from what is stored alone: a model whose condition Drifted is true, its ProfileRun, and that there is none yet of
//! the name that the next one has. So it is created once for each fit, whatever restarts.

use crate::controller::Context;
use crate::controller::apply::{Applied, server_side};
use crate::energy_model::select::is_drifted;
use joulecast_crds::profile_run::OnDrift;
use joulecast_crds::{EnergyModel, ProfileRun, ProfileRunSpec};
use kube::api::ObjectMeta;
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Api, Resource, ResourceExt};
use std::collections::BTreeMap;

/// Longest name of a ProfileRun.
const NAME_CHARS: usize = 52;

/// Creates the ProfileRuns that drifted models ask for; whether all that were to be created were.
pub async fn pass(context: &Context, runs: &Store<ProfileRun>) -> bool {
    let mut all = true;
    for model in context.caches.energy_models.state() {
        let Some(origin) = origin(&model, runs) else { continue };
        let Some(next) = again(&model, &origin) else { continue };
        let namespace = origin.namespace().unwrap_or_default();
        if runs.get(&ObjectRef::new(&next.name_any()).within(&namespace)).is_none() {
            all &= create(&model, &namespace, &next, context).await;
        }
    }
    all
}

/// The campaign that a model comes from, if it is still there.
fn origin(model: &EnergyModel, runs: &Store<ProfileRun>) -> Option<std::sync::Arc<ProfileRun>> {
    let of = model.spec.provenance.profile_run.as_ref()?;
    runs.get(&ObjectRef::new(&of.name).within(&of.namespace)).filter(|run| run.uid().as_ref() == Some(&of.uid))
}

/// The campaign that follows one whose model has drifted, if it asks for that. Its name tells the generation of the drifted
/// fit, its samples lie beside the old ones: those are of a time when the model held.
fn again(model: &EnergyModel, origin: &ProfileRun) -> Option<ProfileRun> {
    // Right after a new fit the status still speaks of the old one.
    let of_this_fit = model.status.as_ref().is_some_and(|s| s.observed_generation == model.metadata.generation);
    let asked = origin.spec.on_drift == OnDrift::MeasureAgain && model.metadata.deletion_timestamp.is_none();
    if !(asked && of_this_fit && is_drifted(model)) {
        return None;
    }
    let mark = format!("-g{}", model.metadata.generation?);
    let mut spec = ProfileRunSpec {
        energy_model_name: model.metadata.name.clone(),
        // Another order of points, and another set of prompts.
        seed: None,
        suspend: false,
        ..origin.spec.clone()
    };
    let path = &mut spec.samples.persistent_volume_claim.path;
    let (folder, file) = path.rsplit_once('/').map_or((None, path.as_str()), |(folder, file)| (Some(folder), file));
    let (stem, extension) = file.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).unwrap_or((file, "csv"));
    let file = format!("{}{mark}.{extension}", unmarked(stem));
    *path = folder.map_or_else(|| file.clone(), |folder| format!("{folder}/{file}"));
    let name = origin.name_any();
    let head: String = unmarked(&name).chars().take(NAME_CHARS - mark.len()).collect();
    let mut next = ProfileRun::new(&format!("{}{mark}", head.trim_end_matches(['-', '.'])), spec);
    let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "joulecast-operator".to_owned())]);
    next.metadata = ObjectMeta { namespace: origin.namespace(), labels: Some(labels), ..next.metadata };
    Some(next)
}

/// A name without the mark of an earlier drift.
fn unmarked(name: &str) -> &str {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.rsplit_once("-g").filter(|(_, generation)| digits(generation)).map_or(name, |(head, _)| head)
}

async fn create(model: &EnergyModel, namespace: &str, next: &ProfileRun, context: &Context) -> bool {
    let api: Api<ProfileRun> = Api::namespaced(context.client.clone(), namespace);
    let (name, mut applied) = (next.name_any(), Applied::default());
    match server_side(&api, "ProfileRun", Some(&name), next, &mut applied).await {
        Ok(true) => {}
        Ok(false) => {
            tracing::warn!(name, refused = applied.refused, "a drifted EnergyModel cannot be measured again");
            return false;
        }
        Err(error) => {
            tracing::warn!(name, %error, "a drifted EnergyModel cannot be measured again; trying again");
            return false;
        }
    }
    tracing::info!(name, namespace, model = model.name_any(), "a drifted EnergyModel is measured again");
    let event = Event {
        type_: EventType::Normal,
        reason: "MeasuredAgain".into(),
        note: Some(format!("ProfileRun {namespace}/{name} measures again, because this model has drifted")),
        action: "Remeasure".into(),
        secondary: Some(next.object_ref(&())),
    };
    if let Err(error) = context.recorder.publish(&event, &model.object_ref(&())).await {
        tracing::warn!(%error, "an event could not be written");
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy_model::samples::energy_model;
    use crate::profile_run::samples::profile_run;
    use joulecast_crds::energy_model::{EnergyModelStatus, ProfileRunReference, conditions};
    use serde_json::json;

    fn drifted(origin: &ProfileRun) -> EnergyModel {
        let mut model = energy_model();
        model.spec.provenance.profile_run = Some(ProfileRunReference {
            namespace: origin.namespace().unwrap(),
            name: origin.name_any(),
            uid: origin.uid().unwrap(),
        });
        let condition = json!({"type": conditions::DRIFTED, "status": "True", "reason": "RunsDiffer", "message": "",
            "lastTransitionTime": "2027-01-15T08:00:00Z"});
        let conditions = vec![serde_json::from_value(condition).unwrap()];
        let observed_generation = model.metadata.generation;
        model.status = Some(EnergyModelStatus { conditions, observed_generation, ..EnergyModelStatus::default() });
        model
    }

    fn asking() -> ProfileRun {
        let mut run = profile_run();
        run.spec.on_drift = OnDrift::MeasureAgain;
        run
    }

    #[test]
    fn a_drift_is_followed_by_a_like_campaign_with_samples_of_its_own() {
        let origin = asking();
        let next = again(&drifted(&origin), &origin).unwrap();
        assert_eq!((next.name_any().as_str(), next.namespace().as_deref()), ("grid-g3", Some("team")));
        assert_eq!(next.spec.samples.persistent_volume_claim.path, "grid-g3.csv");
        assert_eq!(next.spec.energy_model_name.as_deref(), Some("demo-candle-cpu"));
        assert_eq!((&next.spec.grid, next.spec.on_drift), (&origin.spec.grid, OnDrift::MeasureAgain));
    }

    #[test]
    fn names_do_not_grow_from_drift_to_drift() {
        let mut origin = asking();
        origin.metadata.name = Some(format!("{}-g3", "m".repeat(49)));
        origin.spec.samples.persistent_volume_claim.path = "profiles.d/grid-g3".into();
        let mut model = drifted(&origin);
        assert_eq!(again(&model, &origin).unwrap().name_any(), origin.name_any(), "one campaign for each fit");
        model.metadata.generation = Some(12);
        assert_eq!(again(&model, &origin), None, "a new fit has not drifted yet");
        model.status.as_mut().unwrap().observed_generation = Some(12);
        let next = again(&model, &origin).unwrap();
        assert_eq!(next.name_any(), format!("{}-g12", "m".repeat(48)));
        assert_eq!(next.spec.samples.persistent_volume_claim.path, "profiles.d/grid-g12.csv");
        assert_eq!((unmarked("a-gb"), unmarked("a-g"), unmarked("a-g1")), ("a-gb", "a-g", "a"));
    }

    #[test]
    fn nothing_follows_where_nobody_asked_or_the_model_holds() {
        let origin = profile_run();
        assert_eq!(again(&drifted(&origin), &origin), None);
        let origin = asking();
        let mut model = drifted(&origin);
        model.status.as_mut().unwrap().conditions[0].status = "False".into();
        assert_eq!(again(&model, &origin), None);
    }
}
