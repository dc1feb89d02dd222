//! `joulecast compare`: what serving configurations save against each other.

use super::fit::read_samples;
use super::plan::Output;
use anyhow::{Context, Result};
use clap::Args;
use joulecast_planner::compare::{Comparison, Metric, compare, read_table, runs_of_samples};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// Compare serving configurations: savings of each against each by model, with tests where runs were repeated.
#[derive(Debug, Args)]
#[command(after_help = "In JSON a saving is a fraction: 1 - (what the configuration takes) / (what the other one takes).")]
pub struct Compare {
    #[command(flatten)]
    input: Input,
    /// Format of the report.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Runs: CSV with the header model,config,energy_j,duration_s and optionally run, cpu_energy_j, gpu_energy_j, columns of
    /// utilisation (`util` or `usage` in the name) and of work (requests, tokens_in, tokens_out).
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Samples, as for `joulecast fit`: compared on the points that all configurations of a model have.
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
}

impl Compare {
    /// Writes the comparison to `out`.
    ///
    /// # Errors
    /// An unreadable or malformed file, or one without runs that can be compared.
    pub fn run(&self, out: &mut dyn Write) -> Result<u8> {
        let runs = match (&self.input.table, &self.input.samples) {
            (Some(path), _) => {
                let file = File::open(path).with_context(|| format!("cannot read the table {}", path.display()))?;
                read_table(file).with_context(|| format!("in the table {}", path.display()))?
            }
            (None, Some(path)) => runs_of_samples(&read_samples(path)?),
            (None, None) => vec![],
        };
        anyhow::ensure!(!runs.is_empty(), "no point (tau_in, tau_out, batch) was measured on all configurations of a model");
        let comparison = compare(&runs);
        match self.output {
            Output::Text => write_text(out, &comparison)?,
            Output::Json => {
                serde_json::to_writer_pretty(&mut *out, &comparison)?;
                writeln!(out)?;
            }
        }
        Ok(0)
    }
}

fn write_text(out: &mut dyn Write, comparison: &Comparison) -> Result<()> {
    for warning in &comparison.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    for metric in &comparison.metrics {
        writeln!(out, "\n{}: savings in per cent, smallest to largest of the models (median)", metric.metric)?;
        // Each pair once, the way round that saves.
        for pair in &metric.pairs {
            let saves = pair.median > 0.0 || (pair.median == 0.0 && pair.config < pair.against);
            if saves {
                let [min, median, max] = [pair.min, pair.median, pair.max].map(|v| 100.0 * v);
                let n = pair.models.len();
                writeln!(
                    out,
                    "  {:<20} against {:<20} {min:>8.2} to {max:>6.2} ({median:.2}), {n} models",
                    pair.config, pair.against
                )?;
            }
        }
        for best in &metric.best_against_worst {
            let (min, max) = (100.0 * best.min, 100.0 * best.max);
            let without =
                if best.left_out.is_empty() { String::new() } else { format!(" without {}", best.left_out.join(", ")) };
            writeln!(
                out,
                "  {}{without}: best against worst configuration of each model {min:.2} to {max:.2}",
                best.provider
            )?;
            for (model, (low, high, saving)) in &best.models {
                writeln!(out, "    {model:<28} {low} saves {:.2} against {high}", 100.0 * saving)?;
            }
        }
        write_tests(out, metric)?;
    }
    Ok(())
}

fn write_tests(out: &mut dyn Write, metric: &Metric) -> Result<()> {
    for of_model in &metric.tests {
        let tests = &of_model.tests;
        let kruskal = &tests.kruskal_wallis;
        write!(
            out,
            "  {}: Kruskal-Wallis H({}) = {:.2}, p = {:.2e}, epsilon2 {:.3}",
            of_model.model, kruskal.freedom, kruskal.h, kruskal.p, kruskal.epsilon_squared
        )?;
        match &tests.welch {
            Some(w) => writeln!(out, "; Welch F({:.0}, {:.1}) = {:.2}, p = {:.2e}, omega2 {:.3}", w.above, w.below, w.f, w.p, w.omega_squared)?,
            None => writeln!(out, "; no Welch test: a configuration's runs are all equal")?,
        }
        for pair in &tests.pairs {
            let howell = pair.games_howell_p.map_or_else(String::new, |p| format!(", Games-Howell p {p:.2e}"));
            let hedges = pair.hedges_g.map_or_else(String::new, |g| format!(", Hedges g {g:.2}"));
            writeln!(
                out,
                "    {} - {}: Dunn-Holm p {:.2e}{howell}, Cliff's delta {:.2}{hedges}",
                of_model.configs[pair.a], of_model.configs[pair.b], pair.dunn_holm_p, pair.cliffs_delta
            )?;
        }
    }
    Ok(())
}
