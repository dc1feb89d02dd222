//! What simpler rules would take, beside the optimum: every candidate alone, round robin, random, the token threshold of
//! hybrid clusters, and greedy. A rule that breaks the limits is reported as such, not repaired.

use super::moments::Moments;
use super::problem::{Ground, Problem, ProblemError};
use super::rows::Rows;
use super::tally::{Load, Split, total};
use super::workload::Workload;
use crate::units::{Joules, Seconds, Tokens};

/// A rule's outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// `single:NAME`, `round_robin`, `random`, `token_threshold` or `greedy`.
    pub name: String,
    /// What the rule did.
    pub rule: String,
    /// Whether all limits are kept.
    pub feasible: bool,
    /// In the plan's unit, setups included.
    pub objective: f64,
    /// Joules of all requests.
    pub energy: Joules,
    /// Device-seconds of all requests.
    pub runtime: Seconds,
    /// Token-weighted mean accuracy; None without tokens.
    pub accuracy: Option<f64>,
}

/// The outcomes of all rules. `requests` are those of the workload in their order, which round robin, random and greedy
/// follow; `seed` is the random rule's.
///
/// # Errors
/// Input that cannot be planned with.
pub fn baselines(
    workload: &Workload,
    requests: &[Tokens],
    problem: &Problem<'_>,
    seed: u64,
) -> Result<Vec<Baseline>, ProblemError> {
    let ground = Ground::new(workload, problem)?;
    let rows = Rows::new(&ground);
    let compare = Compare { ground: &ground, rows: rows.as_ref().ok(), requests };
    // The problem's order, not that of names, is what round robin goes round in.
    let mut turn: Vec<usize> = vec![0; ground.len()];
    ground.order.iter().enumerate().for_each(|(k, place)| turn[*place] = k);
    let mut all: Vec<Baseline> = turn.iter().map(|k| compare.single(*k)).collect();
    let m = ground.len();
    all.push(compare.rule("round_robin", "each request to the next configuration", |i, _| turn[i % m]));
    let mut random = SplitMix(seed);
    let rule = format!("each request to a random configuration, seed {seed}");
    all.push(compare.rule("random", &rule, |_, _| turn[(random.next() % m as u64) as usize]));
    all.extend(compare.threshold());
    all.push(compare.greedy());
    Ok(all)
}

struct Compare<'a> {
    ground: &'a Ground<'a>,
    rows: Option<&'a Rows>,
    requests: &'a [Tokens],
}

impl Compare<'_> {
    fn outcome(&self, name: &str, rule: String, loads: &[Load]) -> Baseline {
        let ground = self.ground;
        let tokens: u64 = loads.iter().map(|load| load.all.tokens()).sum();
        let sum = |of: &dyn Fn(usize) -> f64| (0..loads.len()).map(of).sum::<f64>();
        let weighted = sum(&|k| ground.candidates[k].accuracy * loads[k].all.tokens() as f64);
        let energy = sum(&|k| loads[k].energy);
        let setups = sum(&|k| if loads[k].all.count > 0 { ground.setup[k] } else { 0.0 });
        Baseline {
            name: name.to_owned(),
            rule,
            feasible: self.rows.is_some_and(|rows| rows.kept(&rows.used(ground, loads))),
            objective: ground.energy_weight() * energy - ground.accuracy_weight() * weighted + setups,
            energy: Joules(energy),
            runtime: Seconds(sum(&|k| loads[k].runtime)),
            accuracy: (tokens > 0).then(|| weighted / tokens as f64),
        }
    }

    fn single(&self, k: usize) -> Baseline {
        let workload = self.ground.workload;
        let mut loads = vec![Load::default(); self.ground.len()];
        loads[k] = Load {
            all: workload.moments(),
            energy: total(workload, &self.ground.energy[k]),
            runtime: total(workload, &self.ground.runtime[k]),
        };
        let name = &self.ground.candidates[k].name;
        self.outcome(&format!("single:{name}"), format!("all requests to {name}"), &loads)
    }

    /// A rule that looks at a request and its place in the workload.
    fn rule(&self, name: &str, rule: &str, mut choose: impl FnMut(usize, Tokens) -> usize) -> Baseline {
        let mut sums = Running::new(self.ground);
        for (i, tokens) in self.requests.iter().enumerate() {
            sums.add(*tokens, choose(i, *tokens));
        }
        self.outcome(name, rule.to_owned(), &sums.loads())
    }

    /// Wilkins, Keshav, Mortier, arXiv 2407.00010: short requests to one system, long ones to another, by a threshold on
    /// tokens. Here on x + y, with the pair and the threshold (a power of two) that do best: the rule at its strongest;
    /// one that keeps the limits goes before one that does not.
    fn threshold(&self) -> Option<Baseline> {
        let m = self.ground.len();
        if m < 2 {
            return None;
        }
        let octave = |tokens: Tokens| (u64::from(tokens.input) + u64::from(tokens.output)).max(1).ilog2() as usize;
        let mut by_octave: Vec<Running> = (0..26).map(|_| Running::new(self.ground)).collect();
        for tokens in self.requests {
            let running = &mut by_octave[octave(*tokens)];
            (0..m).for_each(|k| running.add(*tokens, k));
        }
        let by_octave: Vec<Vec<Load>> = by_octave.iter_mut().map(Running::loads).collect();
        let part = |k: usize, octaves: std::ops::Range<usize>| {
            let mut sum = Load::default();
            for loads in &by_octave[octaves] {
                sum.all.merge(&loads[k].all);
                sum.energy += loads[k].energy;
                sum.runtime += loads[k].runtime;
            }
            sum
        };
        let mut best: Option<Baseline> = None;
        for (short, long) in (0..m).flat_map(|a| (0..m).map(move |b| (a, b))).filter(|(a, b)| a != b) {
            for cut in 1..by_octave.len() {
                let mut loads = vec![Load::default(); m];
                (loads[short], loads[long]) = (part(short, 0..cut), part(long, cut..by_octave.len()));
                let [a, b] = [short, long].map(|k| &self.ground.candidates[k].name);
                let rule = format!("fewer than {} tokens to {a}, more to {b}", 1u64 << cut);
                let next = self.outcome("token_threshold", rule, &loads);
                let better = |b: &Baseline| (!next.feasible, next.objective) < (!b.feasible, b.objective);
                if best.as_ref().is_none_or(better) {
                    best = Some(next);
                }
            }
        }
        best
    }

    /// Each request in turn to the candidate that is cheapest for it among those whose limits still have room.
    fn greedy(&self) -> Baseline {
        let ground = self.ground;
        let mut left: Vec<f64> = self.rows.map_or(vec![], |rows| rows.list.iter().map(|row| row.limit).collect());
        let choose = |_: usize, tokens: Tokens| {
            let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
            let uses = |k: usize| {
                let of = self.rows.map_or(&[][..], |rows| &rows.of[k]);
                of.iter().map(move |row| {
                    (*row, self.rows.map_or(0.0, |r| r.list[*row].measure.of_request(ground, k, tokens)))
                })
            };
            let room = |k: &usize| uses(*k).all(|(row, usage)| usage <= 0.0 || usage <= left[row]);
            let cost = |k: &usize| ground.cost[*k].at(x, y);
            let best = |of: &mut dyn Iterator<Item = usize>| of.min_by(|a, b| cost(a).total_cmp(&cost(b)));
            let chosen =
                best(&mut (0..ground.len()).filter(room)).or_else(|| best(&mut (0..ground.len()))).unwrap_or(0);
            uses(chosen).collect::<Vec<_>>().into_iter().for_each(|(row, usage)| left[row] -= usage);
            chosen
        };
        self.rule("greedy", "each request in turn to its cheapest configuration with room", choose)
    }
}

/// Loads of requests as they come.
struct Running(Vec<(Moments, Split, Split)>);

impl Running {
    fn new(ground: &Ground<'_>) -> Self {
        let splits = (0..ground.len())
            .map(|k| (Moments::default(), Split::new(&ground.energy[k]), Split::new(&ground.runtime[k])));
        Self(splits.collect())
    }

    fn add(&mut self, tokens: Tokens, k: usize) {
        let (all, energy, runtime) = &mut self.0[k];
        all.add(tokens, 1);
        energy.add(tokens);
        runtime.add(tokens);
    }

    fn loads(&mut self) -> Vec<Load> {
        let load = |(all, energy, runtime): &mut (Moments, Split, Split)| Load {
            all: *all,
            energy: energy.sum_over(all),
            runtime: runtime.sum_over(all),
        };
        self.0.iter_mut().map(load).collect()
    }
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
}
