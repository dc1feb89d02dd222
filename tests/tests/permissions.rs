//! The operator's permissions, by the audit log of all tests before this one: what it may do it has done, and nothing that it
//! tried was forbidden. Runs last (`make cluster-tests`).
#![allow(missing_docs)]

use anyhow::{Context, Result, ensure};
use joulecast_tests::audit::AuditLog;
use joulecast_tests::cluster::{RELEASE_NAMESPACE, client};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use kube::api::Api;
use std::collections::BTreeSet;

/// (group, resource with its subresource, verb).
type Access = BTreeSet<(String, String, String)>;

fn cells(rules: &[PolicyRule]) -> Access {
    let mut access = Access::new();
    for rule in rules {
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                for verb in &rule.verbs {
                    access.insert((group.clone(), resource.clone(), verb.clone()));
                }
            }
        }
    }
    access
}

#[tokio::test]
async fn the_operator_uses_every_permission_and_is_refused_nothing() {
    let outcome: Result<()> = async {
        let client = client().await?;
        let cluster: Api<ClusterRole> = Api::all(client.clone());
        let own: Api<Role> = Api::namespaced(client, RELEASE_NAMESPACE);
        let mut granted = cells(&cluster.get("joulecast-operator").await?.rules.unwrap_or_default());
        granted.extend(cells(&own.get("joulecast-operator").await?.rules.unwrap_or_default()));

        let began = std::env::var("JOULECAST_TESTS_BEGAN").context(
            "JOULECAST_TESTS_BEGAN is not set: `make cluster-tests` runs this after the tests that use the permissions",
        )?;
        let (mut used, mut forbidden) = (Access::new(), Vec::new());
        for event in AuditLog::of_the_cluster().of_the_operator(&began)? {
            let text = |key: &str| event["objectRef"][key].as_str().unwrap_or_default().to_owned();
            let verb = event["verb"].as_str().unwrap_or_default().to_owned();
            if event["responseStatus"]["code"] == 403
                && event["annotations"]["authorization.k8s.io/decision"] != "allow"
            {
                forbidden.push(format!("{verb} {}", event["requestURI"]));
            }
            if event["objectRef"].is_object() {
                let (resource, subresource) = (text("resource"), text("subresource"));
                let whole = if subresource.is_empty() { resource } else { format!("{resource}/{subresource}") };
                // Server-side apply needs both rights where the object is not there yet.
                if verb == "patch" && event["responseStatus"]["code"] == 201 {
                    used.insert((text("apiGroup"), whole.clone(), "create".into()));
                }
                used.insert((text("apiGroup"), whole, verb));
            }
        }
        ensure!(forbidden.is_empty(), "forbidden to the operator:\n{}", forbidden.join("\n"));
        let unused: Vec<_> = granted.difference(&used).collect();
        ensure!(unused.is_empty(), "granted, and used by no test: {unused:#?}");
        // Discovery needs no right of its own; all else that was used has to stand in the roles.
        let ungranted: Vec<_> = used.difference(&granted).collect();
        ensure!(ungranted.is_empty(), "used without standing in the operator's roles: {ungranted:#?}");
        Ok(())
    }
    .await;
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}
