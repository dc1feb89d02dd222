//! Results on disk by themselves: how long it takes to find where to resume in part files, and to put them together, beside
//! what the disk does at the same moment. `cargo bench -p joulecast-runtime --bench results [-- LINES [BATCH [BYTES [DIR]]]]`.
//!
//! Made results of BYTES (600) each, out of order within each batch, from two attempts; 1.7 million lines are a gigabyte.
//! Fails where more memory is resident than [`MOST_RESIDENT_BYTES`] allows, or a gigabyte takes longer than [`MOST_SECONDS_PER_GB`].

use joulecast_meter::Host;
use joulecast_runtime::batch_file::Output;
use joulecast_runtime::batch_file::parts::{Attempt, Parts, Role, Who};
use joulecast_runtime::batch_file::record::{Head, encode};
use joulecast_runtime::batch_file::results::Results;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::time::Instant;

/// However many results there are.
const MOST_RESIDENT_BYTES: u64 = 200_000_000;
/// To find where to resume.
const MOST_SECONDS_PER_GB: f64 = 2.0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Cargo itself gives `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let lines: u64 = arguments.next().map_or(Ok(1_700_000), |text| text.parse())?;
    let batch: u64 = arguments.next().map_or(Ok(16), |text| text.parse())?;
    let result_bytes: usize = arguments.next().map_or(Ok(600), |text| text.parse())?;
    let dir = match arguments.next() {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?,
    };
    let mut out = std::io::stdout().lock();
    let parts = Parts::of(&dir.path().join("out.jsonl"), "uid")?;
    let began = Instant::now();
    let bytes = make(&parts, lines, batch, result_bytes)?;
    let rate = |bytes: u64, seconds: f64| bytes as f64 / 1e6 / seconds;
    writeln!(
        out,
        "{lines} results, {:.2} GB; made and synced at {:.0} MB/s",
        bytes as f64 / 1e9,
        rate(bytes, began.elapsed().as_secs_f64())
    )?;

    let (attempt, _) = parts.begin(who("resumes"))?;
    let began = Instant::now();
    let results = Results::of_others(&parts, &attempt)?;
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!((results.places(), results.bytes()), (lines, bytes));
    drop(results);
    writeln!(out, "resume point found in {seconds:.2} s, {:.0} MB/s", rate(bytes, seconds))?;
    assert!(seconds / (bytes as f64 / 1e9) <= MOST_SECONDS_PER_GB, "the resume point is found too late");

    let began = Instant::now();
    let output = Output::begin(parts, attempt)?;
    let finished = output.finish(lines)?;
    let seconds = began.elapsed().as_secs_f64();
    writeln!(out, "found and put together in {seconds:.2} s, {:.0} MB/s of output", rate(finished.bytes, seconds))?;

    let copied = copy(&dir.path().join("out.jsonl"), &dir.path().join("copy"))?;
    writeln!(out, "for comparison, the same file copied and synced: {:.0} MB/s", rate(finished.bytes, copied))?;
    if let Some(peak) = Host::default().memory_peak_bytes() {
        writeln!(out, "peak of resident memory {:.1} MB", peak as f64 / 1e6)?;
        assert!(peak <= MOST_RESIDENT_BYTES, "too much memory is resident");
    }
    Ok(())
}

fn who(name: &str) -> Who {
    Who { epoch: 1, role: Role::Run { configuration: 0, shard: 0 }, name: name.to_owned() }
}

/// Two attempts, of which the second did the latter half; gives the bytes of their records.
fn make(parts: &Parts, lines: u64, batch: u64, result_bytes: usize) -> Result<u64, Box<dyn std::error::Error>> {
    let (mut bytes, mut record) = (0, Vec::new());
    for (number, name) in (0..).zip(["first", "second"]) {
        let (attempt, _): (Attempt, File) = parts.begin(who(name))?;
        let file = OpenOptions::new().append(true).create_new(true).open(parts.results(&attempt))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        let (first, end) = (lines / 2 * number, if number == 0 { lines / 2 } else { lines });
        for start in (first..end).step_by(usize::try_from(batch)?) {
            // The requests of a batch end in an order of their own.
            for place in (start..(start + batch).min(end)).rev() {
                let id = format!("{{\"custom_id\":\"request-{place}\",\"text\":\"");
                let json = format!("{id}{}\"}}", "x".repeat(result_bytes.saturating_sub(id.len() + 3)));
                let head = Head { line: place + 1, place, request: place as u32, failed: false };
                encode(&head, json.as_bytes(), &mut record);
                writer.write_all(&record)?;
                bytes += record.len() as u64;
            }
        }
        writer.into_inner()?.sync_all()?;
    }
    Ok(bytes)
}

/// Copies with large buffers, syncs, and gives the seconds.
fn copy(from: &Path, to: &Path) -> std::io::Result<f64> {
    let began = Instant::now();
    let (mut from, mut to) = (File::open(from)?, File::create(to)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            to.sync_all()?;
            return Ok(began.elapsed().as_secs_f64());
        }
        to.write_all(&buffer[..length])?;
    }
}
