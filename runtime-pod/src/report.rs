//! The report of a run: one file that knows both what the run has and what the report holds.

use crate::batch_file::result::source_name;
use crate::engine::{EngineName, Provider};
use crate::run::earlier::fold;
use crate::run::{Book, Run, RunFailure};
use joulecast_crds::names::TERMINATION_MESSAGE_BYTES;
use joulecast_crds::report::{EnergyReport, EnergySource, Failure, PhaseMilliseconds, Report, Utilisation};
use joulecast_crds::{self as crds, run_spec};
use joulecast_meter::{Microjoules, Recording, Source};
use std::time::Duration;

/// What stands in for a text that only a loaded engine could give.
const UNKNOWN: &str = "unknown";
/// Earlier attempts that stand one by one in a report, at most.
const EARLIER: usize = 8;

/// Builds the report of a run as far as it came.
#[must_use]
pub fn build(run: &Run, book: &Book, failure: Option<&RunFailure>) -> Report {
    let info = book.engine.as_ref();
    let narrow = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let recording = book.recording.as_ref();
    Report {
        version: run_spec::VERSION,
        run: run.identity.clone(),
        shard: run.division.shard,
        attempt: run.who.name.clone(),
        engine: engine_name(run.load.engine),
        engine_version: info.map_or_else(|| UNKNOWN.to_owned(), |info| info.engine_version.clone()),
        provider: provider(run.load.provider),
        device_class: run.device_class,
        dtype: info.map_or_else(|| UNKNOWN.to_owned(), |info| info.dtype.to_string()),
        batch: narrow(info.map_or(run.load.batch, |info| info.slots)),
        threads: narrow(info.map_or(run.load.threads.unwrap_or(0), |info| info.threads)),
        lines: book.lines,
        tokens_in: book.tokens_in,
        tokens_out: book.tokens_out,
        milliseconds: PhaseMilliseconds {
            idle_baseline: millis(book.idle_baseline),
            load: millis(book.load),
            prefill: millis(book.summary.prefill),
            decode: millis(book.summary.decode),
            total: millis(recording.map_or(Duration::ZERO, |recording| recording.length)),
        },
        energy: energy(recording),
        utilisation: recording.map_or_else(Utilisation::default, |recording| Utilisation {
            cpu_mean_millis: recording.cpu_mean_millis,
            cpu_peak_millis: recording.cpu_peak_millis,
            memory_peak_bytes: recording.memory_peak_bytes,
            gpu_mean_millis: recording.gpu.mean_millis,
            gpu_peak_millis: recording.gpu.peak_millis,
            gpu_memory_peak_bytes: recording.gpu.memory_peak_bytes,
        }),
        artifact_digest: book.artifact_digest.clone(),
        request_sums: book.request_sums.clone(),
        output_sha256: book.output_sha256.clone(),
        merge_pending: book.merge_pending,
        repeated_lines: book.repeated,
        earlier: book.earlier.report(),
        earlier_summed: None,
        failure: failure.map(failure_of),
    }
}

/// A failure as reports hold it.
#[must_use]
pub fn failure_of(failure: &RunFailure) -> Failure {
    Failure { reason: failure.reason().to_owned(), message: failure.to_string() }
}

fn energy(recording: Option<&Recording>) -> EnergyReport {
    let Some(recording) = recording else {
        return EnergyReport {
            source: EnergySource::Unavailable,
            meter: "none".to_owned(),
            window_milliseconds: 0,
            gross_millijoules: None,
            idle_millijoules: None,
            net_millijoules: None,
            domain_millijoules: Default::default(),
            notes: vec!["the run ended before metering began".to_owned()],
        };
    };
    let millijoules = |energy: Option<Microjoules>| energy.map(Microjoules::millijoules);
    EnergyReport {
        source: match recording.source {
            Source::Measured => EnergySource::Measured,
            Source::Modelled => EnergySource::Modelled,
            Source::Unavailable => EnergySource::Unavailable,
        },
        meter: recording.meter.clone(),
        window_milliseconds: millis(recording.length),
        gross_millijoules: millijoules(recording.gross),
        idle_millijoules: millijoules(recording.idle),
        net_millijoules: millijoules(recording.net),
        domain_millijoules: recording
            .domains
            .iter()
            .map(|(name, joules)| (name.clone(), joules.millijoules()))
            .collect(),
        notes: recording.notes.clone(),
    }
}

/// The report as JSON of at most [`TERMINATION_MESSAGE_BYTES`] bytes. Of earlier attempts the newest stand one by one, the
/// rest as a sum. What does not fit is cut in this order: long notes, more of the earlier attempts into the sum, notes, the
/// failure's message, the sums of requests, domains, names; a cut text ends in `...`.
#[must_use]
pub fn message(report: &Report) -> String {
    let mut report = report.clone();
    let fold = |report: &mut Report, keep| fold(&mut report.earlier, &mut report.earlier_summed, keep);
    let cuts: [&dyn Fn(&mut Report); 9] = [
        &|report| fold(report, EARLIER),
        &|report| {
            report.energy.notes.truncate(8);
            report.energy.notes.iter_mut().for_each(|note| cut(note, 160));
        },
        &|report| fold(report, 3),
        &|report| fold(report, 0),
        &|report| {
            report.energy.notes = vec!["notes left out: the report was too long".to_owned()];
            cut(&mut report.energy.meter, 300);
        },
        &|report| {
            if let Some(failure) = &mut report.failure {
                cut(&mut failure.reason, 60);
                cut(&mut failure.message, 700);
            }
        },
        &|report| report.request_sums = None,
        &|report| report.energy.domain_millijoules.clear(),
        &|report| {
            cut(&mut report.attempt, 63);
            cut(&mut report.engine_version, 40);
            cut(&mut report.dtype, 20);
            cut(&mut report.energy.meter, 40);
            report.output_sha256.iter_mut().for_each(|hash| cut(hash, 64));
            if let Some(run) = &mut report.run {
                // Kubernetes bounds all three at 253 bytes or less.
                [&mut run.namespace, &mut run.job, &mut run.job_uid].into_iter().for_each(|name| cut(name, 253));
            }
        },
    ];
    let mut json = String::new();
    for act in cuts {
        act(&mut report);
        json = serde_json::to_string(&report).unwrap_or_default();
        if json.len() <= TERMINATION_MESSAGE_BYTES {
            break;
        }
    }
    json
}

/// Shortens a text to at most so many bytes of JSON (each escape sequence counts whole).
fn cut(text: &mut String, bytes: usize) {
    let mut room = bytes;
    for (end, character) in text.char_indices() {
        let length = match character {
            '"' | '\\' => 2,
            character if character.is_control() => 6,
            character => character.len_utf8(),
        };
        if length > room {
            text.truncate(end);
            // The dots may stand over the limit: callers leave room for them.
            text.push_str("...");
            return;
        }
        room -= length;
    }
}

/// The totals of a run as `joulecast-runtime run --output json` prints them.
#[must_use]
pub fn totals(report: &Report, book: &Book) -> serde_json::Value {
    let recording = book.recording.as_ref();
    let joules = |energy: Option<Microjoules>| energy.map(Microjoules::joules);
    let gross = joules(recording.and_then(|recording| recording.gross));
    let source = recording.map_or(Source::Unavailable, |recording| recording.source);
    serde_json::json!({
        "engine": report.engine,
        "engine_version": report.engine_version,
        "provider": report.provider,
        "dtype": report.dtype,
        "batch": report.batch,
        "threads": report.threads,
        "requests": report.lines.total,
        "requests_done": report.lines.done,
        "requests_failed": report.lines.failed,
        "requests_taken_over": report.lines.taken_over,
        "requests_repeated": report.repeated_lines,
        "tokens_in": report.tokens_in,
        "tokens_out": report.tokens_out,
        "seconds": {
            "idle_baseline": book.idle_baseline.as_secs_f64(),
            "load": book.load.as_secs_f64(),
            "prefill": book.summary.prefill.as_secs_f64(),
            "decode": book.summary.decode.as_secs_f64(),
            "total": recording.map(|recording| recording.length.as_secs_f64()),
        },
        "joules": gross,
        "source": source_name(source),
        "energy": {
            "source": source_name(source),
            "meter": report.energy.meter,
            "window_seconds": recording.map(|recording| recording.length.as_secs_f64()),
            "gross_joules": gross,
            "idle_joules": joules(recording.and_then(|recording| recording.idle)),
            "net_joules": joules(recording.and_then(|recording| recording.net)),
            "load_joules": joules(book.load_energy),
            "lines_joules": joules(book.lines_energy),
            "domain_joules": recording.map(|recording| {
                recording.domains.iter().map(|(name, energy)| (name.clone(), energy.joules())).collect::<std::collections::BTreeMap<_, _>>()
            }),
            "notes": report.energy.notes,
        },
        "peak_memory_bytes": report.utilisation.memory_peak_bytes,
        "cpu_mean": report.utilisation.cpu_mean_millis.map(|millis| millis as f64 / 1e3),
        "cpu_peak": report.utilisation.cpu_peak_millis.map(|millis| millis as f64 / 1e3),
        "gpu_mean": report.utilisation.gpu_mean_millis.map(|millis| millis as f64 / 1e3),
        "gpu_peak": report.utilisation.gpu_peak_millis.map(|millis| millis as f64 / 1e3),
        "gpu_peak_memory_bytes": report.utilisation.gpu_memory_peak_bytes,
        "output_sha256": report.output_sha256,
        "earlier_attempts": all_earlier(report),
        "failure": report.failure,
    })
}

/// What the attempts before this one spent, which `joules` does not hold; null if there were none.
fn all_earlier(report: &Report) -> serde_json::Value {
    let (mut attempts, mut sum) = (report.earlier.clone(), report.earlier_summed.clone());
    fold(&mut attempts, &mut sum, 0);
    let Some(crds::report::EarlierTotals { attempts, without_energy, totals }) = sum else {
        return serde_json::Value::Null;
    };
    let joules = |millijoules: Option<u64>| millijoules.map(|millijoules| millijoules as f64 / 1e3);
    serde_json::json!({
        "attempts": attempts,
        "without_energy": without_energy,
        "source": totals.source,
        "partial": totals.partial,
        "window_seconds": totals.window_milliseconds as f64 / 1e3,
        "gross_joules": joules(totals.gross_millijoules),
        "idle_joules": joules(totals.idle_millijoules),
        "net_joules": joules(totals.net_millijoules),
        "requests_done": totals.lines_done,
        "tokens_in": totals.tokens_in,
        "tokens_out": totals.tokens_out,
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from((time.as_micros() + 500) / 1000).unwrap_or(u64::MAX)
}

/// This crate's name of an engine in the API's terms.
#[must_use]
pub fn engine_name(name: EngineName) -> crds::EngineName {
    match name {
        EngineName::Candle => crds::EngineName::Candle,
        EngineName::Onnx => crds::EngineName::Onnx,
        EngineName::Openvino => crds::EngineName::Openvino,
        EngineName::Torch => crds::EngineName::Torch,
        EngineName::Torchscript => crds::EngineName::Torchscript,
        EngineName::Llamacpp => crds::EngineName::Llamacpp,
    }
}

/// This crate's name of a provider in the API's terms.
#[must_use]
pub fn provider(name: Provider) -> crds::Provider {
    match name {
        Provider::Cpu => crds::Provider::Cpu,
        Provider::Cuda => crds::Provider::Cuda,
        Provider::Openvino => crds::Provider::Openvino,
    }
}

#[cfg(test)]
mod tests;
