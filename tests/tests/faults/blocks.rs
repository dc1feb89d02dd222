//! Several pods, each with a block of the lines.

use super::{KEPT, LOST, MACHINES, apply_demo_model, completed, shoot, small, whole_cluster};
use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::{Attempt, Outcome};
use joulecast_tests::job::{apply_job, await_job, lines_done, request, requests, results};
use joulecast_tests::namespace::with_namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::json;
use std::collections::BTreeSet;

/// The attempts at a block in an epoch: how each ended.
fn outcomes(attempts: &[Attempt], epoch: i32, configuration: i32, shard: i32) -> Vec<Option<Outcome>> {
    let of = |one: &&Attempt| (one.epoch, one.configuration, one.shard) == (epoch, configuration, shard);
    attempts.iter().filter(of).map(|attempt| attempt.outcome).collect()
}

/// The energy of the job is that of its attempts, and none is missing.
fn ensure_all_counted(job: &InferenceJob, attempts: usize) -> Result<()> {
    let status = job.status.as_ref().context("status")?;
    let measured = status.measured.as_ref().context("measured")?;
    let known = measured.attempts + measured.attempts_from_journal;
    ensure!(known as usize == attempts && measured.attempts_without_report == 0, "{measured:?}");
    let each: Vec<i64> = status.attempts.iter().filter_map(|attempt| attempt.energy_millijoules).collect();
    ensure!(each.len() == attempts && measured.energy_millijoules == Some(each.iter().sum()), "{:?}", status.attempts);
    Ok(())
}

#[tokio::test]
async fn of_several_pods_the_one_that_is_lost_is_repeated_alone() {
    let _alone = MACHINES.lock().await;
    with_namespace("blocks", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        apply_job(&here, "blocks", &requests(600, 128), small(json!({"parallelism": 2}))).await?;
        await_job(&here, "blocks", "at work", |job| lines_done(job) > 10).await?;
        let pods: Api<Pod> = here.api();
        let of_job = ListParams::default().labels("joulecast.dev/inference-job=blocks");
        let all = pods.list(&of_job).await?.items;
        let nodes: BTreeSet<_> = all.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref()).collect();
        ensure!(nodes == BTreeSet::from([KEPT, LOST]), "the pods are on {nodes:?}");
        let second =
            |pod: &&Pod| pod.metadata.labels.as_ref().is_some_and(|labels| labels["joulecast.dev/shard"] == "1");
        shoot(all.iter().find(second).context("no pod of the second block")?).await?;
        let job = completed(&here, "blocks", 600).await?;
        let attempts = &job.status.as_ref().context("status")?.attempts;
        ensure!(outcomes(attempts, 1, 0, 0) == [Some(Outcome::Succeeded)], "{attempts:?}");
        let second = [Some(Outcome::InfrastructureFailed), Some(Outcome::Succeeded)];
        ensure!(outcomes(attempts, 1, 0, 1) == second, "{attempts:?}");
        ensure!(outcomes(attempts, 1, 1, 0) == [Some(Outcome::Succeeded)], "the merge: {attempts:?}");
        ensure_all_counted(&job, 4)
    })
    .await;
}

#[tokio::test]
async fn the_rest_of_a_slow_block_is_divided_among_all_pods() {
    let _alone = MACHINES.lock().await;
    const LINES: usize = 600;
    const LONG: u32 = 200;
    with_namespace("straggler", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        // The second half takes far longer than the first.
        let tokens = |number: usize| if number < LINES / 2 { 4 } else { LONG };
        let line =
            |number| request(&format!("r-{number}"), &format!("fn f{number}(x: u32) -> u32 {{\n"), tokens(number));
        let input: String = (0..LINES).map(|number| line(number) + "\n").collect();
        apply_job(&here, "halves", &input, small(json!({"parallelism": 2}))).await?;
        let divided = await_job(&here, "halves", "divided anew", |job| {
            job.status.as_ref().and_then(|status| status.plan.as_ref()).is_some_and(|plan| plan.epoch == 2)
        })
        .await?;
        let rest = divided.status.and_then(|status| status.plan?.rest).context("rest")?;
        ensure!((rest.epoch, rest.configuration, rest.shard) == (1, 0, 1) && rest.from_line > 0, "{rest:?}");

        let job = completed(&here, "halves", LINES).await?;
        let status = job.status.as_ref().context("status")?;
        let attempts = &status.attempts;
        ensure!(outcomes(attempts, 1, 0, 0) == [Some(Outcome::Succeeded)], "{attempts:?}");
        ensure!(outcomes(attempts, 1, 0, 1) == [Some(Outcome::Stopped)], "the slow one: {attempts:?}");
        for shard in [0, 1] {
            ensure!(outcomes(attempts, 2, 0, shard) == [Some(Outcome::Succeeded)], "{attempts:?}");
        }
        ensure!(outcomes(attempts, 2, 1, 0) == [Some(Outcome::Succeeded)], "the merge: {attempts:?}");
        ensure_all_counted(&job, 5)?;
        ensure!(status.failures.is_none(), "{:?}", status.failures);
        // The slow pod goes on until it is told; what it does then is done twice.
        let written: i64 = results(&here, "halves")
            .await?
            .iter()
            .filter_map(|line| line["response"]["body"]["usage"]["completion_tokens"].as_i64())
            .sum();
        let computed = status.measured.as_ref().context("measured")?.tokens_out;
        ensure!(computed - written <= 4 * i64::from(LONG), "{computed} tokens for {written}");
        println!(
            "straggler: {} of {} lines were left; {} tokens were computed twice",
            LINES as i64 / 2 - rest.from_line,
            LINES / 2,
            computed - written
        );
        Ok(())
    })
    .await;
}
