//! What metering costs: opening and closing a window (mean by criterion, and the 99th percentile over the slot's socket),
//! and a step with 100 pods that hold slots.
#![allow(missing_docs, clippy::print_stdout)]

#[path = "../tests/metering/fake_node.rs"]
mod fake_node;

use criterion::{Criterion, criterion_group, criterion_main};
use fake_node::FakeNode;
use joulecast_device_plugin::service;
use joulecast_meter::slot::{Answer, Request};
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The 99th percentile over the socket may be at most this much.
const MAX_P99: Duration = Duration::from_micros(200);
/// Windows measured one by one for the percentile.
const WINDOWS: usize = 5_000;

fn window_in_process(criterion: &mut Criterion) {
    let mut node = FakeNode::new(2);
    let mut metering = node.metering();
    node.pass(1, |_| [1, 0, 0]);
    criterion.bench_function("window: open and close", |bencher| {
        bencher.iter(|| {
            // Each at a later time, so that each edge reads the counters.
            node.pass(1, |_| [0, 0, 0]);
            let answer = metering.answer("cpu-0", Request::Open { job: None }, node.now(), 0);
            let Answer::Opened { window, .. } = answer else { panic!("{answer:?}") };
            black_box(metering.answer("cpu-0", Request::Close { window }, node.now(), 0))
        });
    });
}

/// Opens and closes windows over a real socket, as a pod does, and prints percentiles of both together.
fn window_over_the_socket(_: &mut Criterion) {
    let node = FakeNode::new(2);
    let service = node.service(node.metering(), node.clock());
    let directory = node.path("run/cpu-0");
    let (ready, is_ready) = mpsc::channel();
    let own = directory.clone();
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let listener = service::listen(&own, "meter.sock").unwrap();
            ready.send(()).unwrap();
            let (_running, stopped) = tokio::sync::watch::channel(false);
            service::serve(service, "cpu-0".into(), listener, stopped).await;
        });
    });
    is_ready.recv().unwrap();
    let mut stream = BufReader::new(UnixStream::connect(directory.join("meter.sock")).unwrap());
    let mut ask = |request: &Request| {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        let began = Instant::now();
        stream.get_mut().write_all(&line).unwrap();
        let mut answer = String::new();
        stream.read_line(&mut answer).unwrap();
        let took = began.elapsed();
        (serde_json::from_str::<Answer>(&answer).unwrap(), took)
    };
    let (mut opens, mut closes) = (Vec::new(), Vec::new());
    for turn in 0..WINDOWS as u64 {
        // The node's clock stands still: without a step of its own every edge would be free, and pace would hold us up.
        node.later(Duration::from_millis(2 * (turn + 1)));
        let (answer, took) = ask(&Request::Open { job: None });
        opens.push(took);
        let Answer::Opened { window, .. } = answer else { panic!("{answer:?}") };
        node.later(Duration::from_millis(2 * (turn + 1) + 1));
        let (answer, took) = ask(&Request::Close { window });
        closes.push(took);
        assert!(matches!(answer, Answer::Window(_)), "{answer:?}");
    }
    for (name, mut times) in [("open", opens), ("close", closes)] {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        let (half, most) = (at(0.5), at(0.99));
        println!("{name} over the socket, {WINDOWS} times: p50 {} us, p99 {} us", half.as_micros(), most.as_micros());
        assert!(most <= MAX_P99, "{name}: p99 {most:?} is more than {MAX_P99:?}: was the machine quiet?");
    }
}

fn step_with_a_hundred_pods(criterion: &mut Criterion) {
    let mut node = FakeNode::new(100);
    let mut metering = node.metering();
    node.pass(1, |_| [1, 0, 0]);
    let mut at = node.now();
    criterion.bench_function("step: 100 pods with slots, 100 domains", |bencher| {
        bencher.iter(|| {
            at += Duration::from_millis(100);
            metering.tick(at, 0);
        });
    });
    let mut node = FakeNode::new(2);
    let mut metering = node.metering();
    node.pass(1, |_| [1, 0, 0]);
    let mut at = node.now();
    criterion.bench_function("step: 2 pods with slots, 2 domains", |bencher| {
        bencher.iter(|| {
            at += Duration::from_millis(100);
            metering.tick(at, 0);
        });
    });
}

criterion_group!(benches, window_in_process, window_over_the_socket, step_with_a_hundred_pods);
criterion_main!(benches);
