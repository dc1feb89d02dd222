//! A volume that one node has, as a local disk.

use super::{KEPT, LOST, MACHINES, apply_demo_model, at_work_on, completed, node_ready, whole_cluster};
use anyhow::{Context, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::machines;
use joulecast_tests::job::{await_job, requests, told};
use joulecast_tests::namespace::with_namespace;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

#[tokio::test]
async fn a_volume_that_one_node_has_binds_the_job_to_it_and_the_job_says_so() {
    let _alone = MACHINES.lock().await;
    with_namespace("bound", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        let claim = here.api::<PersistentVolumeClaim>().get("work").await?;
        let volume = claim.spec.and_then(|spec| spec.volume_name).context("not bound")?;
        let volumes: Api<PersistentVolume> = Api::all(here.client.clone());
        let only = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [LOST]}]});
        let affinity = json!({"spec": {"nodeAffinity": {"required": {"nodeSelectorTerms": [only]}}}});
        volumes.patch(&volume, &PatchParams::default(), &Patch::Merge(affinity)).await?;

        at_work_on(&here, LOST, "bound", &requests(400, 128)).await?;
        machines(&["node", LOST, "off"]).await?;
        let waits = await_job(&here, "bound", "bound to a node that is away", |job| {
            told(job, conditions::RUNNING).contains("VolumeBound")
        })
        .await;
        machines(&["node", LOST, "on"]).await?;
        let told = told(&waits?, conditions::RUNNING);
        ensure!(told.contains("bring that node back, or use ReadWriteMany volumes"), "{told}");
        node_ready(&here, LOST).await?;
        let job = completed(&here, "bound", 400).await?;
        let attempts = job.status.context("status")?.attempts;
        let on = |node: &str| attempts.iter().any(|attempt| attempt.node.as_deref() == Some(node));
        ensure!(attempts.len() >= 2 && on(LOST) && !on(KEPT), "{attempts:?}");
        Ok(())
    })
    .await;
}
