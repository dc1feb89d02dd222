//! Scenarios against a fake API server: what exactly is sent, in which order, and nothing else.
//!
//! The fake plays the part of the watches as well: what is applied to it comes back into the caches when the test says so.

use crate::controller::apply::Class;
use crate::controller::caches::{Caches, KINDS};
use crate::controller::{Context, Error, apply, on_error, orphans, reconcile, retry_after, samples};
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

mod attempts;
mod endpoints;
mod life;
mod predictions;
mod refusals;
mod replan;
mod reports;
mod sharing;

/// One request that the fake saw.
#[derive(Debug, Clone)]
struct Sent {
    what: String,
    content_type: String,
    query: String,
    body: Value,
    accepted: bool,
}

/// A scripted failure: part of the request that it waits for, HTTP code, message. With the message [`LOST`] the request is
/// carried out and only its answer is lost, as if the operator had died in between.
type Failure = (&'static str, u16, &'static str);

const LOST: &str = "carried out; the answer is lost";

/// The fake API server: records everything, answers with what it was sent, or with the next scripted failure.
#[derive(Clone, Default)]
struct FakeApi {
    sent: Arc<Mutex<Vec<Sent>>>,
    failures: Arc<Mutex<VecDeque<Failure>>>,
    count: Arc<Mutex<Writes>>,
}

/// How many writes there were, and at which one the operator dies (and whether only the answer is lost).
type Writes = (usize, Option<(usize, bool)>);

impl FakeApi {
    fn writes(&self) -> usize {
        self.count.lock().unwrap().0
    }

    fn die_at(&self, write: usize, answer_lost: bool) {
        self.count.lock().unwrap().1 = Some((write, answer_lost));
    }

    /// Counts a write; the failure that stands for a death in it.
    fn death(&self) -> Option<Failure> {
        let mut count = self.count.lock().unwrap();
        let at = count.0;
        count.0 += 1;
        count.1.filter(|(dies, _)| *dies == at).map(|(_, lost)| ("", 500, if lost { LOST } else { "dead" }))
    }
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
            if let Some(death) = this.death() {
                failures.push_front(death);
            }
            let (code, answer) = match failures.front() {
                Some((part, code, message)) if what.contains(part) => {
                    let answer = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                        "message": message, "reason": "Scripted", "metadata": {}});
                    (*code, answer)
                }
                _ => (200, answer_to(&what, body)),
            };
            let accepted = code == 200 || failures.front().is_some_and(|(_, _, message)| *message == LOST);
            if code != 200 {
                failures.pop_front();
            }
            this.sent.lock().unwrap().push(Sent { what, content_type, query, body: sent_body, accepted });
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

/// The clock of one test's operator, which the test turns.
mod clock {
    use k8s_openapi::jiff::{SignedDuration, Timestamp};
    use std::cell::Cell;

    thread_local!(static SECONDS: Cell<i64> = const { Cell::new(0) });

    pub(super) fn now() -> Timestamp {
        let later = SignedDuration::from_secs(SECONDS.get());
        crate::controller::samples::now().checked_add(later).unwrap()
    }

    pub(super) fn turn(seconds: i64) {
        SECONDS.set(SECONDS.get() + seconds);
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
    nodes: Writer<Node>,
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
        fill(&mut node_w, [samples::node("node-1", None)]);
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
            clock: clock::now,
            failures: Mutex::default(),
        };
        Self {
            api,
            context: Arc::new(context),
            jobs: job_w,
            models: model_w,
            children: child_w,
            pods: pod_w,
            nodes: node_w,
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

    /// Another operator, after this one died: it knows what the API holds.
    fn restarted(&self) -> Self {
        let mut new = Self::new();
        new.api = self.api.clone();
        let client = Client::new(new.api.clone(), "team");
        let context = Arc::get_mut(&mut new.context).unwrap();
        context.recorder =
            Recorder::new(client.clone(), Reporter { controller: "joulecast-operator".into(), instance: None });
        context.client = client;
        let caches = &self.context.caches;
        fill(&mut new.jobs, caches.jobs.state().iter().map(|job| job.as_ref().clone()));
        fill(&mut new.children, caches.children.state().iter().map(|child| child.as_ref().clone()));
        fill(&mut new.pods, caches.pods.state().iter().map(|pod| pod.as_ref().clone()));
        fill(&mut new.nodes, caches.nodes.state().iter().map(|node| node.as_ref().clone()));
        new
    }

    fn fail_next(&self, part: &'static str, code: u16, message: &'static str) {
        self.api.failures.lock().unwrap().push_back((part, code, message));
    }

    /// One reconcile; what it sent. What was written comes back into the caches, as the watches would bring it.
    async fn step(&mut self) -> (Vec<Sent>, Result<Action, Error>) {
        let result = reconcile(self.job(), self.context.clone()).await;
        let sent = std::mem::take(&mut *self.api.sent.lock().unwrap());
        let statuses = sent.iter().filter(|sent| sent.what.ends_with("/status")).count();
        assert!(statuses <= 1, "one status write a reconcile: {:?}", names(&sent));
        for sent in &sent {
            let (method, place) = sent.what.split_once(' ').unwrap();
            let mut parts = place.split('/').skip(1);
            let (kind, subresource) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
            let what = format!("{method} {kind} {subresource}");
            assert!(MAY_BE_SENT.contains(&what.trim_end()), "{what} is not of a reconcile: {}", sent.what);
        }
        for sent in sent.iter().filter(|sent| sent.accepted && sent.what.starts_with("PATCH team/jobs/")) {
            if sent.content_type.contains("apply") && !self.lagging {
                self.children.apply_watcher_event(&Event::Apply(serde_json::from_value(sent.body.clone()).unwrap()));
            } else if sent.content_type.contains("merge") {
                let name = sent.what.rsplit('/').next().unwrap();
                let mut child =
                    self.context.caches.children.get(&ObjectRef::new(name).within("team")).unwrap().as_ref().clone();
                child.spec.as_mut().unwrap().suspend = sent.body["spec"]["suspend"].as_bool();
                self.children.apply_watcher_event(&Event::Apply(child));
            }
        }
        if let Some(write) = sent.iter().find(|sent| sent.accepted && sent.what.ends_with("/status")) {
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
            for released in sent.iter().filter(|sent| sent.what.starts_with("PATCH team/pods/")) {
                let name = released.what.rsplit('/').next().unwrap();
                let pod = self.context.caches.pods.get(&ObjectRef::new(name).within("team")).unwrap();
                let mut pod = pod.as_ref().clone();
                pod.metadata.finalizers = None;
                self.pod(pod);
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

    /// A node of this name, unreachable since so many seconds after the samples' time if that is given.
    fn node(&mut self, name: &str, unreachable: Option<i64>) {
        self.nodes.apply_watcher_event(&Event::Apply(samples::node(name, unreachable)));
    }

    /// A job whose pod is at work.
    async fn running() -> Self {
        let mut world = Self::new();
        world.settle().await;
        world.pod(samples::running_pod("hello-1-0-1-a"));
        world.settle().await;
        world
    }
}

fn names(sent: &[Sent]) -> Vec<&str> {
    sent.iter().map(|sent| sent.what.as_str()).collect()
}

/// Method, kind and subresource of all that reconciles of jobs send.
const MAY_BE_SENT: [&str; 7] = [
    "PATCH inferencejobs status",
    "PATCH jobs",
    "PATCH networkpolicies",
    "PATCH pods",
    "POST events",
    "PATCH events",
    "DELETE inferencejobs",
];

const STATUS: &str = "PATCH team/inferencejobs/hello/status";
const EVENT: &str = "POST team/events";
const CHILD: &str = "PATCH team/jobs/hello-1-0-1";
const POLICY: &str = "PATCH team/networkpolicies/hello-1";

fn report() -> String {
    serde_json::to_string(&samples::report()).unwrap()
}
