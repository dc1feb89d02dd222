//! `joulecast sweep`: the front of energy against accuracy over zeta.

use super::plan::{Input, Output, baselines_json, figures, refuse};
use crate::plot;
use anyhow::{Context, Result};
use clap::Args;
use joulecast_planner::plan::{Along, Outcome, Plan, Problem, ProblemError, Workload, baselines, solve};
use serde_json::{Value, json};
use std::io::{Write, stderr};
use std::path::PathBuf;
use std::time::Instant;

/// Plan at evenly spaced weights between accuracy only and energy only.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 a plan for every zeta; 2 bad arguments or input; 3 proved infeasible; 4 undecided \
                        within the time limit (which is for the whole sweep)."
)]
pub struct Sweep {
    #[command(flatten)]
    input: Input,
    /// Number of weights, from 0 to 1.
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    points: u32,
    /// Seed of the random baseline.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Draw the front with the baselines (SVG).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Format of the report.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

struct Swept {
    zeta: f64,
    outcome: Outcome,
    seconds: f64,
}

impl Sweep {
    /// Plans along zeta and reports; returns the process's exit code.
    ///
    /// # Errors
    /// A report or file that cannot be written.
    pub fn run(&self, out: &mut impl Write) -> Result<u8> {
        let (requests, candidates) = match self.input.read() {
            Ok(read) => read,
            Err(error) => return refuse(&error),
        };
        let problem = |zeta| Problem { candidates: &candidates, zeta, normalisers: None, limits: self.input.limits() };
        let started = Instant::now();
        let swept = Workload::new(&requests).map_err(ProblemError::from).and_then(|workload| {
            let swept = self.sweep(&workload, &problem, started)?;
            Ok((workload, swept))
        });
        let solve_seconds = started.elapsed().as_secs_f64();
        let (workload, swept) = match swept {
            Ok(swept) => swept,
            Err(error) => return refuse(&error.into()),
        };
        let rules = baselines(&workload, &requests, &problem(0.5), self.seed)?;
        let plans = || swept.iter().filter_map(|s| planned(s).map(|plan| (s, plan)));
        match self.output {
            Output::Json => {
                let points: Vec<Value> = swept.iter().map(|s| point(&problem(s.zeta), s)).collect();
                let report = json!({
                    "points": points, "baselines": baselines_json(&rules), "solve_seconds": solve_seconds,
                });
                writeln!(out, "{report}")?;
            }
            Output::Text => {
                writeln!(
                    out,
                    "{:>6}  {:>16}  {:>16}  {:>9}  {:>9}",
                    "zeta", "joules", "device-seconds", "accuracy", "gap"
                )?;
                for (s, plan) in plans() {
                    let accuracy = plan.accuracy.map_or("-".to_owned(), |a| format!("{a:.4}"));
                    let (joules, seconds) = (plan.energy.0, plan.runtime.0);
                    writeln!(
                        out,
                        "{:>6.3}  {joules:>16.1}  {seconds:>16.1}  {accuracy:>9}  {:>9.1e}",
                        s.zeta, plan.gap
                    )?;
                }
                writeln!(out, "{} plans in {solve_seconds:.3} s", plans().count())?;
            }
        }
        if let Some(path) = &self.plot {
            let points: Vec<plot::FrontPoint> = plans()
                .filter_map(|(s, plan)| {
                    plan.accuracy.map(|accuracy| plot::FrontPoint { zeta: s.zeta, energy_j: plan.energy.0, accuracy })
                })
                .collect();
            std::fs::write(path, plot::front(&points, &rules))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        for s in &swept {
            match &s.outcome {
                Outcome::Planned(_) => {}
                Outcome::Infeasible(reason) => {
                    writeln!(stderr(), "joulecast: infeasible: {reason}")?;
                    return Ok(3);
                }
                Outcome::Undecided { reason, .. } => {
                    writeln!(stderr(), "joulecast: undecided at zeta {}: {reason}", s.zeta)?;
                    return Ok(4);
                }
            }
        }
        Ok(0)
    }

    fn sweep<'a>(
        &self,
        workload: &Workload,
        problem: &dyn Fn(f64) -> Problem<'a>,
        started: Instant,
    ) -> Result<Vec<Swept>, ProblemError> {
        let patience = self.input.patience();
        let mut along = Along::default();
        let mut swept = vec![];
        for i in 0..self.points {
            let zeta = f64::from(i) / f64::from(self.points - 1);
            let begun = Instant::now();
            let start = along.start(zeta);
            let outcome = solve(workload, &problem(zeta), start.as_deref(), &|| started.elapsed() > patience)?;
            if let Outcome::Planned(plan) = &outcome {
                along.add(zeta, plan);
            }
            swept.push(Swept { zeta, outcome, seconds: begun.elapsed().as_secs_f64() });
        }
        Ok(swept)
    }
}

fn planned(swept: &Swept) -> Option<&Plan> {
    if let Outcome::Planned(plan) = &swept.outcome { Some(plan) } else { None }
}

fn point(problem: &Problem<'_>, swept: &Swept) -> Value {
    let mut point = match &swept.outcome {
        Outcome::Planned(plan) => figures(problem, plan),
        Outcome::Infeasible(reason) => {
            [("status".into(), json!("infeasible")), ("reason".into(), json!(reason))].into_iter().collect()
        }
        Outcome::Undecided { reason, .. } => {
            [("status".into(), json!("undecided")), ("reason".into(), json!(reason))].into_iter().collect()
        }
    };
    point.insert("feasible".into(), json!(planned(swept).is_some()));
    point.insert("zeta".into(), json!(swept.zeta));
    point.insert("solve_seconds".into(), json!(swept.seconds));
    Value::Object(point)
}
