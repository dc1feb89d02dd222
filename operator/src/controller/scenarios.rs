//! Scenarios against a fake API server: what exactly is sent, in which order, and nothing else.
//!
//! The fake plays the part of the watches as well: what is applied to it comes back into the caches when the test says so.

use crate::controller::apply::Class;
use crate::controller::caches::{Caches, KINDS};
use crate::controller::{Context, Error, on_error, orphans, reconcile, samples};
use crate::metrics::Metrics;
use crate::progress::ProgressReader;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::BodyExt;
use joulecast_crds::inference_job::conditions;
use joulecast_crds::{EnergyModel, InferenceJob, InferenceJobStatus, InferenceModel};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::client::Body;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Action;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{Lookup, ObjectRef, store, store::Writer};
use kube::runtime::watcher::Event;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

mod predictions;

/// One request that the fake saw.
#[derive(Debug, Clone)]
struct Sent {
    what: String,
    content_type: String,
    query: String,
    body: Value,
    accepted: bool,
}

/// A scripted failure: part of the request that it waits for, HTTP code, message.
type Failure = (&'static str, u16, &'static str);

/// The fake API server: records everything, answers with what it was sent, or with the next scripted failure.
#[derive(Clone, Default)]
struct FakeApi {
    sent: Arc<Mutex<Vec<Sent>>>,
    failures: Arc<Mutex<VecDeque<Failure>>>,
}

impl tower::Service<Request<Body>> for FakeApi {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            let path = parts.uri.path();
            let place = path.rsplit_once("/namespaces/").map_or(path, |(_, rest)| rest);
            let what = format!("{} {place}", parts.method);
            let content_type = parts.headers.get("content-type").map_or("", |value| value.to_str().unwrap()).to_owned();
            let query = parts.uri.query().unwrap_or_default().to_owned();
            let sent_body = body.clone();
            let mut failures = this.failures.lock().unwrap();
            let (code, answer) = match failures.front() {
                Some((part, code, message)) if what.contains(part) => {
                    let answer = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                        "message": message, "reason": "Scripted", "metadata": {}});
                    (*code, answer)
                }
                _ => (200, answer_to(&what, body)),
            };
            if code != 200 {
                failures.pop_front();
            }
            this.sent.lock().unwrap().push(Sent { what, content_type, query, body: sent_body, accepted: code == 200 });
            let bytes = serde_json::to_vec(&answer).unwrap();
            Ok(Response::builder().status(code).body(Body::from(bytes)).unwrap())
        })
    }
}

/// What the API server would return: an object of the kind that was asked for.
fn answer_to(what: &str, body: Value) -> Value {
    if what.contains("/pods/") {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}})
    } else if what.starts_with("PATCH") && what.contains("/inferencejobs/") {
        serde_json::to_value(samples::job()).unwrap()
    } else if what.contains("/energymodels/") {
        serde_json::to_value(crate::energy_model::samples::energy_model()).unwrap()
    } else if what.starts_with("DELETE") {
        json!({"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}})
    } else if body.get("spec").is_some() && body.get("kind").is_none() {
        serde_json::to_value(samples::child(&[])).unwrap()
    } else {
        body
    }
}

/// An operator without watches: the test fills its caches.
struct World {
    api: FakeApi,
    context: Arc<Context>,
    jobs: Writer<InferenceJob>,
    models: Writer<InferenceModel>,
    children: Writer<Job>,
    pods: Writer<Pod>,
    _nodes: Writer<PartialObjectMeta<Node>>,
    energy_models: Writer<EnergyModel>,
    /// Whether the cache of child Jobs lags behind what was applied.
    lagging: bool,
}

fn fill<K>(writer: &mut Writer<K>, objects: impl IntoIterator<Item = K>)
where
    K: Lookup + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone,
{
    writer.apply_watcher_event(&Event::Init);
    for object in objects {
        writer.apply_watcher_event(&Event::InitApply(object));
    }
    writer.apply_watcher_event(&Event::InitDone);
}

impl World {
    /// The sample job with its model and one CPU node.
    fn new() -> Self {
        let api = FakeApi::default();
        let client = Client::new(api.clone(), "team");
        let ((jobs, mut job_w), (models, mut model_w), (children, mut child_w)) = (store(), store(), store());
        let ((pods, mut pod_w), (nodes, mut node_w)) = (store(), store());
        let (energy_models, mut energy_model_w) = store();
        fill(&mut energy_model_w, []);
        fill(&mut job_w, [samples::job()]);
        fill(&mut model_w, samples::models().values().map(|model| model.as_ref().clone()));
        fill(&mut child_w, []);
        fill(&mut pod_w, []);
        let node: PartialObjectMeta<Node> = serde_json::from_value(json!({"metadata": {"name": "node-1"}})).unwrap();
        fill(&mut node_w, [node]);
        let reporter = Reporter { controller: "joulecast-operator".into(), instance: Some("test".into()) };
        let context = Context {
            client: client.clone(),
            metrics: Metrics::new(jobs.clone(), energy_models.clone()),
            caches: Caches {
                jobs,
                models,
                children,
                pods,
                nodes,
                energy_models,
                filled: tokio::sync::watch::channel(KINDS).1,
            },
            config: samples::config(),
            progress: ProgressReader::new(samples::progress_key(), Duration::from_secs(2)),
            recorder: Recorder::new(client, reporter),
            clock: samples::now,
            failures: Mutex::default(),
        };
        Self {
            api,
            context: Arc::new(context),
            jobs: job_w,
            models: model_w,
            children: child_w,
            pods: pod_w,
            _nodes: node_w,
            energy_models: energy_model_w,
            lagging: false,
        }
    }

    fn job(&self) -> Arc<InferenceJob> {
        self.context.caches.jobs.get(&ObjectRef::new("hello").within("team")).unwrap()
    }

    fn status(&self) -> InferenceJobStatus {
        self.job().status.clone().unwrap_or_default()
    }

    fn condition(&self, kind: &str) -> Option<(String, String, String)> {
        let condition = self.status().conditions.into_iter().find(|condition| condition.type_ == kind)?;
        Some((condition.status, condition.reason, condition.message))
    }

    fn change_job(&mut self, change: impl FnOnce(&mut InferenceJob)) {
        let mut job = self.job().as_ref().clone();
        change(&mut job);
        self.jobs.apply_watcher_event(&Event::Apply(job));
    }

    fn fail_next(&self, part: &'static str, code: u16, message: &'static str) {
        self.api.failures.lock().unwrap().push_back((part, code, message));
    }

    /// One reconcile; what it sent. What was written comes back into the caches, as the watches would bring it.
    async fn step(&mut self) -> (Vec<Sent>, Result<Action, Error>) {
        let result = reconcile(self.job(), self.context.clone()).await;
        let sent = std::mem::take(&mut *self.api.sent.lock().unwrap());
        let applied = |sent: &Sent| sent.what == CHILD && sent.accepted && sent.content_type.contains("apply");
        if !self.lagging && sent.iter().any(applied) {
            self.child(&[]);
        }
        if result.is_ok()
            && let Some(write) = sent.iter().find(|sent| sent.what.ends_with("/status"))
        {
            let status: InferenceJobStatus = serde_json::from_value(write.body["status"].clone()).unwrap();
            self.change_job(|job| {
                let version: u64 = job.metadata.resource_version.as_ref().unwrap().parse().unwrap();
                job.metadata.resource_version = Some((version + 1).to_string());
                job.status = Some(status);
            });
        }
        (sent, result)
    }

    /// Reconciles until nothing is sent; what was sent.
    async fn settle(&mut self) -> Vec<Sent> {
        let mut all = Vec::new();
        for _ in 0..8 {
            let (sent, result) = self.step().await;
            result.unwrap();
            if sent.is_empty() {
                return all;
            }
            all.extend(sent);
        }
        panic!("it never settles: {:?}", names(&all));
    }

    fn child(&mut self, true_conditions: &[(&str, &str, &str)]) {
        self.children.apply_watcher_event(&Event::Apply(samples::child(true_conditions)));
    }

    fn pod(&mut self, pod: Pod) {
        self.pods.apply_watcher_event(&Event::Apply(pod));
    }

    /// A job whose pod is at work.
    async fn running() -> Self {
        let mut world = Self::new();
        world.settle().await;
        world.pod(samples::running_pod("hello-1-0-a"));
        world.settle().await;
        world
    }
}

fn names(sent: &[Sent]) -> Vec<&str> {
    sent.iter().map(|sent| sent.what.as_str()).collect()
}

const STATUS: &str = "PATCH team/inferencejobs/hello/status";
const EVENT: &str = "POST team/events";
const CHILD: &str = "PATCH team/jobs/hello-1-0";
const POLICY: &str = "PATCH team/networkpolicies/hello-1-0";

fn report() -> String {
    serde_json::to_string(&samples::report()).unwrap()
}

#[tokio::test]
async fn a_new_job_is_planned_then_started_then_left_alone() {
    let mut world = World::new();
    world.lagging = true;
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "the plan is stored before anything acts on it");
    assert_eq!(
        sent[0].body["metadata"]["resourceVersion"], "100",
        "the write holds for the version that was read only"
    );
    assert_eq!(sent[0].content_type, "application/apply-patch+yaml");
    assert!(sent[0].query.contains("fieldManager=joulecast-operator"), "{}", sent[0].query);
    assert_eq!(sent[1].body["reason"], "Planned");

    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS], "no run is ever reachable by all");
    assert!(sent[1].query.contains("force=true"), "{}", sent[1].query);
    assert!(world.status().start_time.is_some());

    // The same again while the cache of child Jobs lags behind: applying it again changes nothing.
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD]);
    world.child(&[]);
    let (sent, result) = world.step().await;
    assert!(sent.is_empty(), "{:?}", names(&sent));
    assert_eq!(result.unwrap(), Action::await_change());
}

#[tokio::test]
async fn nothing_to_do_sends_nothing() {
    let mut world = World::running().await;
    for _ in 0..3 {
        let (sent, result) = world.step().await;
        assert!(sent.is_empty(), "{:?}", names(&sent));
        assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(2)), "its progress is read again");
    }
    assert_eq!(world.status().state.as_deref(), Some("Running"));
    assert_eq!(world.status().placement.as_deref(), Some("node-1"));
}

#[tokio::test]
async fn a_finished_job_is_counted_once_released_and_left_alone() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "the report is stored before the pod is released");
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.energy_millijoules, measured.attempts), (Some(41_200), 1));
    assert_eq!(world.status().progress.unwrap().summary, "48/48");
    let (value, _, message) = world.condition(conditions::COMPLETE).unwrap();
    assert_eq!((value.as_str(), message.as_str()), ("True", "48 lines have a result, 2 of them failed"));
    assert_eq!(world.condition(conditions::ENERGY_REPORTED).unwrap().0, "True");
    assert!(world.context.metrics.text().contains("joulecast_measured_joules_total{"));

    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-a"]);
    assert_eq!(sent[0].content_type, "application/strategic-merge-patch+json");
    assert_eq!(sent[0].body["metadata"]["$deleteFromPrimitiveList/finalizers"], json!(["joulecast.dev/report"]));
    assert_eq!(sent[0].body["metadata"]["uid"], "uid-of-hello-1-0-a");

    let mut released = samples::ended_pod("hello-1-0-a", 0, &report());
    released.metadata.finalizers = None;
    world.pod(released);
    let sent = world.settle().await;
    assert_eq!(names(&sent), [STATUS], "the UID is dropped");
    assert!(world.status().reported_pods.is_empty());
    assert_eq!(world.status().measured.unwrap().energy_millijoules, Some(41_200), "counted once");
    assert_eq!(world.status().state.as_deref(), Some("Complete"));
}

#[tokio::test]
async fn a_report_is_not_doubled_by_repeated_reconciles_or_a_restart() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-a", 1, &report()));
    for _ in 0..4 {
        world.step().await.1.unwrap();
    }
    assert_eq!(world.status().measured.unwrap().attempts, 1);
    // A new operator knows nothing but what the API keeps.
    let mut restarted = World::new();
    let job = world.job().as_ref().clone();
    restarted.jobs.apply_watcher_event(&Event::Apply(job));
    restarted.child(&[]);
    restarted.pod(samples::ended_pod("hello-1-0-a", 1, &report()));
    let sent = restarted.step().await.0;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-a"], "it only finishes the release");
    // A second attempt adds.
    restarted.pod(samples::ended_pod("hello-1-0-b", 0, &report()));
    restarted.step().await.1.unwrap();
    let measured = restarted.status().measured.unwrap();
    assert_eq!((measured.attempts, measured.energy_millijoules), (2, Some(82_400)));
}

#[tokio::test]
async fn a_report_whose_storing_failed_is_stored_by_the_next_try() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-a", 0, &report()));
    world.fail_next("/status", 503, "not now");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [STATUS]);
    assert_eq!(result.unwrap_err().class(), Class::Transport);
    let (sent, _) = world.step().await;
    assert_eq!(sent[0].what, STATUS);
    assert_eq!(world.status().measured.unwrap().attempts, 1);
}

#[tokio::test]
async fn a_missing_model_is_named_and_its_appearing_starts_the_job() {
    let mut world = World::new();
    world.models.apply_watcher_event(&Event::Delete(samples::models()["demo"].as_ref().clone()));
    let sent = world.settle().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    let (value, reason, message) = world.condition(conditions::PLANNED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "NoCandidate"));
    assert_eq!(message, "InferenceModel demo not found in namespace team: create it");
    world.models.apply_watcher_event(&Event::Apply(samples::models()["demo"].as_ref().clone()));
    world.step().await.1.unwrap();
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS]);
}

#[tokio::test]
async fn an_invalid_job_is_told_once_and_waits_for_a_change() {
    let mut world = World::new();
    world.change_job(|job| job.spec.max_failed_fraction = "2".into());
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    assert_eq!(result.unwrap(), Action::await_change());
    assert!(world.condition(conditions::PLANNED).unwrap().2.contains("spec.maxFailedFraction"));
    assert!(world.settle().await.is_empty());
}

#[tokio::test]
async fn errors_of_the_api_are_tried_again_ever_later() {
    let mut world = World::new();
    let mut waits = Vec::new();
    for _ in 0..3 {
        world.fail_next("/status", 503, "not now");
        let (_, result) = world.step().await;
        waits.push(on_error(world.job(), &result.unwrap_err(), world.context.clone()));
    }
    let after = |millis| Action::requeue(Duration::from_millis(millis));
    assert_eq!(waits, [after(500), after(1000), after(2000)]);
    world.step().await.1.unwrap();
    world.fail_next("networkpolicies", 500, "not now");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [POLICY], "no Job without its policy");
    assert_eq!(on_error(world.job(), &result.unwrap_err(), world.context.clone()), after(500), "a success forgets");
}

#[tokio::test]
async fn a_status_over_an_old_version_is_refused_and_decided_anew() {
    let mut world = World::new();
    world.fail_next("/status", 409, "the object has been modified");
    let (_, result) = world.step().await;
    assert_eq!(result.unwrap_err().class(), Class::Conflict);
    assert_eq!(world.status(), InferenceJobStatus::default());
    world.settle().await;
    assert!(world.status().plan.is_some());
}

#[tokio::test]
async fn what_the_api_server_refuses_is_told_to_the_user() {
    let mut world = World::new();
    world.step().await.1.unwrap();
    world.fail_next("/jobs/", 403, "exceeded quota: cpu");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS, EVENT]);
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)));
    let (_, reason, message) = world.condition(conditions::RUNNING).unwrap();
    assert_eq!(
        (reason.as_str(), message.as_str()),
        ("Refused", "the API server refused Job hello-1-0: exceeded quota: cpu")
    );
    assert_eq!(world.status().start_time, None);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS], "it is tried again");
}

#[tokio::test]
async fn suspending_stops_the_pods_counts_them_and_resuming_goes_on() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.suspend = true);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD, STATUS]);
    assert_eq!(sent[0].body, json!({"spec": {"suspend": true, "backoffLimit": 3}}));
    assert_eq!(sent[0].content_type, "application/merge-patch+json");
    assert_eq!(world.condition(conditions::SUSPENDED).unwrap().1, "Stopping");

    let mut suspended = samples::child(&[("Suspended", "JobSuspended", "")]);
    suspended.spec.as_mut().unwrap().suspend = Some(true);
    world.children.apply_watcher_event(&Event::Apply(suspended));
    let mut stopped = samples::ended_pod("hello-1-0-a", 143, &report());
    stopped.metadata.deletion_timestamp = stopped.metadata.creation_timestamp.clone();
    stopped.metadata.deletion_grace_period_seconds = Some(0);
    world.pod(stopped.clone());
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT, EVENT]);
    assert_eq!(world.status().state.as_deref(), Some("Suspended"));
    assert_eq!(world.status().measured.unwrap().energy_millijoules, Some(41_200), "what was spent is counted");
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-a"]);
    world.pods.apply_watcher_event(&Event::Delete(stopped));
    world.settle().await;

    world.change_job(|job| job.spec.suspend = false);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD, STATUS, EVENT]);
    assert_eq!(sent[0].body["spec"]["suspend"], false);
    assert_eq!(sent[2].body["reason"], "Resumed");
}

#[tokio::test]
async fn too_many_failed_lines_fail_the_job_with_numbers() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.max_failed_fraction = "0.04".into());
    world.pod(samples::ended_pod("hello-1-0-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    world.step().await.1.unwrap();
    let (_, reason, message) = world.condition(conditions::FAILED).unwrap();
    assert_eq!(reason, "TooManyFailedLines");
    assert!(message.starts_with("2 of 48 lines failed (0.0417), above maxFailedFraction 0.04"), "{message}");
    assert_eq!(world.status().state.as_deref(), Some("Failed"));
}

#[tokio::test]
async fn a_failed_run_fails_the_job_with_its_own_words() {
    let mut world = World::running().await;
    let mut failed = samples::report();
    failed.failure = Some(joulecast_crds::report::Failure {
        reason: "ModelNotReadable".into(),
        message: "/model/tiny/config.json: no such file".into(),
    });
    world.pod(samples::ended_pod("hello-1-0-a", 78, &serde_json::to_string(&failed).unwrap()));
    world.child(&[("Failed", "PodFailurePolicy", "Container runtime failed with exit code 78")]);
    let (sent, _) = world.step().await;
    let reasons: Vec<_> = sent[1..].iter().map(|sent| sent.body["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons, ["AttemptFailed", "ModelNotReadable"]);
    let (_, reason, message) = world.condition(conditions::FAILED).unwrap();
    assert_eq!(reason, "ModelNotReadable");
    assert_eq!(message, "/model/tiny/config.json: no such file (the last pod: exit code 78)");
}

#[tokio::test]
async fn a_run_that_left_no_report_is_told() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-a", 137, ""));
    world.child(&[("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")]);
    world.step().await.1.unwrap();
    let (value, reason, message) = world.condition(conditions::ENERGY_REPORTED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "ReportMissing"));
    assert!(message.starts_with("1 of 1 attempts"), "{message}");
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.energy_millijoules, measured.attempts_without_report), (None, 1), "absent, not 0");
}

#[tokio::test]
async fn a_job_that_is_being_deleted_gets_nothing_and_its_pods_are_released() {
    let mut world = World::running().await;
    let mut going = samples::running_pod("hello-1-0-a");
    going.metadata.deletion_timestamp = going.metadata.creation_timestamp.clone();
    world.pod(going);
    assert_eq!(orphans::release_all(&world.context).await.unwrap(), 0, "its report is still wanted");
    world.change_job(|job| {
        let deleted = serde_json::from_value(json!("2027-01-15T08:00:05Z")).unwrap();
        job.metadata.deletion_timestamp = Some(deleted);
    });
    let (sent, _) = world.step().await;
    assert!(sent.is_empty());
    assert_eq!(orphans::release_all(&world.context).await.unwrap(), 1);
    assert_eq!(names(&world.api.sent.lock().unwrap()), ["PATCH team/pods/hello-1-0-a"]);
}

#[tokio::test]
async fn a_finished_job_is_deleted_when_its_time_is_over() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    world.change_job(|job| job.spec.ttl_seconds_after_finished = Some(60));
    world.step().await.1.unwrap();
    let (_, result) = world.step().await;
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)));
    world.change_job(|job| job.spec.ttl_seconds_after_finished = Some(0));
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["DELETE team/inferencejobs/hello"]);
    assert_eq!(sent[0].body["propagationPolicy"], "Background");
    assert_eq!(sent[0].body["preconditions"]["uid"], samples::UID);
}
