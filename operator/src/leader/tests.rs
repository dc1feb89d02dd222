use super::*;
use futures::future::BoxFuture;
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

/// An API server that keeps one Lease, with versions.
#[derive(Clone)]
struct FakeApi {
    lease: Arc<Mutex<Option<Value>>>,
    version: Arc<Mutex<u64>>,
    away: Arc<AtomicBool>,
}

impl Default for FakeApi {
    /// With the Lease as the chart makes it.
    fn default() -> Self {
        let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "operator", "resourceVersion": "1"}});
        Self { lease: Arc::new(Mutex::new(Some(lease))), version: Arc::new(Mutex::new(1)), away: Arc::default() }
    }
}

impl FakeApi {
    fn holder(&self) -> Option<String> {
        let lease = self.lease.lock().unwrap();
        lease.as_ref()?["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }

    fn answer(&self, method: &Method, mut body: Value) -> (u16, Value) {
        let mut lease = self.lease.lock().unwrap();
        let failure = |code: u16| {
            (
                code,
                json!({"kind": "Status", "status": "Failure", "code": code, "message": "no", "reason": if code == 404 { "NotFound" } else { "Conflict" }, "metadata": {}}),
            )
        };
        let store = |lease: &mut Option<Value>, body: &mut Value| {
            let mut version = self.version.lock().unwrap();
            *version += 1;
            body["metadata"]["resourceVersion"] = json!(version.to_string());
            *lease = Some(body.clone());
        };
        match *method {
            Method::GET => lease.clone().map_or_else(|| failure(404), |lease| (200, lease)),
            Method::PUT
                if lease.as_ref().map(|lease| &lease["metadata"]["resourceVersion"])
                    != Some(&body["metadata"]["resourceVersion"]) =>
            {
                failure(409)
            }
            Method::PUT => {
                store(&mut lease, &mut body);
                (200, body)
            }
            _ => failure(405),
        }
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
            if this.away.load(Ordering::SeqCst) {
                return std::future::pending().await;
            }
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await.unwrap().to_bytes();
            let (code, answer) = this.answer(&parts.method, serde_json::from_slice(&bytes).unwrap_or(Value::Null));
            Ok(Response::builder().status(code).body(Body::from(serde_json::to_vec(&answer).unwrap())).unwrap())
        })
    }
}

/// A clock that goes on with every look at it: a renewal that changes nothing would be no sign of life.
fn clock() -> Timestamp {
    static LOOKS: AtomicI64 = AtomicI64::new(1_800_000_000);
    Timestamp::from_second(LOOKS.fetch_add(1, Ordering::SeqCst)).unwrap()
}

/// The times of the tests: the shortest that a Lease can state, which is whole seconds.
const FAST: Timing =
    Timing { duration: Duration::from_secs(1), give_up: Duration::from_millis(600), every: Duration::from_millis(100) };

fn candidate(api: &FakeApi, identity: &str) -> Candidate {
    Candidate::new(Client::new(api.clone(), "system"), "system", "operator", identity, FAST, clock)
}

#[tokio::test(start_paused = true)]
async fn of_two_one_leads_and_the_other_follows_when_the_first_is_gone() {
    let api = FakeApi::default();
    let (mut a, mut b) = (candidate(&api, "a"), candidate(&api, "b"));
    a.win().await;
    assert!(timeout(FAST.duration * 2, async { tokio::join!(a.hold(), b.win()) }).await.is_err(), "a renews");
    assert_eq!(api.holder().as_deref(), Some("a"));
    // a is killed: nothing renews.
    let began = Instant::now();
    b.win().await;
    let waited = began.elapsed();
    assert!(waited > FAST.give_up && waited < FAST.duration * 3, "taken after {waited:?}");
    assert_eq!(api.holder().as_deref(), Some("b"));
    assert_eq!(api.lease.lock().unwrap().as_ref().unwrap()["spec"]["leaseTransitions"], 2);
    // One that was only stopped finds out before it does anything.
    timeout(Duration::from_secs(3), a.hold()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_given_back_is_taken_at_once() {
    let api = FakeApi::default();
    let (mut a, mut b) = (candidate(&api, "a"), candidate(&api, "b"));
    a.win().await;
    b.turn().await.unwrap();
    a.release().await;
    assert_eq!(api.holder(), None);
    let began = Instant::now();
    b.win().await;
    assert!(began.elapsed() < FAST.duration, "it need not wait for the end of the Lease");
    a.release().await;
    assert_eq!(api.holder().as_deref(), Some("b"), "nobody gives back what is not his");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_cannot_renew_stops_before_another_may_begin() {
    let api = FakeApi::default();
    let mut a = candidate(&api, "a");
    a.win().await;
    api.away.store(true, Ordering::SeqCst);
    let began = Instant::now();
    a.hold().await;
    assert!(began.elapsed() >= FAST.give_up && began.elapsed() < FAST.duration, "{:?}", began.elapsed());
    let real = Timing::default();
    assert!(real.give_up + real.every < real.duration);
}

#[tokio::test(start_paused = true)]
async fn of_many_who_reach_for_it_at_once_one_gets_it() {
    let api = FakeApi::default();
    let mut candidates: Vec<Candidate> = (0..5).map(|n| candidate(&api, &format!("c{n}"))).collect();
    let turns = futures::future::join_all(candidates.iter_mut().map(Candidate::turn)).await;
    assert_eq!(turns.iter().filter(|turn| matches!(turn, Ok(Turn::Ours))).count(), 1, "{turns:?}");
}

#[tokio::test(start_paused = true)]
async fn who_uninstalls_takes_it_from_the_leader_who_stops() {
    let api = FakeApi::default();
    let (mut a, mut uninstalls) = (candidate(&api, "a"), candidate(&api, "uninstall"));
    a.win().await;
    uninstalls.seize(Duration::from_secs(60)).await.unwrap();
    timeout(FAST.duration, a.hold()).await.unwrap();
    assert!(timeout(FAST.duration * 2, a.win()).await.is_err(), "and nobody else begins");
    assert_eq!(api.holder().as_deref(), Some("uninstall"));
}

#[test]
fn what_may_be_written_over_which_lease() {
    let held = |by: &str, seconds: Option<i32>| LeaseSpec {
        holder_identity: Some(by.into()),
        lease_duration_seconds: seconds,
        lease_transitions: Some(4),
        ..LeaseSpec::default()
    };
    let ours = Duration::from_secs(15);
    for (current, since, expected) in [
        (LeaseSpec::default(), 0, Some(1)),
        (held("me", Some(15)), 0, Some(4)),
        (held("", Some(15)), 0, Some(5)),
        (held("other", Some(15)), 14, None),
        (held("other", Some(15)), 15, Some(5)),
        (held("other", Some(40)), 39, None),
        (held("other", None), 15, Some(5)),
    ] {
        let spec = next(&current, "me", Duration::from_secs(since), ours, clock());
        assert_eq!(spec.as_ref().and_then(|spec| spec.lease_transitions), expected, "{current:?} {since}");
        assert!(spec.is_none_or(|spec| spec.holder_identity.as_deref() == Some("me")));
    }
}
