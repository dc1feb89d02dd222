//! Keeps the status of all EnergyModels: the one writer of it. Woken by every change of an EnergyModel or a job; what it
//! writes is a function of both, so a pass that finds nothing new writes nothing.

use crate::controller::Context;
use crate::controller::apply::{Class, class};
use crate::energy_model::learn::{Learned, learn};
use crate::energy_model::remeasure;
use joulecast_crds::learning::FinishedRun;
use joulecast_crds::names::FIELD_MANAGER;
use joulecast_crds::{EnergyModel, InferenceJob, ProfileRun};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::Store;
use kube::{Api, Resource};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// Shortest time between two passes: jobs change with every progress that is written.
const PAUSE: Duration = Duration::from_secs(1);
/// When is tried again what could not be written.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps for ever, woken by `changes`; `runs` are the ProfileRuns, once they were listed.
pub async fn keep_learning(context: Arc<Context>, runs: Store<ProfileRun>, changes: Arc<Notify>) {
    if !context.caches.ready().await || runs.wait_until_ready().await.is_err() {
        return;
    }
    loop {
        let written = pass(&context).await & remeasure::pass(&context, &runs).await;
        tokio::time::sleep(PAUSE).await;
        if written {
            changes.notified().await;
        } else {
            let _ = tokio::time::timeout(AGAIN, changes.notified()).await;
        }
    }
}

/// Brings every model's status up to date; whether all that was to be written was.
pub async fn pass(context: &Context) -> bool {
    let jobs = context.caches.jobs.state();
    let names: Vec<String> = jobs.iter().map(|job| name_of(job)).collect();
    let runs = || -> Vec<(&str, &FinishedRun)> {
        names
            .iter()
            .zip(&jobs)
            .flat_map(|(name, job)| {
                job.status.iter().flat_map(|s| &s.finished_runs).map(move |run| (name.as_str(), run))
            })
            .collect()
    };
    let mut all = true;
    for model in context.caches.energy_models.state() {
        if model.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let learned = learn(&model, runs(), &context.config.energy_models.learn_from, (context.clock)());
        all &= write(&model, learned, context).await;
    }
    all
}

fn name_of(job: &InferenceJob) -> String {
    let meta = &job.metadata;
    format!("{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// Writes a status if it differs from the stored one, and tells of what is new in it.
async fn write(model: &EnergyModel, learned: Learned, context: &Context) -> bool {
    let Learned { status, new_reports, drifted } = learned;
    if model.status.as_ref() == Some(&status) {
        return true;
    }
    let meta = &model.metadata;
    let name = meta.name.clone().unwrap_or_default();
    let api: Api<EnergyModel> = Api::all(context.client.clone());
    let patch = json!({
        "apiVersion": EnergyModel::api_version(&()),
        "kind": EnergyModel::kind(&()),
        "metadata": {"name": name, "uid": meta.uid, "resourceVersion": meta.resource_version},
        "status": status,
    });
    match api.patch_status(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(patch)).await {
        Ok(_) => {}
        Err(error) => match class(&error) {
            Class::Gone => return true,
            Class::Conflict => return false,
            Class::Refused | Class::Transport => {
                tracing::warn!(name, %error, "the status of an EnergyModel could not be written; trying again");
                return false;
            }
        },
    }
    if new_reports > 0 {
        tracing::info!(name, new_reports, "an EnergyModel has learned");
    }
    if let Some(note) = drifted {
        let event = Event {
            type_: EventType::Warning,
            reason: "Drifted".into(),
            note: Some(note),
            action: "Learn".into(),
            secondary: None,
        };
        if let Err(error) = context.recorder.publish(&event, &model.object_ref(&())).await {
            tracing::warn!(%error, "an event could not be written");
        }
    }
    true
}
