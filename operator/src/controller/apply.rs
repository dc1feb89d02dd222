//! Fifth verb: sends what was built. One of the two writers (the other is `status`).

use crate::controller::build::Prepared;
use joulecast_crds::names::FIELD_MANAGER;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt::Debug;
use thiserror::Error;

/// That everything was sent; made by [`apply`] alone.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Names of the child Jobs that were made, or that were there already.
    pub launched: Vec<String>,
    /// What the API server refused to take, in its words: to be told to the user, and tried again later.
    pub refused: Option<String>,
}

/// The API could not be talked to, or something changed meanwhile: to be tried again soon.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct ApplyError {
    /// What was being sent.
    pub what: String,
    /// Why not.
    #[source]
    pub source: kube::Error,
}

/// What an error of the API asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The object is gone: nothing to do.
    Gone,
    /// The object was changed meanwhile: read again.
    Conflict,
    /// The API server refuses what it was sent: somebody has to change something.
    Refused,
    /// No answer, or one that says to come again.
    Transport,
}

/// Sorts an error by what to do about it.
#[must_use]
pub fn class(error: &kube::Error) -> Class {
    match error {
        kube::Error::Api(status) => match status.code {
            404 | 410 => Class::Gone,
            409 => Class::Conflict,
            // 401: the token is being renewed; 408 and 429: come again.
            401 | 408 | 429 => Class::Transport,
            400..=499 => Class::Refused,
            _ => Class::Transport,
        },
        _ => Class::Transport,
    }
}

/// Sends everything in its order.
///
/// # Errors
/// If the API cannot be reached or an object changed meanwhile. What the API server refuses is no error but part of the
/// result.
pub async fn apply(prepared: &Prepared, client: &Client) -> Result<Applied, ApplyError> {
    // Without `..`: a new part cannot be forgotten here.
    let Prepared { namespace, network_policy, plan, children, child_patches, pod_patches } = prepared;
    let mut applied = Applied::default();
    let mut ready = true;
    if let Some(policy) = network_policy {
        let api: Api<NetworkPolicy> = Api::namespaced(client.clone(), namespace);
        ready = server_side(&api, "NetworkPolicy", policy.metadata.name.as_deref(), policy, &mut applied).await?;
    }
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    if let Some(plan) = plan.as_ref().filter(|_| ready) {
        server_side(&jobs, "Job", plan.metadata.name.as_deref(), plan.as_ref(), &mut applied).await?;
    }
    for child in children.iter().filter(|_| ready) {
        let name = child.metadata.name.as_deref();
        if server_side(&jobs, "Job", name, child, &mut applied).await? {
            applied.launched.extend(name.map(str::to_owned));
        }
    }
    for (name, patch) in child_patches {
        // Not by server-side apply: the template of a Job cannot be changed, and need not be known here any more.
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        let result = jobs.patch(name, &params, &Patch::Merge(patch)).await;
        settle(&format!("Job {name}"), result, &mut applied)?;
    }
    for (name, patch) in pod_patches {
        release(client, namespace, name, patch, &mut applied).await?;
    }
    Ok(applied)
}

/// Takes the report finalizer off a pod; one that is gone needs none.
///
/// # Errors
/// As [`apply`].
pub async fn release(
    client: &Client,
    namespace: &str,
    name: &str,
    patch: &Value,
    applied: &mut Applied,
) -> Result<(), ApplyError> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    settle(&format!("pod {name}"), pods.patch(name, &params, &Patch::Strategic(patch)).await, applied)?;
    Ok(())
}

/// Applies one object; whether it went through.
///
/// # Errors
/// As [`apply`].
pub(crate) async fn server_side<K>(
    api: &Api<K>,
    kind: &str,
    name: Option<&str>,
    object: &K,
    applied: &mut Applied,
) -> Result<bool, ApplyError>
where
    K: Clone + Debug + Serialize + DeserializeOwned,
{
    let name = name.unwrap_or_default();
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let result = api.patch(name, &params, &Patch::Apply(object)).await;
    // Creating an object in a namespace that is gone answers 404, which is a refusal here.
    match result {
        Err(error) if class(&error) == Class::Gone => {
            applied.refused = Some(told(&format!("{kind} {name}"), &error));
            Ok(false)
        }
        other => settle(&format!("{kind} {name}"), other, applied),
    }
}

/// Whether it went through; a refusal is noted, anything else is an error.
pub(crate) fn settle<T>(what: &str, result: Result<T, kube::Error>, applied: &mut Applied) -> Result<bool, ApplyError> {
    match result {
        Ok(_) => Ok(true),
        Err(error) => match class(&error) {
            Class::Gone => Ok(false),
            Class::Refused => {
                tracing::warn!(what, %error, "the API server refused");
                applied.refused = Some(told(what, &error));
                Ok(false)
            }
            Class::Conflict | Class::Transport => Err(ApplyError { what: what.to_owned(), source: error }),
        },
    }
}

fn told(what: &str, error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{what}: {}", status.message),
        other => format!("{what}: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[test]
    fn errors_are_sorted_by_what_to_do_about_them() {
        for (code, expected) in [
            (404, Class::Gone),
            (409, Class::Conflict),
            (422, Class::Refused),
            (403, Class::Refused),
            (401, Class::Transport),
            (429, Class::Transport),
            (500, Class::Transport),
            (503, Class::Transport),
        ] {
            let error = kube::Error::Api(Box::new(Status::failure("no", "Reason").with_code(code)));
            assert_eq!(class(&error), expected, "{code}");
        }
        assert_eq!(class(&kube::Error::Service("cut".into())), Class::Transport);
    }
}
