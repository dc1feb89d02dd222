//! The node agent against the real kubelet, API server and container runtime: slots, metering, restarts, permissions.
#![allow(missing_docs)]

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_crds::report::EnergySource;
use joulecast_tests::agent::{
    AGENT, AGENT_NAMESPACE, IDLE_WATTS, JOULES_PER_CPU_SECOND, Then, agent_pod, await_labels, await_slots, cpu_nanos,
    ensure_near, metrics, node, with_agent,
};
use joulecast_tests::cluster::{RELEASE, RELEASE_NAMESPACE, apply, kubeconfig, repository, user_runs, user_tries};
use joulecast_tests::job::{
    apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, lines_done, requests, results,
};
use joulecast_tests::pry::pry;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

/// The node of the local cluster that the tests use.
const NODE: &str = "cpu-0";

#[tokio::test]
async fn a_job_with_a_slot_is_metered_by_the_agent_and_no_joule_is_lost() {
    with_agent("metered", |here| async move {
        await_slots(NODE, "1").await?;
        await_labels(NODE).await?;
        let labels = node(NODE).await?.metadata.labels.context("labels")?;
        ensure!(labels["joulecast.dev/meter"] == "rapl" && labels["joulecast.dev/device-class"] == "cpu", "{labels:?}");
        ensure!(labels.contains_key("joulecast.dev/cpu-model"), "{labels:?}");

        apply_demo_model(&here).await?;
        let pods = format!("joulecast-{NODE}/kubepods");
        let (before, node_before, pods_before) = (metrics().await?, cpu_nanos("")?, cpu_nanos(&pods)?);
        apply_job(&here, "measured", &requests(200, 128), json!({})).await?;
        let job = await_job(&here, "measured", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let (after, node_after, pods_after) = (metrics().await?, cpu_nanos("")?, cpu_nanos(&pods)?);

        ensure_status_is_true(&job, &results(&here, "measured").await?)?;
        let measured = job.status.as_ref().and_then(|s| s.measured.clone()).context("measured")?;
        ensure!(measured.source == EnergySource::Measured, "source {:?}", measured.source);
        ensure!(measured.meter.starts_with("node agent: rapl (package-0)"), "meter {:?}", measured.meter);

        // What the counter moved is what the parties got, to the microjoule.
        let of = |page: &std::collections::BTreeMap<String, f64>, party: &str| {
            page[&format!("joulecast_node_energy_attributed_joules_total{{domain=\"package-0\",party=\"{party}\"}}")]
        };
        let parties = ["idle", "slots", "other-pods", "system"];
        let moved = "joulecast_node_energy_joules_total{domain=\"package-0\",source=\"rapl\"}";
        let all: f64 = parties.iter().map(|party| of(&after, party)).sum();
        ensure!((all - after[moved]).abs() < 1e-5, "{all} J of {} J", after[moved]);

        // And what was worked for no pod is what the cgroups say, read without the agent.
        let grew = |party: &str| of(&after, party) - of(&before, party);
        let seconds = |after: u64, before: u64| (after - before) as f64 / 1e9;
        let (node_used, pods_used) = (seconds(node_after, node_before), seconds(pods_after, pods_before));
        let joules = JOULES_PER_CPU_SECOND as f64;
        let whole = after[moved] - before[moved];
        let no_pod = (node_used - pods_used) * joules;
        ensure_near(
            "pods + idle + no pod's CPU time",
            whole,
            grew("slots") + grew("other-pods") + grew("idle") + no_pod,
            0.01,
        )?;

        // The job's own figure: its CPU time at so many joules, and the slot's idle energy.
        let window = measured.window_milliseconds as f64 / 1e3;
        let gross = measured.energy_millijoules.context("gross")? as f64 / 1e3;
        let idle = measured.idle_millijoules.context("idle")? as f64 / 1e3;
        ensure_near("idle energy of the slot", window * IDLE_WATTS as f64, idle, 0.02)?;
        let cpu = measured.cpu_mean_millis.context("CPU use")? as f64 / 1e3 * window;
        ensure_near("the job's energy", cpu * joules + window * IDLE_WATTS as f64, gross, 0.05)?;
        let series = format!("joulecast_job_energy_joules_total{{namespace=\"{}\",job=\"measured\"}}", here.name);
        let told = *after.get(&series).with_context(|| format!("{series} is not in {after:?}"))?;
        ensure!(told >= gross * 0.99, "the agent tells {told} J of the job, its report {gross} J");
        Ok(Then::Stays)
    })
    .await;
}

#[tokio::test]
async fn two_jobs_for_one_slot_run_one_after_the_other() {
    with_agent("oneslot", |here| async move {
        apply_demo_model(&here).await?;
        for name in ["first", "second"] {
            apply_job(&here, name, &requests(100, 128), json!({})).await?;
        }
        for name in ["first", "second"] {
            let job = await_job(&here, name, "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
            let source = job.status.and_then(|s| s.measured).context("measured")?.source;
            ensure!(source == EnergySource::Measured, "{name}: source {source:?}");
        }
        let mut times = Vec::new();
        for name in ["first", "second"] {
            let pods: Api<Pod> = here.api();
            let of_job = ListParams::default().labels(&format!("joulecast.dev/inference-job={name}"));
            let pod = pods.list(&of_job).await?.items.into_iter().next().context("no pod")?;
            let state = pod.status.and_then(|s| s.container_statuses).and_then(|c| c.into_iter().next()?.state);
            let ended = state.and_then(|state| state.terminated).context("not terminated")?;
            times.push((ended.started_at.context("start")?.0, ended.finished_at.context("end")?.0));
        }
        times.sort();
        ensure!(times[1].0 >= times[0].1, "two pods held the one slot at a time: {times:?}");
        Ok(Then::Stays)
    })
    .await;
}

#[tokio::test]
async fn restarts_of_kubelet_and_agent_lose_neither_slots_nor_joules() {
    with_agent("restarts", |here| async move {
        apply_demo_model(&here).await?;
        await_slots(NODE, "1").await?;
        apply_job(&here, "steady", &requests(550, 128), json!({})).await?;
        await_job(&here, "steady", "at work", |job| lines_done(job) > 0).await?;

        // A kubelet that restarts forgets its plugins: the slots come back without anybody's help.
        let cluster = repository().join("tests/cluster/cluster");
        let cluster = cluster.to_str().context("path")?;
        let before = registrations().await?;
        user_runs(cluster, &["kubelet", NODE, "stop"], None).await?;
        user_runs(cluster, &["kubelet", NODE, "start"], None).await?;
        await_registered_anew(before).await?;
        await_slots(NODE, "1").await?;

        // The agent is killed without a word and comes back: the window goes on.
        let pods: Api<Pod> = Api::namespaced(here.client.clone(), AGENT_NAMESPACE);
        let killed = agent_pod().await?.metadata.name.context("name")?;
        pods.delete(&killed, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await?;
        let rollout = ["rollout", "status", &format!("ds/{AGENT}"), "-n", AGENT_NAMESPACE, "--timeout=60s"];
        user_runs("kubectl", &rollout, None).await?;
        await_slots(NODE, "1").await?;

        let job = await_job(&here, "steady", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let measured = job.status.and_then(|s| s.measured).context("measured")?;
        ensure!(measured.attempts == 1 && measured.source == EnergySource::Measured, "{measured:?}");
        let window = measured.window_milliseconds as f64 / 1e3;
        let cpu = measured.cpu_mean_millis.context("CPU use")? as f64 / 1e3 * window;
        let gross = measured.energy_millijoules.context("gross")? as f64 / 1e3;
        let want = cpu * JOULES_PER_CPU_SECOND as f64 + window * IDLE_WATTS as f64;
        ensure_near("energy over two restarts", want, gross, 0.05)?;
        Ok(Then::Stays)
    })
    .await;
}

/// How often the agent has registered its slots, by its log.
async fn registrations() -> Result<usize> {
    let log = user_runs("kubectl", &["logs", "-n", AGENT_NAMESPACE, &format!("ds/{AGENT}")], None).await?;
    Ok(log.matches("registered resource=").count())
}

/// Waits until the agent has registered once more: the node keeps its old count until then.
async fn await_registered_anew(before: usize) -> Result<()> {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        // The kubelet, through which logs come, may be away.
        if registrations().await.is_ok_and(|now| now > before) {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "the agent did not register again within a minute");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

#[tokio::test]
async fn the_agent_may_change_its_own_node_and_there_its_own_keys_only() {
    with_agent("policy", |_| async move {
        let pod = agent_pod().await?;
        let pod = pod.metadata.name.context("name")?;
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod.as_str()];
        let bound = token(&bound).await?;
        apply("{apiVersion: v1, kind: Node, metadata: {name: ghost, labels: {kept: here}}}").await?;
        let attempt = async {
            let label = |key: &str, value: Value| json!({"metadata": {"labels": {key: value}}});
            let meter = label("joulecast.dev/meter", json!("rapl"));
            patched(&bound, NODE, &meter).await.context("its own node and key")?;
            for (node, patch, why) in [
                ("ghost", meter.clone(), "its own node only"),
                (NODE, label("evil", json!("1")), "no other labels"),
                (NODE, label("kubernetes.io/hostname", Value::Null), "no other labels"),
                (NODE, json!({"metadata": {"annotations": {"evil": "1"}}}), "no other annotations"),
                (NODE, json!({"spec": {"unschedulable": true}}), "labels and annotations only"),
                (NODE, json!({"metadata": {"finalizers": ["evil.example/x"]}}), "labels and annotations only"),
            ] {
                let refused =
                    patched(&bound, node, &patch).await.err().with_context(|| format!("allowed: {patch} on {node}"))?;
                ensure!(refused.to_string().contains(why), "{patch} on {node}: {refused}");
            }
            // A token that is bound to no pod names no node, and may do nothing.
            let unbound = token(&[]).await?;
            let refused = patched(&unbound, NODE, &meter).await.err().context("an unbound token was allowed")?;
            ensure!(refused.to_string().contains("names none"), "{refused}");
            // Nothing but nodes, and nothing but patching.
            for (verb, what, part) in [
                ("get", "nodes", ""),
                ("list", "pods", ""),
                ("get", "secrets", ""),
                ("update", "nodes", ""),
                // `nodes/status` would ask about a node of the name `status`.
                ("patch", "nodes", "status"),
            ] {
                let as_agent = format!("system:serviceaccount:{AGENT_NAMESPACE}:{AGENT}");
                let asked = ["auth", "can-i", verb, what, "--subresource", part, "--as", &as_agent, "-A"];
                let (_, answer, _) = user_tries("kubectl", &asked, None).await?;
                ensure!(answer.trim() == "no", "the agent may {verb} {what} {part}");
            }
            Ok(())
        };
        let outcome = attempt.await;
        user_runs("kubectl", &["delete", "node", "ghost"], None).await?;
        outcome.map(|()| Then::Stays)
    })
    .await;
}

async fn token(bound: &[&str]) -> Result<String> {
    let create = ["create", "token", AGENT, "-n", AGENT_NAMESPACE];
    Ok(user_runs("kubectl", &[&create[..], bound].concat(), None).await?.trim().to_owned())
}

/// Patches a node with a token.
async fn patched(token: &str, node: &str, patch: &Value) -> Result<Node, kube::Error> {
    let file = Kubeconfig::read_from(kubeconfig()).expect("the kubeconfig of the cluster under test");
    let options = KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(file, &options).await.expect("a usable kubeconfig");
    config.auth_info = AuthInfo { token: Some(token.to_owned().into()), ..AuthInfo::default() };
    let nodes: Api<Node> = Api::all(kube::Client::try_from(config)?);
    nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await
}

#[tokio::test]
async fn uninstalling_leaves_no_slot_no_socket_and_no_label() {
    with_agent("gone", |_| async move {
        await_slots(NODE, "1").await?;
        let cluster = repository().join("tests/cluster/cluster");
        let cluster = cluster.to_str().context("path")?;
        await_labels(NODE).await?;
        let sockets = ["exec", NODE, "find", "/run/joulecast", "/var/lib/kubelet/device-plugins", "-name", "*.sock"];
        let there = user_runs(cluster, &sockets, None).await?;
        ensure!(there.contains("joulecast-cpu.sock") && there.contains("cpu-0/meter.sock"), "{there}");

        user_runs("helm", &["uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait"], None).await?;
        let gone = ["wait", "--for=delete", &format!("namespace/{AGENT_NAMESPACE}"), "--timeout=60s"];
        user_runs("kubectl", &gone, None).await?;
        await_slots(NODE, "0").await?;
        let left = user_runs(cluster, &sockets, None).await?;
        ensure!(!left.contains("joulecast"), "{left}");
        let node = node(NODE).await?;
        let keys = node.metadata.labels.into_iter().flatten().chain(node.metadata.annotations.into_iter().flatten());
        let ours: Vec<_> = keys.filter(|(key, _)| key.starts_with("joulecast.dev/")).collect();
        ensure!(ours.is_empty(), "{ours:?}");
        let (_, left, _) = user_tries(
            "kubectl",
            &[
                "get",
                "jobs,sa,clusterroles,clusterrolebindings,validatingadmissionpolicies",
                "-A",
                "-o",
                "name",
                "-l",
                "app.kubernetes.io/part-of=joulecast",
            ],
            None,
        )
        .await?;
        ensure!(left.trim().is_empty(), "uninstall left\n{left}");
        user_runs(repository().join("tests/install.sh").to_str().context("path")?, &[], None).await?;
        Ok(Then::Gone)
    })
    .await;
}

#[tokio::test]
async fn a_pod_without_a_slot_sees_neither_counters_nor_another_pods_socket() {
    with_agent("prying", |here| async move {
        await_slots(NODE, "1").await?;
        apply_demo_model(&here).await?;
        apply_job(&here, "holder", &requests(400, 128), json!({})).await?;
        await_job(&here, "holder", "at work", |job| lines_done(job) > 0).await?;
        let totals = pry(&here, "/run/joulecast/cpu-0/meter.sock", json!({})).await?;
        let energy = &totals["energy"];
        ensure!(energy["source"] == "Modelled", "{energy}");
        let notes = energy["notes"].to_string();
        ensure!(notes.contains("/run/joulecast/cpu-0/meter.sock") && notes.contains("No such file"), "{notes}");
        ensure!(notes.contains("no RAPL"), "{notes}");
        let job = await_job(&here, "holder", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        ensure!(job.status.and_then(|s| s.measured).is_some_and(|m| m.source == EnergySource::Measured));
        Ok(Then::Stays)
    })
    .await;
}
