//! How long planning takes: shares, budgets, sweeps, and planning again after a change. Milliseconds of the thread's own
//! CPU time, so that a busy machine shows less; the least and the median of several runs, apart for ordering the requests,
//! solving, and naming each request's candidate.
//!
//! `cargo bench -p joulecast-planner --bench plan -- [shares|budget|sweep|again] [REQUESTS] [chat|uniform]`; without
//! arguments all of them.

use joulecast_planner::cost::{Cost, Terms};
use joulecast_planner::plan::{Along, Candidate, Limits, Outcome, Plan, Problem, Setup, Share, Workload, solve};
use joulecast_planner::units::{Seconds, Tokens};
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::io::{Write, stdout};

/// Seconds of CPU that this thread has used.
fn cpu() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + 1e-9 * now.tv_nsec as f64
}

/// Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// Token counts as chats have them (lognormal, 1 to 8192) or, for comparison, evenly spread ones (1 to 2048).
fn requests(kind: &str, n: usize, seed: u64) -> Vec<Tokens> {
    let mut random = SplitMix(seed);
    let mut count = |median: f64, spread: f64| match kind {
        "uniform" => 1 + (random.next() % 2048) as u32,
        _ => (median * (spread * random.normal()).exp()).round().clamp(1.0, 8192.0) as u32,
    };
    (0..n).map(|_| Tokens { input: count(512.0, 1.0), output: count(160.0, 0.9) }).collect()
}

/// Sixteen candidates: four models on four devices. `knots` puts a step at 1024 tokens of context into each.
fn candidates(requests: &[Tokens], knots: bool) -> Vec<Candidate> {
    let mut all = vec![];
    for k in 0..16u32 {
        let (model, device) = (f64::from(k / 4), f64::from(k % 4));
        let (size, speed) = (1.8f64.powf(model), 1.6f64.powf(device));
        let cost = |scale: f64, base: f64| {
            let mut cost = Cost::from(Terms {
                constant: base,
                tin: scale * 0.004,
                tin2: scale * 2e-7,
                tout: scale * 0.05,
                tin_tout: scale * 1.1e-6,
                tout2: scale * 7e-7,
            });
            if knots {
                cost.knot_mut(1024 + 64 * k).step = scale * 0.02;
            }
            cost
        };
        let (energy, runtime) =
            (cost(size * speed.powf(0.4), 2.0 * device), cost(0.02 * size / speed, 0.03 + 0.01 * model));
        let whole: f64 = requests.iter().map(|t| runtime.at(*t)).sum();
        all.push(Candidate {
            name: format!("m{}-d{}", k / 4, k % 4),
            energy,
            runtime,
            accuracy: 0.45 + 0.09 * model,
            share: Some(Share { min: 0.02, max: 0.10 }),
            budget: Some(Seconds(whole * 0.075)),
            setup: Setup::default(),
            slots: None,
        });
    }
    all
}

fn planned(outcome: Outcome) -> Box<Plan> {
    match outcome {
        Outcome::Planned(plan) => plan,
        Outcome::Infeasible(reason) | Outcome::Undecided { reason, .. } => panic!("no plan: {reason}"),
    }
}

fn limits(kind: &str) -> Limits {
    Limits { shares: kind != "budget", budgets: kind == "budget", ..Limits::default() }
}

/// Least and median of the columns, in milliseconds.
fn show(title: &str, names: &[&str], mut runs: Vec<Vec<f64>>, note: &str) {
    let columns = names.iter().enumerate().map(|(i, name)| {
        runs.sort_by(|a, b| a[i].total_cmp(&b[i]));
        format!("{name} {:.2} ({:.2})", 1e3 * runs[0][i], 1e3 * runs[runs.len() / 2][i])
    });
    let columns: Vec<String> = columns.collect();
    let _ = writeln!(stdout(), "{title:40} {}  {note}", columns.join("  "));
}

fn once(kind: &str, shape: &str, n: usize, knots: bool) {
    let requests = requests(shape, n, 7);
    let candidates = candidates(&requests, knots);
    let problem = Problem { candidates: &candidates, zeta: 0.5, normalisers: None, limits: limits(kind) };
    let (mut runs, mut gap) = (vec![], 0.0);
    for _ in 0..if n > 2_000_000 { 3 } else { 9 } {
        let begun = cpu();
        let workload = Workload::new(&requests).expect("a workload");
        let ordered = cpu() - begun;
        let plan = planned(solve(&workload, &problem, None, &|| false).expect("a problem"));
        let solved = cpu() - begun;
        black_box(plan.assign(&workload, &requests).expect("an assignment"));
        let all = cpu() - begun;
        runs.push(vec![all, ordered, solved - ordered, all - solved]);
        gap = plan.gap;
    }
    let title = format!("{kind} {shape} {n}{}", if knots { " knots" } else { "" });
    show(&title, &["all", "order", "solve", "assign"], runs, &format!("gap {gap:.1e}"));
}

fn sweep(kind: &str, shape: &str, n: usize) {
    let requests = requests(shape, n, 7);
    let candidates = candidates(&requests, false);
    let (mut runs, mut worst) = (vec![], 0.0f64);
    for _ in 0..3 {
        let begun = cpu();
        let workload = Workload::new(&requests).expect("a workload");
        let mut along = Along::default();
        for i in 0..50 {
            let zeta = f64::from(i) / 49.0;
            let problem = Problem { candidates: &candidates, zeta, normalisers: None, limits: limits(kind) };
            let plan = planned(solve(&workload, &problem, along.start(zeta).as_deref(), &|| false).expect("a problem"));
            along.add(zeta, &plan);
            worst = worst.max(plan.gap);
        }
        runs.push(vec![cpu() - begun]);
    }
    show(&format!("sweep of 50, {kind} {shape} {n}"), &["all"], runs, &format!("gap {worst:.1e}"));
}

/// One request in a hundred changed, prices known.
fn again(kind: &str, shape: &str, n: usize) {
    let mut old = requests(shape, n, 7);
    let candidates = candidates(&old, false);
    let problem = Problem { candidates: &candidates, zeta: 0.5, normalisers: None, limits: limits(kind) };
    let workload = Workload::new(&old).expect("a workload");
    let plan = planned(solve(&workload, &problem, None, &|| false).expect("a problem"));
    let prices: Vec<f64> = plan.placements.iter().map(|p| p.price).collect();
    let new = requests(shape, n, 8);
    (0..n).step_by(100).for_each(|i| old[i] = new[i]);
    let (mut runs, mut gap) = (vec![], 0.0);
    for _ in 0..9 {
        let begun = cpu();
        let workload = Workload::new(&old).expect("a workload");
        let ordered = cpu() - begun;
        let plan = planned(solve(&workload, &problem, Some(&prices), &|| false).expect("a problem"));
        let all = cpu() - begun;
        runs.push(vec![all, ordered, all - ordered]);
        gap = plan.gap;
    }
    show(&format!("again {kind} {shape} {n}"), &["all", "order", "solve"], runs, &format!("gap {gap:.1e}"));
}

fn main() {
    let asked: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let wanted = |kind: &str| asked.first().is_none_or(|a| a == kind);
    let sizes: Vec<usize> = match asked.get(1).and_then(|a| a.parse().ok()) {
        Some(n) => vec![n],
        None => vec![500, 10_000, 100_000, 1_000_000, 10_000_000],
    };
    for n in sizes {
        for shape in ["chat", "uniform"].into_iter().filter(|s| asked.get(2).is_none_or(|a| a == s)) {
            for kind in ["shares", "budget"].into_iter().filter(|k| wanted(k)) {
                once(kind, shape, n, false);
                once(kind, shape, n, true);
            }
            if n <= 1_000_000 && wanted("sweep") {
                sweep("shares", shape, n);
            }
            for kind in ["shares", "budget"].into_iter().filter(|_| n <= 1_000_000 && wanted("again")) {
                again(kind, shape, n);
            }
        }
    }
}
