//! The operator is killed in front of each kind of write to the API, and started anew: what the life of a job, of a short-lived
//! job and of a ProfileRun comes to is the same as without. Needs the local cluster, and an operator with the feature
//! `fail-points` at JOULECAST_OPERATOR_WITH_POINTS (`make kills-operator` provides both). It runs on this machine with the
//! administrator's rights, in place of the one that is installed, which rests meanwhile.
#![allow(missing_docs, clippy::print_stdout, reason = "which points were passed is worth reading")]

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::{Outcome, conditions};
use joulecast_crds::names::FINALIZER_REPORT;
use joulecast_crds::report::Report;
use joulecast_crds::{EnergyModel, InferenceJob, ProfileRun};
use joulecast_tests::cluster::{RELEASE_NAMESPACE, kubeconfig, user_runs};
use joulecast_tests::job::{apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, requests, results};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::runtime::conditions::is_deleted;
use kube::runtime::wait::await_condition;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;
use tokio::process::{Child, Command};

/// Writes in the life of a job that is suspended and goes on, and which of several the operator is killed at.
const OF_A_JOB: &[(&str, u32)] = &[
    ("put-leases", 1),
    ("put-leases", 2),
    ("patch-networkpolicies", 1),
    ("patch-jobs", 1),
    ("patch-jobs", 2),
    ("patch-jobs", 3),
    ("patch-inferencejobs-status", 1),
    ("patch-inferencejobs-status", 2),
    ("patch-inferencejobs-status", 3),
    ("patch-inferencejobs-status", 4),
    ("patch-inferencejobs-status", 5),
    ("patch-inferencejobs-status", 6),
    ("patch-pods", 1),
    ("patch-pods", 2),
    ("post-events", 1),
    ("post-events", 2),
];
/// Writes in the life of a job with a time to live that come in no other.
const OF_A_SHORT_LIVED_JOB: &[(&str, u32)] = &[("delete-inferencejobs", 1)];
/// Writes from a ProfileRun to the job that corrects its EnergyModel that come in no other.
const OF_A_PROFILE_RUN: &[(&str, u32)] = &[
    ("patch-profileruns-status", 1),
    ("patch-profileruns-status", 2),
    ("patch-profileruns-status", 3),
    ("patch-energymodels", 1),
    ("patch-energymodels-status", 1),
    ("patch-events", 1),
];
/// Enough for the run to be at work when it is suspended.
const LINES: u32 = 300;
/// Longest time until the operator comes to its point, and until what was begun has come to its end after that.
const PATIENCE: Duration = Duration::from_secs(120);
const SIGABRT: i32 = 6;

/// Where operators are started.
struct Machine {
    namespace: String,
    dir: PathBuf,
}

impl Machine {
    /// An operator with this JOULECAST_FAIL_POINT; its log goes to a file of that name.
    fn operator(&self, log: &str, point: &str) -> Result<Child> {
        let program = std::env::var("JOULECAST_OPERATOR_WITH_POINTS").context("run it by `make kills-operator`")?;
        let mut command = Command::new(program);
        command.arg("--config").arg(self.dir.join("config.yaml"));
        command.arg("--progress-key-file").arg(self.dir.join("key"));
        command.args(["--listen", "127.0.0.1:0", "--watch-namespace", &self.namespace]);
        command.args(["--lease", "joulecast-operator", "--lease-namespace", RELEASE_NAMESPACE]);
        // Of the same name each time, so that nobody waits for the end of the Lease of one that was killed.
        command.args(["--instance", "killed-again-and-again"]);
        command.env("KUBECONFIG", kubeconfig()).env("JOULECAST_FAIL_POINT", point);
        command.stderr(fs::File::create(self.log(log))?).kill_on_drop(true);
        command.spawn().context("the operator cannot be started")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Starts an operator that dies at this point, and then one that goes on.
    async fn killed_at(&self, name: &str, point: &str) -> Result<Child> {
        let mut first = self.operator(name, point)?;
        let ended = tokio::time::timeout(PATIENCE, first.wait()).await;
        let ended = ended.with_context(|| format!("{point} was not passed in {PATIENCE:?}"))??;
        ensure!(ended.signal() == Some(SIGABRT), "{point}: {ended}\n{}", fs::read_to_string(self.log(name))?);
        self.operator(&format!("{name}-next"), "")
    }
}

/// Asks an operator to stop, and waits for that.
async fn stop(mut operator: Child) -> Result<()> {
    let id = operator.id().context("the operator has ended by itself")?;
    user_runs("kill", &["-TERM", &id.to_string()], None).await?;
    let ended = operator.wait().await?;
    ensure!(ended.success(), "asked to stop, the operator ended with {ended}");
    Ok(())
}

/// How many replicas the installed operator has; waits until so many are there.
async fn installed(replicas: u32) -> Result<()> {
    let count = format!("--replicas={replicas}");
    user_runs("kubectl", &["scale", "deployment/joulecast-operator", "-n", RELEASE_NAMESPACE, &count], None).await?;
    let there = ["rollout", "status", "deployment/joulecast-operator", "-n", RELEASE_NAMESPACE, "--timeout=90s"];
    user_runs("kubectl", &there, None).await?;
    let label = "app.kubernetes.io/name=joulecast-operator";
    // Pods that were evicted long ago may lie about.
    let running = "--field-selector=status.phase=Running";
    let gone = ["wait", "--for=delete", "pod", "-l", label, running, "-n", RELEASE_NAMESPACE, "--timeout=90s"];
    if replicas == 0 {
        user_runs("kubectl", &gone, None).await?;
    }
    Ok(())
}

fn of_job(name: &str) -> ListParams {
    ListParams::default().labels(&format!("joulecast.dev/inference-job={name}"))
}

async fn suspend(here: &TestNamespace, name: &str, suspend: bool) -> Result<()> {
    let jobs: Api<InferenceJob> = here.api();
    let change = json!({"spec": {"suspend": suspend}});
    jobs.patch(name, &PatchParams::default(), &Patch::Merge(change)).await?;
    Ok(())
}

/// A job that is suspended while it is at work, and goes on; each of its two pods is started and counted once.
async fn job(here: &TestNamespace, name: &str) -> Result<()> {
    apply_job(here, name, &requests(LINES, 128), json!({})).await?;
    await_job(here, name, "started", |job| job.status.as_ref().is_some_and(|status| status.start_time.is_some()))
        .await?;
    let label = format!("joulecast.dev/inference-job={name}");
    let running = "--for=jsonpath={.status.phase}=Running";
    let wait = ["wait", "pod", "-l", &label, "-n", &here.name, running, "--timeout=60s"];
    user_runs("kubectl", &wait, None).await?;
    suspend(here, name, true).await?;
    await_job(here, name, "stopped", |job| {
        let measured = job.status.as_ref().and_then(|status| status.measured.as_ref());
        is_true(job, conditions::SUSPENDED) && measured.is_some_and(|measured| measured.attempts == 1)
    })
    .await?;
    suspend(here, name, false).await?;

    let job = await_job(here, name, "settled", |job| {
        is_true(job, conditions::COMPLETE) && is_true(job, conditions::ENERGY_REPORTED)
    })
    .await?;
    let pods: Api<Pod> = here.api();
    let list = pods.list(&of_job(name)).await?.items;
    let released = |pod: Option<&Pod>| pod.is_none_or(|pod| pod.finalizers().iter().all(|one| one != FINALIZER_REPORT));
    for pod in &list {
        let pod = pod.name_any();
        let released = await_condition(pods.clone(), &pod, released);
        tokio::time::timeout(PATIENCE, released).await.context("a pod keeps its finalizer")??;
    }
    let lines = results(here, name).await?;
    ensure!(lines.len() == LINES as usize, "{} results", lines.len());
    for (number, line) in lines.iter().enumerate() {
        ensure!(line["custom_id"] == format!("r-{number}"), "line {number} is {}", line["custom_id"]);
    }
    ensure_status_is_true(&job, &lines)?;
    let status = job.status.as_ref().context("status")?;
    let outcomes: Vec<_> = status.attempts.iter().map(|attempt| attempt.outcome).collect();
    ensure!(outcomes == [Some(Outcome::Succeeded)] && status.failures.is_none(), "{:?}", status.attempts);
    let children = here.api::<Job>().list(&of_job(name)).await?.items;
    // The pod that was stopped went with its suspension.
    ensure!((children.len(), list.len()) == (1, 1), "{} Jobs, {} pods", children.len(), list.len());
    let measured = status.measured.as_ref().context("measured")?;
    ensure!((measured.attempts, measured.attempts_without_report) == (2, 0), "{measured:?}");
    ensure!(measured.energy_millijoules > Some(reported(&list[0])?), "{measured:?}");
    ensure!(measured.energy_millijoules == status.attempts[0].energy_millijoules, "{:?}", status.attempts);
    Ok(())
}

/// What a pod that ended says it used, in mJ.
fn reported(pod: &Pod) -> Result<i64> {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let ended = statuses.and_then(|all| all.first()?.state.as_ref()?.terminated.as_ref()).context("not ended")?;
    let report: Report = serde_json::from_str(ended.message.as_deref().context("no report")?)?;
    Ok(i64::try_from(report.energy.gross_millijoules.context("no energy")?)?)
}

/// A job that is deleted when it is done, and leaves nothing.
async fn short_lived_job(here: &TestNamespace, name: &str) -> Result<()> {
    apply_job(here, name, &requests(6, 16), json!({"ttlSecondsAfterFinished": 1})).await?;
    let jobs: Api<InferenceJob> = here.api();
    let uid = jobs.get(name).await?.uid().context("UID")?;
    tokio::time::timeout(PATIENCE, await_condition(jobs, name, is_deleted(&uid))).await.context("it stays")??;
    let pods: Api<Pod> = here.api();
    for pod in pods.list(&of_job(name)).await?.items {
        let (pod, uid) = (pod.name_any(), pod.uid().context("UID")?);
        let gone = await_condition(pods.clone(), &pod, is_deleted(&uid));
        tokio::time::timeout(PATIENCE, gone).await.context("its pod stays")??;
    }
    Ok(())
}

/// A campaign that ends in an EnergyModel, and a job that is predicted by it and corrects it.
async fn profile_run(here: &TestNamespace, name: &str) -> Result<()> {
    let model = format!("{}-{name}", here.name);
    let run = json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "ProfileRun", "metadata": {"name": name},
        "spec": {
            "model": {"name": "demo"}, "engine": "candle", "provider": "cpu", "energyModelName": model,
            "grid": {"tokensIn": [8, 24, 64], "tokensOut": [8, 24, 64]}, "seed": 1, "repetitions": {"min": 2, "max": 2},
            "pace": {"idleBaselineSeconds": 1, "warmUpSeconds": 0, "leastWindowMilliseconds": 100},
            "samples": {"persistentVolumeClaim": {"claimName": "work", "path": format!("{name}.csv")}},
        },
    });
    here.apply(&run.to_string()).await?;
    let runs: Api<ProfileRun> = here.api();
    let complete = |run: Option<&ProfileRun>| {
        let conditions = run.and_then(|run| run.status.as_ref()).map(|status| &status.conditions);
        conditions.into_iter().flatten().any(|one| one.type_ == "Complete" && one.status == "True")
    };
    tokio::time::timeout(PATIENCE, await_condition(runs, name, complete)).await.context("not Complete")??;
    let models: Api<EnergyModel> = Api::all(here.client.clone());
    let learned = async {
        apply_job(here, name, &requests(12, 32), json!({})).await?;
        let job = await_job(here, name, "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let plan = job.status.and_then(|status| status.plan).context("plan")?;
        ensure!(plan.chosen[0].energy_model.as_deref() == Some(model.as_str()), "{:?}", plan.chosen);
        let learned = await_condition(models.clone(), &model, |model: Option<&EnergyModel>| {
            model.and_then(|model| model.status.as_ref()).is_some_and(|status| status.reports_learned == 1)
        });
        tokio::time::timeout(PATIENCE, learned).await.context("the job taught nothing")??;
        Ok(())
    }
    .await;
    // Other jobs would be predicted by it.
    models.delete(&model, &DeleteParams::default()).await?;
    learned
}

/// One life undisturbed, to know that no point is missing from the tables; then one for each point, killed there.
async fn each_point(
    here: &TestNamespace,
    machine: &Machine,
    kind: &str,
    points: &[(&str, u32)],
    life: impl AsyncFn(&TestNamespace, &str) -> Result<()>,
) -> Result<()> {
    let operator = machine.operator(kind, "list")?;
    life(here, kind).await.with_context(|| format!("{kind}, undisturbed"))?;
    stop(operator).await?;
    let told = fs::read_to_string(machine.log(kind))?;
    let passed: BTreeSet<&str> = told.lines().filter_map(|line| line.strip_prefix("fail point ")).collect();
    let all = [OF_A_JOB, OF_A_SHORT_LIVED_JOB, OF_A_PROFILE_RUN].concat();
    for point in &passed {
        ensure!(all.iter().any(|(known, _)| known == point), "no table has {point}, which {kind} passes");
    }
    for (number, (point, times)) in points.iter().enumerate() {
        ensure!(passed.contains(point), "{kind} does not pass {point}");
        let (name, point) = (format!("{kind}-{number}"), format!("{point}:{times}"));
        let both = tokio::try_join!(machine.killed_at(&name, &point), life(here, &name));
        let log = || fs::read_to_string(machine.log(&format!("{name}-next"))).unwrap_or_default();
        let (operator, ()) = both.with_context(|| format!("{name}, killed at {point}:\n{}", log()))?;
        stop(operator).await?;
        println!("kills-operator: {kind} killed at {point}: as if nothing had been");
    }
    Ok(())
}

/// The lives of a kind, with the installed operator at rest meanwhile; one kind at a time.
async fn lives(
    kind: &'static str,
    points: &'static [(&'static str, u32)],
    life: impl AsyncFn(&TestNamespace, &str) -> Result<()>,
) {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = ALONE.lock().await;
    with_namespace("kills", |here| async move {
        apply_demo_model(&here).await?;
        installed(0).await?;
        let outcome = async {
            let dir = std::env::temp_dir().join(format!("kills-operator-{kind}-{}", std::process::id()));
            fs::create_dir_all(&dir)?;
            let machine = Machine { namespace: here.name.clone(), dir };
            let text = "jsonpath={.data.config\\.yaml}";
            let of_chart = ["get", "configmap", "joulecast-operator", "-n", RELEASE_NAMESPACE, "-o", text];
            fs::write(machine.dir.join("config.yaml"), user_runs("kubectl", &of_chart, None).await?)?;
            fs::write(machine.dir.join("key"), "a key that all of these operators have")?;
            each_point(&here, &machine, kind, points, life).await?;
            fs::remove_dir_all(&machine.dir)?;
            Ok(())
        }
        .await;
        installed(1).await?;
        outcome
    })
    .await;
}

#[tokio::test]
async fn killed_at_any_write_for_a_job_the_operator_goes_on_where_it_was() {
    lives("job", OF_A_JOB, job).await;
}

#[tokio::test]
async fn killed_while_it_deletes_a_job_the_operator_goes_on_where_it_was() {
    lives("short", OF_A_SHORT_LIVED_JOB, short_lived_job).await;
}

#[tokio::test]
async fn killed_at_any_write_for_a_profile_run_the_operator_goes_on_where_it_was() {
    lives("profile", OF_A_PROFILE_RUN, profile_run).await;
}
