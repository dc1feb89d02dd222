//! Jobs that reality leaves the plan of, on two nodes: a class of nodes that is lost and one that appears, and a model that takes
//! longer than was predicted; and jobs that need the same class. Needs the local cluster with the nodes cpu-0 and gpu-0, Joulecast with
//! `retries.unreachableSeconds=5`, and a runtime whose `cuda` provider is a double (`make replanning` provides all of it). One
//! test at a time: each changes what the nodes are.
#![allow(missing_docs, clippy::print_stdout, reason = "how long something took is worth reading")]

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::{Outcome, Plan, conditions};
use joulecast_crds::planned::{ReplanOutcome, ReplanReason};
use joulecast_crds::{DeviceClass, EnergyModel, InferenceJob};
use joulecast_tests::agent::upgrade;
use joulecast_tests::cluster::{RELEASE_NAMESPACE, machines, user_runs, user_tries};
use joulecast_tests::job::{apply_input, apply_job, await_job, is_true, lines_done, manifest, request, results, told};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// Serialises the tests of this file.
static MACHINES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Tokens of requests that are cheaper on the first node, and on the second.
const SHORT: u32 = 60;
const LONG: u32 = 128;

const LOST: &str = "gpu-0";
const CLASS: &str = "joulecast.dev/device-class";

/// Both nodes are there, and Joulecast knows a runtime for the class `cuda`, of which no node is.
async fn prepared() -> Result<()> {
    machines(&["up", "--nodes", "2"]).await?;
    user_runs("kubectl", &["label", "node", LOST, &format!("{CLASS}-")], None).await?;
    let image = std::env::var("JOULECAST_TEST_CUDA_RUNTIME_IMAGE").context("run it by `make replanning`")?;
    upgrade(&[
        format!("extraRuntimes[0].image={image}"),
        "extraRuntimes[0].engines={candle}".into(),
        "extraRuntimes[0].providers={cuda}".into(),
        // A plan pod has those of the release; they have to fit beside the runs.
        "runtime.resources.requests.cpu=200m".into(),
        "runtime.resources.requests.memory=256Mi".into(),
        "retries.strandedSeconds=3".into(),
        "retries.replanSeconds=5".into(),
    ])
    .await?;
    let deployment = ["rollout", "status", "deployment/joulecast-operator", "-n", RELEASE_NAMESPACE, "--timeout=120s"];
    user_runs("kubectl", &deployment, None).await?;
    Ok(())
}

/// The second node is of class `cuda` from now on, with a slot for each of so many pods.
async fn becomes_cuda(here: &TestNamespace, slots: u32) -> Result<()> {
    let nodes: Api<Node> = Api::all(here.client.clone());
    let slots = json!({"joulecast.dev/cuda": slots.to_string()});
    let slots = json!({"status": {"capacity": slots, "allocatable": slots}});
    nodes.patch_status(LOST, &PatchParams::default(), &Patch::Merge(slots)).await?;
    user_runs("kubectl", &["label", "node", LOST, &format!("{CLASS}=cuda"), "--overwrite"], None).await?;
    Ok(())
}

/// A model over the demo's files, whose name bears the namespace's, since EnergyModels belong to none.
async fn model(here: &TestNamespace, name: &str) -> Result<String> {
    let name = format!("{name}-{}", here.name);
    let model = json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceModel", "metadata": {"name": name},
        "spec": {"artifacts": [{"format": "safetensors", "source": {"persistentVolumeClaim": {"claimName": "models", "path": "demo"}}}]},
    });
    here.apply(&model.to_string()).await?;
    Ok(name)
}

/// What a model is predicted to take on a provider: (constant, for each generated token), in joules and in seconds.
async fn predict(model: &str, provider: &str, joules: (f64, f64), seconds: (f64, f64)) -> Result<()> {
    let quantity = |(fixed, tout): (f64, f64)| json!({"terms": {"const": fixed.to_string(), "tout": tout.to_string()}, "family": "linear", "sampleCount": 10});
    let range = json!({"min": 1, "max": 4096});
    let energy_model = json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "EnergyModel", "metadata": {"name": format!("{model}-{provider}")},
        "spec": {
            "key": {"model": model, "engine": "candle", "provider": provider, "deviceClass": provider, "batch": 1},
            "fit": {
                "energy": quantity(joules), "runtime": quantity(seconds), "samples": 10,
                "domain": {"tokensIn": range, "tokensOut": range, "batch": {"min": 1, "max": 1}},
            },
            "provenance": {"source": "Modelled", "meter": "made up for this test"},
            "fittedAt": "2026-01-01T00:00:00Z",
        },
    });
    user_runs("kubectl", &["apply", "-f", "-"], Some(&energy_model.to_string())).await?;
    Ok(())
}

async fn forget(here: &TestNamespace, models: &[&str]) -> Result<()> {
    let api: Api<EnergyModel> = Api::all(here.client.clone());
    for model in models {
        api.delete(model, &DeleteParams::default()).await?;
    }
    Ok(())
}

/// Half a CPU, so that several fit onto half a machine of two cores.
fn spec(models: &[&str]) -> Value {
    let amounts = json!({"cpu": "400m", "memory": "512Mi"});
    let models: Vec<Value> = models.iter().map(|name| json!({"name": name})).collect();
    json!({"models": models, "podTemplate": {"resources": {"requests": amounts, "limits": {"cpu": "1", "memory": "1Gi"}}}})
}

/// Requests that generate as many tokens as they allow, by line.
fn input(lines: usize, tokens: impl Fn(usize) -> u32) -> String {
    let line = |number| request(&format!("r-{number}"), &format!("fn f{number}(x: u32) -> u32 {{\n"), tokens(number));
    (0..lines).map(|number| line(number) + "\n").collect()
}

fn plan(job: &InferenceJob) -> Option<&Plan> {
    job.status.as_ref()?.plan.as_ref()
}

/// The assignment of a plan as it lies beside the output; nothing if all lines were the first configuration's.
async fn assignment(here: &TestNamespace, job: &InferenceJob, epoch: i32) -> Result<Option<Vec<u8>>> {
    let claim = here.api::<PersistentVolumeClaim>().get("work").await?;
    let volume = claim.spec.and_then(|spec| spec.volume_name).context("not bound")?;
    let volume = Api::<PersistentVolume>::all(here.client.clone()).get(&volume).await?;
    let path = volume.spec.and_then(|spec| spec.host_path).context("no hostPath")?.path;
    let (name, uid) = (job.name_any(), job.uid().context("UID")?);
    let file = PathBuf::from(path).join(format!("{name}.jsonl.parts/{uid}/plan-{epoch}.assignment"));
    Ok(if file.exists() { Some(std::fs::read(file)?) } else { None })
}

/// Every line has one result, in order; it was computed by the configuration that the assignment of its plan gives it to, and
/// what had a result when the second plan was made was not computed under it. How many lines are of the first plan.
async fn ensure_each_ran_where_it_was_placed(here: &TestNamespace, job: &InferenceJob, lines: usize) -> Result<usize> {
    const HAD_A_RESULT: u8 = 255;
    let first = assignment(here, job, 1).await?.unwrap_or_else(|| vec![0; lines]);
    let second = assignment(here, job, 2).await?.context("no second assignment")?;
    let found = results(here, &job.name_any()).await?;
    ensure!((first.len(), second.len(), found.len()) == (lines, lines, lines), "{} results", found.len());
    let mut of_the_first = 0;
    for (number, line) in found.iter().enumerate() {
        ensure!(line["custom_id"] == format!("r-{number}"), "line {number} is {}", line["custom_id"]);
        // PREFIX-eEPOCH-cCONFIGURATION-sSHARD-POD-LINE
        let id = line["response"]["body"]["id"].as_str().context("no id")?;
        let mut words = id.split('-').skip_while(|word| !["e1", "e2"].contains(word));
        let (epoch, configuration) = (words.next().context("epoch")?, words.next().context("configuration")?);
        let placed = if epoch == "e1" { first[number] } else { second[number] };
        ensure!(configuration == format!("c{placed}"), "line {number} was given to {placed}, and is {id}");
        ensure!(epoch == "e1" || second[number] != HAD_A_RESULT, "line {number} was computed anew: {id}");
        of_the_first += usize::from(epoch == "e1");
    }
    let finished = second.iter().filter(|byte| **byte == HAD_A_RESULT).count();
    let solved = plan(job).and_then(|plan| plan.solved.as_ref()).context("solved")?;
    ensure!(solved.finished == i64::try_from(finished)?, "{finished} in the file, {solved:?}");
    ensure!(finished <= of_the_first && of_the_first < lines, "{finished} finished, {of_the_first} of the first plan");
    Ok(of_the_first)
}

async fn replanned(here: &TestNamespace, name: &str, reason: ReplanReason) -> Result<InferenceJob> {
    await_job(here, name, "planned anew", |job| {
        plan(job)
            .and_then(|plan| plan.replan.as_ref())
            .is_some_and(|replan| replan.reason == reason && replan.outcome.is_some())
    })
    .await
}

async fn completed(here: &TestNamespace, name: &str) -> Result<InferenceJob> {
    await_job(here, name, "Complete", |job| is_true(job, conditions::COMPLETE)).await
}

/// The energy of a finished job is that of its attempts.
fn ensure_all_counted(job: &InferenceJob) -> Result<()> {
    let status = job.status.as_ref().context("status")?;
    let each: Vec<i64> = status.attempts.iter().filter_map(|attempt| attempt.energy_millijoules).collect();
    let all = status.measured.as_ref().and_then(|measured| measured.energy_millijoules);
    ensure!(all == Some(each.iter().sum()), "{all:?} mJ, but the attempts have {each:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_left_of_a_lost_class_of_nodes_goes_to_the_other_one() {
    let _alone = MACHINES.lock().await;
    with_namespace("replan-lost", |here| async move {
        const LINES: usize = 2800;
        prepared().await?;
        becomes_cuda(&here, 4).await?;
        let name = model(&here, "demo").await?;
        // Long outputs are cheaper on the second node, short ones on the first. All take less time than predicted.
        predict(&name, "cpu", (0.0, 1.0), (0.0, 1.0)).await?;
        predict(&name, "cuda", (60.0, 0.1), (0.0, 1.0)).await?;
        let tokens = |number: usize| if number.is_multiple_of(2) { SHORT } else { LONG };
        apply_job(&here, "lost", &input(LINES, tokens), spec(&[&name])).await?;
        let before = await_job(&here, "lost", "at work on both", |job| lines_done(job) > 40).await?;
        let before = plan(&before).context("plan")?.clone();
        let classes: Vec<DeviceClass> = before.chosen.iter().map(|one| one.device_class).collect();
        ensure!(before.chosen.len() == 2 && classes.contains(&DeviceClass::Cuda), "{classes:?}");
        let killed = Instant::now();
        machines(&["node", LOST, "off"]).await?;
        let outcome = async {
            let job = replanned(&here, "lost", ReplanReason::NodesLost).await?;
            println!("another plan {:.1} s after the power was cut", killed.elapsed().as_secs_f64());
            let after = plan(&job).context("plan")?;
            let replan = after.replan.as_ref().context("replan")?;
            ensure!((after.epoch, replan.outcome) == (2, Some(ReplanOutcome::Replaced)), "{replan:?}");
            ensure!(after.chosen.iter().all(|one| one.device_class == DeviceClass::Cpu), "{:?}", after.chosen);
            let (old, new) = (before.solved.context("solved")?, after.solved.clone().context("solved")?);
            ensure!((&old.mean_joules, &old.mean_accuracy_tokens) == (&new.mean_joules, &new.mean_accuracy_tokens));
            ensure!(new.finished > 0 && new.finished + new.requests == i64::try_from(LINES)?, "{new:?}");
            let job = completed(&here, "lost").await?;
            let of_the_first = ensure_each_ran_where_it_was_placed(&here, &job, LINES).await?;
            println!(
                "{of_the_first} of {LINES} lines are of the first plan, {} had a result when it gave way",
                new.finished
            );
            let status = job.status.as_ref().context("status")?;
            ensure!(status.failures.run == 0 && status.failures.infrastructure <= 1, "{:?}", status.failures);
            ensure!(status.progress.as_ref().is_some_and(|progress| progress.summary == format!("{LINES}/{LINES}")));
            let told = told(&job, conditions::REPLANNED);
            ensure!(
                told.contains("Replanned=True NodesLost") && told.contains("plan 2 takes the place of plan 1"),
                "{told}"
            );
            let story = user_runs("kubectl", &["describe", "ij", "lost", "-n", &here.name], None).await?;
            ensure!(story.contains("Replanning") && story.contains("no node of class cuda"), "{story}");
            let explained = user_runs("joulecast", &["explain", "lost", "-n", &here.name], None).await?;
            ensure!(explained.contains("replanned once, last for NodesLost"), "{explained}");
            Ok(())
        }
        .await;
        machines(&["node", LOST, "on"]).await?;
        outcome?;
        // Back with power, the node tells that its pod is no more; then every joule that is known is counted once.
        let job = await_job(&here, "lost", "without outstanding reports", |job| {
            let told = told(job, conditions::ENERGY_REPORTED);
            told != "absent" && !told.contains("ReportOutstanding")
        })
        .await?;
        ensure_all_counted(&job)?;
        forget(&here, &[&format!("{name}-cpu"), &format!("{name}-cuda")]).await
    })
    .await;
}

#[tokio::test]
async fn nodes_that_appear_take_over_what_is_cheaper_on_them() {
    let _alone = MACHINES.lock().await;
    with_namespace("replan-new", |here| async move {
        const LINES: usize = 1200;
        prepared().await?;
        let name = model(&here, "demo").await?;
        predict(&name, "cpu", (0.0, 1.0), (0.0, 1.0)).await?;
        predict(&name, "cuda", (60.0, 0.1), (0.0, 1.0)).await?;
        let tokens = |number: usize| if number.is_multiple_of(2) { SHORT } else { LONG };
        apply_job(&here, "new", &input(LINES, tokens), spec(&[&name])).await?;
        await_job(&here, "new", "at work", |job| lines_done(job) > 5).await?;
        becomes_cuda(&here, 4).await?;
        let job = replanned(&here, "new", ReplanReason::NodesAppeared).await?;
        let replan = plan(&job).and_then(|plan| plan.replan.as_ref()).context("replan")?;
        ensure!(replan.outcome == Some(ReplanOutcome::Replaced), "{replan:?}");
        let job = completed(&here, "new").await?;
        ensure!(plan(&job).is_some_and(|plan| plan.epoch == 2 && plan.chosen.len() == 2), "{:?}", plan(&job));
        let of_the_first = ensure_each_ran_where_it_was_placed(&here, &job, LINES).await?;
        println!("{of_the_first} of {LINES} lines are of the first plan");
        let status = job.status.as_ref().context("status")?;
        ensure!(status.failures.is_none(), "{:?}", status.failures);
        let stopped = &status.attempts[0];
        ensure!(
            (stopped.outcome, stopped.reason.as_deref()) == (Some(Outcome::Stopped), Some("Replanned")),
            "{stopped:?}"
        );
        // Pods of the first plan ended with a report, before those of the second began: nothing was computed twice.
        let measured = status.measured.as_ref().context("measured")?;
        ensure!(measured.attempts_without_report == 0, "{measured:?}");
        let written: i64 = results(&here, "new")
            .await?
            .iter()
            .filter_map(|line| line["response"]["body"]["usage"]["completion_tokens"].as_i64())
            .sum();
        ensure!(measured.tokens_out == written, "{} tokens were computed for {written}", measured.tokens_out);
        ensure_all_counted(&job)?;
        forget(&here, &[&format!("{name}-cpu"), &format!("{name}-cuda")]).await
    })
    .await;
}

#[tokio::test]
async fn what_is_left_of_a_model_that_is_slower_than_predicted_goes_to_another() {
    let _alone = MACHINES.lock().await;
    with_namespace("replan-slow", |here| async move {
        const LINES: usize = 1800;
        prepared().await?;
        let (told, honest) = (model(&here, "told").await?, model(&here, "honest").await?);
        // What nobody can keep: a hundred thousand tokens a second for a tenth of a millijoule each.
        predict(&told, "cpu", (0.0, 1e-4), (0.0, 1e-5)).await?;
        predict(&honest, "cpu", (0.0, 5e-4), (0.0, 1.0)).await?;
        apply_job(&here, "slow", &input(LINES, |_| 128), spec(&[&told, &honest])).await?;
        let began = Instant::now();
        let job = replanned(&here, "slow", ReplanReason::Slow).await?;
        println!("another plan {:.1} s after the job was made", began.elapsed().as_secs_f64());
        let after = plan(&job).context("plan")?;
        let replan = after.replan.as_ref().context("replan")?;
        ensure!(replan.outcome == Some(ReplanOutcome::Replaced), "{replan:?}");
        ensure!(replan.paces[0].model == told && replan.paces[0].time_percent >= 200, "{replan:?}");
        ensure!(after.chosen.len() == 1 && after.chosen[0].model == honest, "{:?}", after.chosen);
        println!("{}", replan.message);
        let job = completed(&here, "slow").await?;
        let of_the_first = ensure_each_ran_where_it_was_placed(&here, &job, LINES).await?;
        let found = results(&here, "slow").await?;
        let of = |model: &str| found.iter().filter(|line| line["response"]["body"]["model"] == *model).count();
        ensure!((of(&told), of(&honest)) == (of_the_first, LINES - of_the_first), "{} by {told}", of(&told));
        ensure!(plan(&job).is_some_and(|plan| plan.epoch == 2), "{:?}", plan(&job));
        ensure_all_counted(&job)?;
        forget(&here, &[&format!("{told}-cpu"), &format!("{honest}-cpu")]).await
    })
    .await;
}

#[tokio::test]
async fn a_job_that_comes_later_leaves_the_class_to_one_with_a_deadline_that_needs_it() {
    let _alone = MACHINES.lock().await;
    with_namespace("prices", |here| async move {
        const LINES: usize = 1500;
        prepared().await?;
        becomes_cuda(&here, 2).await?;
        let (urgent, patient) = (model(&here, "urgent").await?, model(&here, "patient").await?);
        // A second on the second node saves the urgent job 10 J, and the patient one 4 J.
        for (name, joules) in [(&urgent, 0.5), (&patient, 0.8)] {
            predict(name, "cpu", (0.0, 1.0), (0.0, 0.01)).await?;
            predict(name, "cuda", (0.0, joules), (0.0, 0.05)).await?;
        }
        let later = |constraints: Value| {
            let mut spec = spec(&[&patient]);
            spec["constraints"] = constraints;
            spec
        };
        let dry_run = async |constraints: Value| {
            let job = manifest("later", later(constraints)).to_string();
            user_tries("joulecast", &["plan", "-f", "-", "-n", &here.name], Some(&job)).await
        };
        apply_input(&here, "later", &input(8, |_| SHORT)).await?;
        let (code, printed, errors) = dry_run(json!({})).await?;
        ensure!(code == 0 && printed.contains("nodes of class cuda"), "{printed}\n{errors}");
        ensure!(!printed.contains("charged"), "nobody needs it yet:\n{printed}");

        // 9600 s of device time on the second node, on two slots: it has 3000 s, and gives the rest to the first node.
        let mut spec = spec(&[&urgent]);
        spec["parallelism"] = json!(2);
        spec["constraints"] = json!({"completeWithinSeconds": 3000});
        apply_job(&here, "urgent", &input(LINES, |_| LONG), spec).await?;
        let job = await_job(&here, "urgent", "at work on both", |job| lines_done(job) > 0).await?;
        let shared = &plan(&job).context("plan")?.classes;
        ensure!(shared.len() == 1 && shared[0].device_class == DeviceClass::Cuda, "{shared:?}");
        let price: f64 = shared[0].price_joules_per_second.as_ref().context("a price")?.parse()?;
        ensure!((9.9..10.1).contains(&price), "{shared:?}");
        println!("{}", shared[0].message);

        apply_job(&here, "later", &input(8, |_| SHORT), later(json!({}))).await?;
        let job = await_job(&here, "later", "planned", |job| is_true(job, conditions::PLANNED)).await?;
        let after = plan(&job).context("plan")?;
        ensure!(after.chosen.len() == 1 && after.chosen[0].device_class == DeviceClass::Cpu, "{:?}", after.chosen);
        let told = told(&job, conditions::PLANNED);
        println!("{told}");
        for shown in
            ["other jobs have 2 pods there on 2 slots", "J per device-second charged", "so 8 requests go elsewhere"]
        {
            ensure!(told.contains(shown), "{shown:?} is missing in {told}");
        }
        let reason =
            after.left_out.iter().find(|one| one.device_class == Some(DeviceClass::Cuda) && one.batch.is_some());
        ensure!(
            reason.is_some_and(|one| one.reason.contains("charged for its nodes, which other jobs need")),
            "{reason:?}"
        );
        let solved = after.solved.as_ref().context("solved")?;
        ensure!(
            solved.charged_millijoules == 0 && solved.energy_millijoules >= 8 * i64::from(SHORT) * 1000,
            "{solved:?}"
        );
        let explained = user_runs("joulecast", &["explain", "later", "-n", &here.name], None).await?;
        ensure!(explained.contains("shared    cuda: other jobs have 2 pods there"), "{explained}");
        // It does not wait for the other one, which keeps its plan.
        completed(&here, "later").await?;

        // One that has to be done on those nodes before the urgent one is, is refused with the figures.
        let (code, printed, errors) = dry_run(json!({"completeWithinSeconds": 60, "deviceClasses": ["cuda"]})).await?;
        ensure!(
            code == 3 && printed.contains("what other jobs leave of the nodes of class cuda"),
            "{printed}\n{errors}"
        );
        let job = await_job(&here, "urgent", "still at work", |job| lines_done(job) > 0).await?;
        ensure!(plan(&job).is_some_and(|plan| plan.epoch == 1 && plan.replan.is_none()), "{:?}", plan(&job));
        let models = [&urgent, &patient].map(|name| [format!("{name}-cpu"), format!("{name}-cuda")]).concat();
        forget(&here, &models.iter().map(String::as_str).collect::<Vec<_>>()).await
    })
    .await;
}
