//! Which meter a run gets: the node agent where the run holds a slot, else RAPL where it can be read, else the estimate,
//! else none; never two of them in one window.

use crate::cpu_time::CpuTime;
use crate::host::Host;
use crate::meter::{Meter, NoMeter};
use crate::modelled::{Modelled, watts::Watts};
use crate::rapl::{Rapl, RaplError};
use crate::sampler::Clock;
use crate::slot::SlotMeter;
use crate::units::Milliwatts;
use std::path::PathBuf;
use std::time::Duration;

/// What the caller wants to be metered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The node agent if there is a slot, else RAPL if it can be read, else the estimate.
    Auto,
    /// RAPL or an error.
    Rapl,
    /// The estimate, also where there is a counter.
    Modelled,
    /// None.
    None,
}

/// Everything that the choice depends on.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What is wanted.
    pub wanted: Wanted,
    /// The powercap directory, [`crate::rapl::POWERCAP`] on a real machine.
    pub powercap: PathBuf,
    /// The machine's files.
    pub host: Host,
    /// Watts for the estimate; those of the table if absent.
    pub watts: Option<Watts>,
    /// How long idle power is measured before the run; RAPL only. Zero leaves it out.
    pub baseline: Duration,
    /// The slot that the run holds.
    pub slot: Option<Slot>,
}

/// A slot of the node agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its metering socket.
    pub socket: PathBuf,
    /// Name of the job, for the agent's metrics.
    pub job: Option<String>,
}

/// The meter of a run, opened.
pub struct Choice {
    /// The meter.
    pub meter: Box<dyn Meter>,
    /// Power of the same domains when idle, if it is known.
    pub idle: Option<Milliwatts>,
    /// How the choice was made and what it lacks.
    pub notes: Vec<String>,
}

/// A baseline is read at least this often, so that a wrap within it is seen.
const BASELINE_STEP: Duration = Duration::from_secs(1);

/// Opens a meter and measures idle power where that is to be measured. `wait` lets time pass while the machine idles; it
/// may return early.
///
/// # Errors
/// Only when RAPL was asked for by name and cannot be had.
pub fn choose(settings: &Settings, clock: &Clock, wait: &mut dyn FnMut(Duration)) -> Result<Choice, RaplError> {
    let nothing =
        |reason: &str| Choice { meter: Box::new(NoMeter { reason: reason.to_owned() }), idle: None, notes: Vec::new() };
    match settings.wanted {
        Wanted::None => Ok(nothing("metering was switched off")),
        Wanted::Rapl => rapl(settings, clock, wait),
        Wanted::Modelled => Ok(modelled(settings, clock).unwrap_or_else(nothing)),
        Wanted::Auto => {
            let mut notes = Vec::new();
            if let Some(slot) = &settings.slot {
                match SlotMeter::open(&slot.socket, slot.job.as_deref(), wait) {
                    Ok((meter, idle)) => {
                        let note = match idle {
                            Some(idle) => format!("idle {:.2} W of the slot, measured by the node agent", idle.watts()),
                            None => "idle power of the slot is not known: the node was not quiet yet".to_owned(),
                        };
                        return Ok(Choice { meter: Box::new(meter), idle, notes: vec![note] });
                    }
                    Err(error) => notes.push(format!("no reading of the slot: {error}")),
                }
            }
            let mut choice = rapl(settings, clock, wait).unwrap_or_else(|error| {
                let mut choice = modelled(settings, clock).unwrap_or_else(nothing);
                choice.notes.push(format!("no RAPL: {error}"));
                choice
            });
            choice.notes.extend(notes);
            Ok(choice)
        }
    }
}

fn rapl(settings: &Settings, clock: &Clock, wait: &mut dyn FnMut(Duration)) -> Result<Choice, RaplError> {
    let mut meter = Rapl::open(&settings.powercap, clock())?;
    if settings.baseline.is_zero() {
        let notes = vec!["idle power was not measured: no time was given for it".to_owned()];
        return Ok(Choice { meter: Box::new(meter), idle: None, notes });
    }
    let first = meter.sample(clock());
    let mut last = first.clone();
    let mut left = settings.baseline;
    while !left.is_zero() {
        let step = left.min(BASELINE_STEP);
        wait(step);
        left -= step;
        last = meter.sample(clock());
    }
    let length = last.at.saturating_sub(first.at);
    let used = last.gross.zip(first.gross).and_then(|(last, first)| last.minus(first));
    if used.is_some_and(|used| used.0 == 0) {
        return Err(RaplError::Still(length));
    }
    let idle = used.and_then(|used| Milliwatts::mean(used, length));
    let note = match idle {
        Some(idle) => format!("idle {:.2} W measured over {:.2} s before the run", idle.watts(), length.as_secs_f64()),
        None => "idle power could not be measured: a zone was absent".to_owned(),
    };
    Ok(Choice { meter: Box::new(meter), idle, notes: vec![note] })
}

fn modelled(settings: &Settings, clock: &Clock) -> Result<Choice, &'static str> {
    let cpu = CpuTime::discover(&settings.host);
    cpu.read().ok_or("no meter, and CPU time cannot be read")?;
    let given =
        settings.host.cpus_given_millis().ok_or("no meter, and the CPUs given to this process cannot be read")?;
    let watts = settings.watts.clone().unwrap_or_else(|| Watts::by_model(settings.host.cpu_model().as_deref()));
    let meter = Modelled::open(watts, cpu, given, clock());
    let idle = Some(meter.idle());
    Ok(Choice { meter: Box::new(meter), idle, notes: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;
    use crate::meter::Source;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    const STAT: &str = "1 (x) S 1 1 1 0 -1 0 0 0 0 0 100 0 0 0 20 0 1 0 5 0 0\n";
    const STATUS: &str = "Cpus_allowed_list:\t0-3\n";

    /// A fake machine whose counter grows by so many watts while one waits.
    fn choose_on(wanted: Wanted, watts: Option<u64>, linux: bool, seconds: u64) -> Result<Choice, RaplError> {
        let fake = FakeHost::new(&[]);
        if linux {
            fake.set("/proc/self/stat", STAT);
            fake.set("/proc/self/status", STATUS);
        }
        let set = |energy: u64| fake.set("/powercap/intel-rapl:0/energy_uj", &energy.to_string());
        if watts.is_some() {
            fake.set("/powercap/intel-rapl:0/name", "package-0\n");
            // With a range of 1 kJ a wait of a second is already too long to exclude a second wrap.
            let range = if watts == Some(9) { "1000000000\n" } else { "65532610987\n" };
            fake.set("/powercap/intel-rapl:0/max_energy_range_uj", range);
            set(5);
        }
        let settings = Settings {
            wanted,
            powercap: fake.host().path("/powercap"),
            host: fake.host(),
            watts: None,
            baseline: Duration::from_secs(seconds),
            slot: None,
        };
        let now = Arc::new(AtomicU64::new(0));
        let clock: Clock = {
            let now = Arc::clone(&now);
            Arc::new(move || Duration::from_millis(now.load(Ordering::SeqCst)))
        };
        let mut wait = |time: Duration| {
            let millis = u64::try_from(time.as_millis()).unwrap();
            let at = now.fetch_add(millis, Ordering::SeqCst) + millis;
            set(5 + watts.unwrap_or(0) * at * 1000);
        };
        choose(&settings, &clock, &mut wait)
    }

    #[test]
    fn rapl_first_then_the_estimate_then_nothing() {
        type Case = (Wanted, Option<u64>, bool, u64, Source, Option<u64>, &'static str);
        let cases: &[Case] = &[
            (Wanted::Auto, Some(40), true, 2, Source::Measured, Some(40_000), "idle 40.00 W measured over 2.00 s"),
            (Wanted::Auto, Some(40), true, 0, Source::Measured, None, "idle power was not measured"),
            (Wanted::Auto, Some(0), true, 1, Source::Modelled, Some(2000), "did not move"),
            (Wanted::Auto, Some(9), true, 1, Source::Measured, None, "a zone was absent"),
            (Wanted::Auto, None, true, 2, Source::Modelled, Some(2000), "no RAPL zone"),
            (Wanted::Auto, None, false, 2, Source::Unavailable, None, "no RAPL zone"),
            (Wanted::Modelled, Some(40), true, 2, Source::Modelled, Some(2000), ""),
            (Wanted::None, Some(40), true, 2, Source::Unavailable, None, ""),
        ];
        for (wanted, watts, linux, seconds, source, idle, note) in cases {
            let choice = choose_on(*wanted, *watts, *linux, *seconds).unwrap();
            assert_eq!(choice.meter.source(), *source, "{wanted:?} {watts:?}");
            assert_eq!(choice.idle, idle.map(Milliwatts), "{wanted:?} {watts:?}");
            assert!(note.is_empty() || choice.notes.iter().any(|n| n.contains(note)), "{:?}", choice.notes);
        }
        for watts in [None, Some(0)] {
            assert!(choose_on(Wanted::Rapl, watts, true, 1).is_err(), "RAPL by name is never replaced");
        }
        let Err(error) = choose_on(Wanted::Rapl, None, true, 1) else { unreachable!("asserted above") };
        assert!(error.to_string().contains("no RAPL zone"), "{error}");
    }
}
