//! `joulecast plan`: the cheapest placement of a workload file on the candidates of a configurations file.

use super::access::Access;
use super::dry_run;
use crate::{configs, workload};
use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use joulecast_planner::plan::{
    Baseline, Candidate, Limits, Outcome, Plan, Problem, ProblemError, Proof, Workload, baselines, solve_longer,
};
use joulecast_planner::units::{Joules, Tokens};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write, stderr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Place each request of a workload on the candidate that is best for it and for the whole: from files (--workload,
/// --configs, --zeta), or what a cluster would do with a job (-f), without doing it.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 a verified assignment; 2 bad arguments or input; 3 proved infeasible (the reason on \
                        stderr); 4 undecided within the time limit."
)]
pub struct PlanCommand {
    #[command(flatten)]
    input: Input,
    /// An InferenceJob to be planned by the cluster and not started: a YAML file, or - for standard input.
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with_all = ["workload", "configs", "zeta", "assignments", "plot"])]
    filename: Option<PathBuf>,
    /// With -f: give up after this many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
    #[command(flatten)]
    access: Access,
    /// Weight of energy against accuracy: 1 saves energy only, 0 looks at accuracy only.
    #[arg(long, value_parser = zeta)]
    zeta: Option<f64>,
    /// Write the chosen configuration of each request here, a name a line in the workload's order.
    #[arg(long, value_name = "FILE")]
    assignments: Option<PathBuf>,
    /// Report what simpler rules would take: each configuration alone, round robin, random, token threshold, greedy.
    #[arg(long)]
    baselines: bool,
    /// Seed of the random baseline.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Draw which configuration each request goes to (SVG).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Format of the report.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What both `plan` and `sweep` read.
#[derive(Debug, Args)]
pub struct Input {
    /// Requests: CSV with the header `tau_in,tau_out`, or Parquet with these columns.
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,
    /// Configurations to choose from (JSON).
    #[arg(long, value_name = "FILE")]
    configs: Option<PathBuf>,
    /// The limits of each configuration to keep.
    #[arg(long, value_enum, default_value_t = Constraint::Shares)]
    constraint: Constraint,
    /// Limit on the joules of the whole plan, setups included.
    #[arg(long, value_name = "JOULES")]
    max_energy: Option<f64>,
    /// Least token-weighted mean accuracy.
    #[arg(long, value_name = "SCORE")]
    min_accuracy: Option<f64>,
    /// Give up after this many seconds (60 if not given). Part of a limit that is given goes into a better `plan`, where
    /// limits other than shares leave a gap.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    time_limit: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Constraint {
    /// The number of requests on each configuration stays within its share.
    Shares,
    /// The device-seconds on each configuration stay within its `budget_seconds`.
    Budget,
}

/// Format of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table to read.
    Text,
    /// One JSON document.
    Json,
}

fn zeta(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    (0.0..=1.0).contains(&value).then_some(value).ok_or_else(|| "it must be between 0 and 1".to_owned())
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    (value > 0.0 && value <= 1e9).then_some(value).ok_or_else(|| "it must be a positive number of seconds".to_owned())
}

impl Input {
    /// Reads both files.
    ///
    /// # Errors
    /// Unreadable or malformed files.
    pub fn read(&self) -> Result<(Vec<Tokens>, Vec<Candidate>)> {
        let given = |file: &'_ Option<PathBuf>, missing: &'static str| file.clone().context(missing);
        let workload = given(
            &self.workload,
            "--workload is missing: give the requests, CSV or Parquet with the columns tau_in and tau_out",
        )?;
        let configs = given(&self.configs, "--configs is missing: give the configurations to choose from, JSON")?;
        Ok((workload::read(&workload)?, configs::read(&configs)?))
    }

    /// The limits that the arguments ask for.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            shares: self.constraint == Constraint::Shares,
            budgets: self.constraint == Constraint::Budget,
            energy: self.max_energy.map(Joules),
            accuracy: self.min_accuracy,
            deadline: None,
        }
    }

    /// How long the solver may take.
    #[must_use]
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.time_limit.unwrap_or(60.0))
    }

    /// Steps for a better plan: a number that takes less than the limit, so that it is the input that decides on the plan.
    fn steps(&self) -> u64 {
        const PER_SECOND: f64 = 300_000.0;
        (self.time_limit.unwrap_or(0.0) * PER_SECOND) as u64
    }
}

impl PlanCommand {
    /// Plans and reports; returns the process's exit code.
    ///
    /// # Errors
    /// A report or file that cannot be written.
    pub fn run(&self, out: &mut impl Write) -> Result<u8> {
        if let Some(file) = &self.filename {
            let timeout = Duration::from_secs(self.timeout.into());
            return dry_run::run(file, &self.access, timeout, self.output == Output::Json, out);
        }
        let (requests, candidates) = match self.input.read() {
            Ok(read) => read,
            Err(error) => return refuse(&error),
        };
        let Some(zeta) = self.zeta else {
            return refuse(&anyhow!("--zeta is missing: give the weight of energy against accuracy, between 0 and 1"));
        };
        let problem = Problem { candidates: &candidates, zeta, normalisers: None, limits: self.input.limits() };
        let (started, cpu_started) = (Instant::now(), cpu_seconds());
        let patience = self.input.patience();
        let solved = decide(&requests, &problem, self.input.steps(), &|| started.elapsed() > patience);
        let (solve_seconds, solve_cpu_seconds) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu_started);
        let (workload, decided) = match solved {
            Ok(solved) => solved,
            Err(error) => return refuse(&error.into()),
        };
        let compared = if self.baselines { baselines(&workload, &requests, &problem, self.seed)? } else { vec![] };
        let mut report = report(&problem, &decided);
        report.insert("solve_seconds".into(), json!(solve_seconds));
        report.insert("solve_cpu_seconds".into(), json!(solve_cpu_seconds));
        if self.baselines {
            report.insert("baselines".into(), baselines_json(&compared));
        }
        match self.output {
            Output::Json => writeln!(out, "{}", Value::Object(report))?,
            Output::Text => table(out, &problem, &decided, &compared, solve_seconds)?,
        }
        match &decided {
            Decided::Plan(plan, assigned) => {
                if let Some(path) = &self.assignments {
                    write_assignments(path, assigned, &candidates)?;
                }
                if let Some(path) = &self.plot {
                    let picture = crate::plot::regions(&requests, assigned, plan, &candidates);
                    std::fs::write(path, picture).with_context(|| format!("cannot write {}", path.display()))?;
                }
                Ok(0)
            }
            Decided::No { infeasible, reason, .. } => {
                writeln!(stderr(), "joulecast: {}: {reason}", if *infeasible { "infeasible" } else { "undecided" })?;
                Ok(if *infeasible { 3 } else { 4 })
            }
        }
    }
}

/// CPU time of this thread, on which the solver works alone: what a solver costs on a machine that does other things too.
fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + 1e-9 * now.tv_nsec as f64
}

/// Bad input: said on stderr, exit code 2.
pub(super) fn refuse(error: &anyhow::Error) -> Result<u8> {
    writeln!(stderr(), "joulecast: {error:#}")?;
    Ok(2)
}

enum Decided {
    Plan(Box<Plan>, Vec<u8>),
    No { infeasible: bool, reason: String, lower_bound: Option<f64> },
}

/// Plans, and checks the plan against the requests as they were read.
fn decide(
    requests: &[Tokens],
    problem: &Problem<'_>,
    steps: u64,
    stop: &dyn Fn() -> bool,
) -> Result<(Workload, Decided), ProblemError> {
    let workload = Workload::new(requests)?;
    let decided = match solve_longer(&workload, problem, None, steps, stop)? {
        Outcome::Planned(plan) => {
            let assigned = plan.assign(&workload, requests)?;
            Decided::Plan(plan, assigned)
        }
        Outcome::Infeasible(reason) => Decided::No { infeasible: true, reason, lower_bound: None },
        Outcome::Undecided { reason, lower_bound } => Decided::No { infeasible: false, reason, lower_bound },
    };
    Ok((workload, decided))
}

fn report(problem: &Problem<'_>, decided: &Decided) -> Map<String, Value> {
    let report = match decided {
        Decided::Plan(plan, _) => {
            let mut report = figures(problem, plan);
            report.insert("feasible".into(), json!(true));
            Value::Object(report)
        }
        Decided::No { infeasible, reason, lower_bound } => json!({
            "feasible": false, "status": if *infeasible { "infeasible" } else { "undecided" }, "reason": reason,
            "objective": null, "lower_bound": lower_bound, "gap": null, "energy_j": null, "runtime_s": null,
            "accuracy": null, "counts": {}, "prices": {}, "seconds_used": {},
        }),
    };
    match report {
        Value::Object(report) => report,
        _ => Map::new(),
    }
}

/// The figures of a plan under the names that interfaces fix, and some more.
pub(super) fn figures(problem: &Problem<'_>, plan: &Plan) -> Map<String, Value> {
    let named = |of: &dyn Fn(usize) -> Value| -> Value {
        let names = problem.candidates.iter().map(|c| c.name.clone());
        Value::Object(names.enumerate().map(|(k, name)| (name, of(k))).collect())
    };
    let proof = match plan.proof {
        Proof::Exact { quantum } => json!({"kind": "fixed point", "quantum": quantum, "checked": true}),
        Proof::Bound => json!({"kind": "lower bound"}),
    };
    let figures = json!({
        "status": if plan.lower_bound == plan.objective { "optimal" } else { "feasible" },
        "objective": plan.objective,
        "lower_bound": plan.lower_bound,
        "gap": plan.gap,
        "energy_j": plan.energy.0,
        "runtime_s": plan.runtime.0,
        "accuracy": plan.accuracy,
        "setup_energy_j": plan.setup_energy.0,
        "normalisers": {"energy_j": plan.normalisers.energy.0, "accuracy_tokens": plan.normalisers.accuracy},
        "counts": named(&|k| json!(plan.placements[k].moments.count)),
        "prices": named(&|k| json!(plan.placements[k].price)),
        "seconds_used": named(&|k| json!(plan.placements[k].seconds_used.0)),
        "proof": proof,
        "branched": plan.branched,
    });
    match figures {
        Value::Object(figures) => figures,
        _ => Map::new(),
    }
}

pub(super) fn baselines_json(compared: &[Baseline]) -> Value {
    let entry = |b: &Baseline| {
        let figures = json!({
            "feasible": b.feasible, "objective": b.objective, "energy_j": b.energy.0, "runtime_s": b.runtime.0,
            "accuracy": b.accuracy, "rule": b.rule,
        });
        (b.name.clone(), figures)
    };
    Value::Object(compared.iter().map(entry).collect())
}

fn table(
    out: &mut impl Write,
    problem: &Problem<'_>,
    decided: &Decided,
    compared: &[Baseline],
    solve_seconds: f64,
) -> Result<()> {
    let Decided::Plan(plan, _) = decided else { return Ok(()) };
    let accuracy = |a: Option<f64>| a.map_or("-".to_owned(), |a| format!("{a:.4}"));
    writeln!(out, "objective {:.6}, lower bound {:.6}, gap {:.2e}", plan.objective, plan.lower_bound, plan.gap)?;
    let (joules, seconds) = (plan.energy.0, plan.runtime.0);
    writeln!(out, "energy {joules:.1} J, run time {seconds:.1} device-seconds, accuracy {}", accuracy(plan.accuracy))?;
    writeln!(out, "solved in {solve_seconds:.4} s\n")?;
    let width = problem.candidates.iter().map(|c| c.name.chars().count()).max().unwrap_or(0).max(13);
    writeln!(
        out,
        "{:width$}  {:>10}  {:>14}  {:>14}  {:>12}",
        "configuration", "requests", "joules", "seconds", "price"
    )?;
    for (candidate, placed) in problem.candidates.iter().zip(&plan.placements) {
        let (count, price) = (placed.moments.count, placed.price);
        let (joules, seconds) = (placed.energy.0, placed.seconds_used.0);
        writeln!(out, "{:width$}  {count:>10}  {joules:>14.1}  {seconds:>14.1}  {price:>12.5}", candidate.name)?;
    }
    if !compared.is_empty() {
        writeln!(
            out,
            "\n{:32}  {:>14}  {:>14}  {:>9}  {:>14}  limits",
            "instead", "joules", "seconds", "accuracy", "objective"
        )?;
    }
    for b in compared {
        let kept = if b.feasible { "kept" } else { "broken" };
        let (joules, seconds, accuracy) = (b.energy.0, b.runtime.0, accuracy(b.accuracy));
        writeln!(out, "{:32}  {joules:>14.1}  {seconds:>14.1}  {accuracy:>9}  {:>14.4}  {kept}", b.name, b.objective)?;
    }
    Ok(())
}

fn write_assignments(path: &Path, assigned: &[u8], candidates: &[Candidate]) -> Result<()> {
    let context = || format!("cannot write the assignments {}", path.display());
    let mut file = BufWriter::with_capacity(1 << 18, File::create(path).with_context(context)?);
    let lines: Vec<String> = candidates.iter().map(|c| format!("{}\n", c.name)).collect();
    for k in assigned {
        file.write_all(lines[usize::from(*k)].as_bytes()).with_context(context)?;
    }
    file.flush().with_context(context)
}
