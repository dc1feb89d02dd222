//! `joulecast fit`: energy and run-time models from measured samples.

use super::plan::Output;
use crate::pictures;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use joulecast_planner::fit::{FormKind, Group, Options, Quantity, anova_across_models, fit_groups};
use joulecast_planner::predict::Model;
use joulecast_planner::samples::{self, Key, Samples};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};

/// Fit energy and run time per request to measured samples.
#[derive(Debug, Args)]
#[command(after_help = "Rows are counted from 1, the first line after the header. All errors are fractions.")]
pub struct Fit {
    /// Samples: CSV with the header model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s in any order.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    /// auto: the best form by cross-validation; paper: a0 tin + a1 tout + a2 tin tout by least squares.
    #[arg(long, value_enum, default_value_t = Form::Auto)]
    form: Form,
    /// Make batch a variable of the fit, not a key of the group.
    #[arg(long)]
    pool_batch: bool,
    /// Fit only samples with both lengths at most this, and tell the error on the others.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    train_max_tokens: Option<f64>,
    /// Chooses the folds of the cross-validation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The device's draw without work: samples that drew less are flagged and kept out.
    #[arg(long, value_name = "WATTS", requires = "device_max_watts", value_parser = positive)]
    device_idle_watts: Option<f64>,
    /// The device's largest draw: samples that drew more are flagged and kept out.
    #[arg(long, value_name = "WATTS", requires = "device_idle_watts", value_parser = positive)]
    device_max_watts: Option<f64>,
    /// Keep the models here, for `joulecast predict`.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Draw measured against predicted, residuals and cost surfaces (SVG).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Format of the report.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Auto,
    Paper,
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    (value > 0.0 && value.is_finite()).then_some(value).ok_or_else(|| "it must be positive".to_owned())
}

impl Fit {
    /// Fits, writes the report to `out` and the files that were asked for. Returns 1 where nothing could be fitted.
    ///
    /// # Errors
    /// An unreadable or malformed samples file, or a file that cannot be written.
    pub fn run(&self, out: &mut dyn Write) -> Result<u8> {
        let samples = read_samples(&self.samples)?;
        let power = self.device_idle_watts.zip(self.device_max_watts);
        if let Some((idle, most)) = power
            && idle > most
        {
            bail!("--device-idle-watts {idle} is above --device-max-watts {most}");
        }
        let form = if self.form == Form::Auto { FormKind::Auto } else { FormKind::Paper };
        let options = Options {
            form,
            pool_batch: self.pool_batch,
            train_max_tokens: self.train_max_tokens,
            seed: self.seed,
            power,
        };
        let tested = (form == FormKind::Paper).then(|| anova_across_models(&samples, &options));
        // Pictures need the samples once more.
        let kept = self.plot.is_some().then(|| samples.clone());
        let model = Model::new(form, fit_groups(samples, &options));
        if let Some(path) = &self.save {
            let text = serde_json::to_string_pretty(&model)?;
            std::fs::write(path, text).with_context(|| format!("cannot write the models to {}", path.display()))?;
        }
        if let (Some(path), Some(samples)) = (&self.plot, kept) {
            let svg = pictures::fit(&model.groups, &samples);
            std::fs::write(path, svg).with_context(|| format!("cannot write the picture to {}", path.display()))?;
        }
        match self.output {
            Output::Text => write_text(out, &model.groups)?,
            Output::Json => {
                let mut report = json!({ "groups": model.groups });
                if let Some(tested) = tested {
                    report["anova"] = json!(tested);
                }
                complete(&mut report);
                serde_json::to_writer_pretty(&mut *out, &report)?;
                writeln!(out)?;
            }
        }
        let fitted = model.groups.iter().any(|group| group.energy.is_some() || group.runtime.is_some());
        if !fitted {
            for group in &model.groups {
                let why = if group.notes.is_empty() { "no usable sample".to_owned() } else { group.notes.join("; ") };
                writeln!(stderr(), "joulecast: {}: nothing was fitted: {why}", group.name())?;
            }
        }
        Ok(u8::from(!fitted))
    }
}

/// Readers look fields up by name: what is absent is null in the report, where a saved model leaves it out.
fn complete(report: &mut Value) {
    for group in report["groups"].as_array_mut().into_iter().flatten() {
        for quantity in ["energy", "runtime"] {
            if let Some(fields) = group.get_mut(quantity).and_then(Value::as_object_mut) {
                fields.entry("floor_terms").or_insert(Value::Null);
            }
        }
    }
}

/// Reads a samples file, `-` being standard input.
///
/// # Errors
/// An unreadable or malformed file; the message names it.
pub fn read_samples(path: &Path) -> Result<BTreeMap<Key, Samples>> {
    let read = if path == Path::new("-") {
        samples::read(std::io::stdin().lock())
    } else {
        samples::read(File::open(path).with_context(|| format!("cannot read the samples {}", path.display()))?)
    };
    read.with_context(|| format!("in the samples {}", path.display()))
}

fn write_text(out: &mut dyn Write, groups: &[Group]) -> Result<()> {
    for group in groups {
        writeln!(out, "{} ({} samples)", group.name(), group.n)?;
        for (name, unit, quantity) in [("energy", "J", &group.energy), ("runtime", "s", &group.runtime)] {
            if let Some(quantity) = quantity {
                write_quantity(out, name, unit, quantity)?;
            }
        }
        if !group.flagged.is_empty() {
            let rows: Vec<String> = group.flagged.iter().take(20).map(u32::to_string).collect();
            let more = if group.flagged.len() > 20 { ", ..." } else { "" };
            writeln!(out, "  plainly wrong, fitted without: {} rows: {}{more}", group.flagged.len(), rows.join(", "))?;
        }
        for rejected in group.rejected.iter().take(10) {
            writeln!(out, "  row {} is no measurement: {}", rejected.row, rejected.reason)?;
        }
        for note in &group.notes {
            writeln!(out, "  {note}")?;
        }
    }
    Ok(())
}

fn write_quantity(out: &mut dyn Write, name: &str, unit: &str, quantity: &Quantity) -> Result<()> {
    let percent = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{:.1} %", 100.0 * v));
    let figure = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    writeln!(
        out,
        "  {name}: {} form, R2 {}, cross-validated median error {}, R2 {}{}",
        quantity.family,
        figure(quantity.r2),
        percent(quantity.cv_median_ape),
        figure(quantity.cv_r2),
        quantity.holdout_median_ape.map_or_else(String::new, |v| format!(", median error on longer ones {:.1} %", 100.0 * v)),
    )?;
    if quantity.negative_predictions > 0 {
        writeln!(out, "    {} predictions are not positive", quantity.negative_predictions)?;
    }
    let floor = quantity.floor_terms.iter().flatten().map(|(term, c)| (format!("floor {term}"), *c, None));
    let terms = quantity.terms.iter().map(|(term, c)| (term.clone(), *c, quantity.standard_errors.get(term)));
    for (term, c, error) in terms.chain(floor).filter(|(_, c, _)| *c != 0.0) {
        let error = error.map_or_else(String::new, |e| format!(" (standard error {e:.2e})"));
        writeln!(out, "    {term:<20} {c:>12.4e} {unit}{error}")?;
    }
    if let Some(tests) = &quantity.tests {
        let r = &tests.regression;
        writeln!(out, "    R2 without centring {:.4}; F({}, {}) = {:.1}, p = {:.1e}", r.r2_uncentred, r.coefficients.len(), r.freedom, r.f, r.f_p)?;
        for (term, (t, p)) in ["tin", "tout", "tin_tout"].iter().zip(r.t.iter().zip(&r.t_p)) {
            writeln!(out, "    {term:<20} t = {t:.2}, p = {p:.1e}")?;
        }
    }
    Ok(())
}
