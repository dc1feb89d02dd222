//! What happens beside a metered run: its journal grows, what it wrote is synced, and it is told when it is superseded or
//! when the node agent says that its device is lost.

use super::journal::{Entry, INTERVAL, Journal};
use super::{RunFailure, Surroundings, Work};
use crate::batch_file::parts::{Attempt, Parts};
use crate::engine::EngineError;
use crate::fail_point;
use crate::progress::Own;
use joulecast_crds::DeviceClass;
use joulecast_crds::report::{EnergySource, JournalTotals};
use joulecast_meter::{Microjoules, Recording, Sampler, SoFar, Source};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Every so many entries, files are synced and other attempts looked for: every 5 seconds.
const ROUND: u32 = 10;
/// Every so many entries, what goes to a bucket is shipped: every second.
const SHIPMENT: u32 = 2;

/// How often the agent is given time to find out that a GPU is lost.
const AGENT_LOOKS: u32 = 4;

/// See the module.
pub(super) struct Watch<'a> {
    parts: &'a Parts,
    attempt: &'a Attempt,
    around: &'a Surroundings,
    journal: &'a Journal,
    sampler: &'a Sampler,
    records: Option<&'a File>,
    over: Mutex<bool>,
    bell: Condvar,
    superseded: AtomicBool,
    /// Whether the run is on a GPU.
    on_gpu: bool,
}

impl<'a> Watch<'a> {
    pub(super) fn new(work: &'a Work<'a>, sampler: &'a Sampler, records: Option<&'a File>) -> Self {
        let Work { run, around, parts, attempt, journal } = *work;
        Self {
            parts,
            attempt,
            around,
            journal,
            sampler,
            records,
            over: Mutex::new(false),
            bell: Condvar::new(),
            superseded: AtomicBool::new(false),
            on_gpu: run.device_class == DeviceClass::Cuda,
        }
    }

    /// Does something with the watch beside it.
    pub(super) fn beside(&self, act: impl FnOnce() -> Result<(), RunFailure>) -> Result<(), RunFailure> {
        let result = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("journal".to_owned());
            let watching = thread.spawn_scoped(scope, || self.watch()).map_err(RunFailure::Thread)?;
            let result = act();
            *lock(&self.over) = true;
            self.bell.notify_all();
            // A watch that panicked leaves a journal that ends early.
            let _ = watching.join();
            result
        });
        match result {
            Err(RunFailure::Stopped) if self.superseded.load(Ordering::SeqCst) => Err(RunFailure::Superseded),
            Err(failure) => Err(self.blamed(failure)),
            Ok(()) => Ok(()),
        }
    }

    /// Says of a failure that a lost device can have caused whether it did.
    fn blamed(&self, failure: RunFailure) -> RunFailure {
        let failed = matches!(failure, RunFailure::Engine(EngineError::Compute(_)) | RunFailure::Panicked(_));
        if !failed && !matches!(failure, RunFailure::Stopped) {
            return failure;
        }
        // A call that fails may be quicker than the agent's next look at the GPU.
        for _ in 0..if failed && self.on_gpu { AGENT_LOOKS } else { 0 } {
            if self.sampler.device_lost().is_some() {
                break;
            }
            self.around.stop.wait(INTERVAL);
        }
        match self.sampler.device_lost() {
            Some(why) => {
                tracing::error!(%failure, why, "the device is lost");
                RunFailure::DeviceLost(why)
            }
            None => failure,
        }
    }

    fn watch(&self) {
        let mut complained = false;
        let mut over = lock(&self.over);
        for beat in 0u32.. {
            // The first entry comes at once: whoever is killed before the second has spent little, but not an unknown amount.
            if beat > 0 {
                over = self.bell.wait_timeout(over, INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            }
            if *over {
                return;
            }
            drop(over);
            if let Err(error) = self.beat(beat > 0 && beat % ROUND == 0, beat > 0 && beat % SHIPMENT == 0)
                && !std::mem::replace(&mut complained, true)
            {
                tracing::error!(%error, "the journal cannot be kept; if this attempt is killed, its energy is not known");
            }
            over = lock(&self.over);
        }
    }

    fn beat(&self, round: bool, shipment: bool) -> Result<(), crate::batch_file::file_error::FileError> {
        if let Some(so_far) = self.sampler.so_far() {
            let totals = running(so_far, self.sampler.source(), self.around.progress.own());
            self.journal.write(&Entry::Running(totals))?;
        }
        if let Some(why) = self.sampler.device_lost().filter(|_| !self.around.stop.halted()) {
            // Whoever reads the line may count on it.
            self.around.stop.request();
            tracing::error!(why, "the device is lost: this attempt ends");
        }
        if let Some(mirror) = self.parts.mirror().filter(|_| shipment) {
            if self.records.is_some() {
                mirror.ship_records(&self.parts.results(self.attempt))?;
            }
            mirror.ship_journal(&self.parts.journal(self.attempt))?;
        }
        if round {
            self.parts.look_around()?;
            if self.parts.attempts()?.iter().any(|other| other.supersedes(self.attempt)) {
                tracing::warn!("a newer attempt works on these lines: this one ends");
                self.superseded.store(true, Ordering::SeqCst);
                self.around.stop.request();
            }
            fail_point!("sync");
            self.journal.sync()?;
            if let Some(records) = self.records.filter(|_| self.parts.mirror().is_none()) {
                let sync = crate::batch_file::file_error::failed("sync the results of", self.parts.dir());
                records.sync_data().map_err(sync)?;
            }
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn running(so_far: SoFar, source: Source, own: Own) -> JournalTotals {
    let SoFar { length, gross, idle, net } = so_far;
    totals(length, (gross, idle, net), source, own, true)
}

/// The final totals of an attempt; one that was never metered has no energy.
pub(super) fn ended(recording: Option<&Recording>, own: Own) -> JournalTotals {
    let (length, energy, source) = match recording {
        Some(recording) => (recording.length, (recording.gross, recording.idle, recording.net), recording.source),
        None => (Duration::ZERO, (None, None, None), Source::Unavailable),
    };
    totals(length, energy, source, own, false)
}

type Energies = (Option<Microjoules>, Option<Microjoules>, Option<Microjoules>);

fn totals(length: Duration, energy: Energies, source: Source, own: Own, partial: bool) -> JournalTotals {
    let (gross, idle, net) = energy;
    let millijoules = |energy: Option<Microjoules>| energy.map(Microjoules::millijoules);
    JournalTotals {
        source: match source {
            _ if gross.is_none() => EnergySource::Unavailable,
            Source::Measured => EnergySource::Measured,
            Source::Modelled => EnergySource::Modelled,
            Source::Unavailable => EnergySource::Unavailable,
        },
        partial,
        window_milliseconds: u64::try_from(length.as_millis()).unwrap_or(u64::MAX),
        gross_millijoules: millijoules(gross),
        idle_millijoules: millijoules(idle),
        net_millijoules: millijoules(net),
        lines_done: own.lines,
        tokens_in: own.tokens_in,
        tokens_out: own.tokens_out,
    }
}
