//! The meters of this node and the ledger over them: one step reads the counters and CPU times, and divides.

use joulecast_meter::cgroup_time::{Cgroups, CpuTimes};
use joulecast_meter::counter::Counter;
use joulecast_meter::idle::Baseline;
use joulecast_meter::integral::{Integral, Sum, disagreement};
use joulecast_meter::ledger::{Division, Ledger};
use joulecast_meter::nvml::{Board, Missing, Trouble};
use joulecast_meter::rapl::zones;
use joulecast_meter::topology::Package;
use joulecast_meter::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

mod gpu;
mod source;
pub use gpu::Gpu;
use source::{Probe, Source};

/// What of the meters outlives a restart of the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    ledger: Ledger,
    /// Counter and idle power by domain.
    counters: BTreeMap<String, (Counter, Option<Baseline>)>,
    /// Integrated power of GPUs by domain.
    integrals: BTreeMap<String, Integral>,
}

/// Counter and integrated power of a GPU at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The counter's total in microjoules.
    total: u64,
    sum: Sum,
}

/// One reading of how busy the GPUs of a pod are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuLoad {
    /// Time since the reading before.
    pub since: Duration,
    /// Mean utilisation of the GPUs in thousandths.
    pub busy_millis: Option<u64>,
    /// Memory in use of all of them.
    pub memory_bytes: u64,
}

/// What counter and integrated power of a GPU make up between two moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// Energy by the counter.
    pub counter: Microjoules,
    /// Energy by the power that the GPU told.
    pub integrated: Microjoules,
    /// How far they are apart, as a part of the counter's energy.
    pub apart: f64,
}

fn mark(source: &Source) -> Option<Mark> {
    Some(Mark { sum: source.as_gpu()?.integral().sum(), total: source.counter.total()? })
}

/// The meters of this node.
#[derive(Debug)]
pub struct NodeMeter {
    sources: Vec<Source>,
    ledger: Ledger,
    /// Indices of the sources with a slot that a pod holds, by its UID.
    held: BTreeMap<String, Vec<usize>>,
    cgroups: Option<Cgroups>,
    /// Cgroup by UID of a pod that holds a slot.
    holders: BTreeMap<String, PathBuf>,
    cpus: Vec<usize>,
    /// CPU times of the last step.
    cpu_times: Option<Arc<CpuTimes>>,
    /// Idle power of each package as set by hand; nothing is then measured there.
    idle_by_hand: Option<Milliwatts>,
    /// Why packages cannot be metered, if so.
    no_package: Option<String>,
    /// Why nothing can be metered, if so.
    lacks: Option<String>,
    notes: Vec<String>,
    /// Slots whose GPU told of an error that it does not recover from, with the error.
    troubled: BTreeMap<String, String>,
}

impl NodeMeter {
    /// Opens what this node has. Nothing that is missing is an error: a node without a meter has its slots too.
    #[must_use]
    pub fn open(
        packages: &[Package],
        powercap: &Path,
        gpus: Vec<Board>,
        cgroups: Result<Cgroups, String>,
        idle: Option<Milliwatts>,
    ) -> Self {
        let (found, mut notes) = zones::find(powercap);
        let mut sources = Vec::new();
        for zone in found {
            let Some(source) = Source::rapl(zone, packages) else { continue };
            let Probe::Rapl { zone, .. } = &source.probe else { continue };
            match zone.read() {
                Ok(_) => sources.push(source),
                Err(error) => notes.push(format!("{} unreadable ({error}) and left out", zone.domain)),
            }
        }
        let has_package = sources.iter().any(Source::is_package);
        for board in gpus {
            match board.energy() {
                Err(Missing::NotSupported) => {
                    notes.push(format!("gpu-{} ({}) has no energy counter: not metered", board.index, board.name));
                }
                // What cannot be read now is looked at again and again.
                _ => sources.push(Source::gpu(Gpu::new(board))),
            }
        }
        let no_package = (!has_package).then(|| format!("no RAPL package can be read below {}", powercap.display()));
        let lacks = match &cgroups {
            _ if sources.is_empty() => no_package.clone(),
            Err(problem) => Some(format!("energy cannot be divided among pods: {problem}")),
            Ok(_) => None,
        };
        let ledger = Ledger::new(sources.iter().map(|source| source.domain.clone()).collect());
        let cpus = packages.iter().map(|package| package.cpus.len()).collect();
        let cgroups = cgroups.ok();
        let mut meter = Self {
            sources,
            ledger,
            held: BTreeMap::new(),
            cgroups,
            holders: BTreeMap::new(),
            cpus,
            cpu_times: None,
            idle_by_hand: idle,
            no_package,
            lacks,
            notes,
            troubled: BTreeMap::new(),
        };
        meter.set_idle_by_hand();
        meter
    }

    /// By hand the whole idle power of a package is given: none is left for its memory.
    fn set_idle_by_hand(&mut self) {
        let Some(idle) = self.idle_by_hand else { return };
        for (index, source) in self.sources.iter().enumerate() {
            let power = if source.is_package() { idle } else { Milliwatts(0) };
            if source.as_gpu().is_none() {
                self.ledger.set_idle(index, Some(power));
            }
        }
    }

    /// Why no pod can be metered on this node, if so.
    #[must_use]
    pub fn lacks(&self) -> Option<&str> {
        self.lacks.as_deref()
    }

    /// Why this pod cannot be metered, if so: on a node whose packages have no meter, only pods with a GPU can.
    #[must_use]
    pub fn lacks_for(&self, uid: &str) -> Option<&str> {
        let lacks = self.lacks.as_deref();
        lacks.or_else(|| self.no_package.as_deref().filter(|_| self.gpus_of(uid).next().is_none()))
    }

    /// The GPUs that are metered.
    pub fn gpus(&self) -> impl Iterator<Item = &Gpu> {
        self.sources.iter().filter_map(Source::as_gpu)
    }

    /// The GPUs that a pod holds, or has an instance of.
    pub fn gpus_of(&self, uid: &str) -> impl Iterator<Item = &Gpu> {
        let own = self.held.get(uid).into_iter().flatten();
        own.filter_map(|index| self.sources.get(*index)?.as_gpu())
    }

    /// Follows a change of holders.
    fn find_held(&mut self) {
        let uids: BTreeSet<String> = self.ledger.owners().map(|(_, uid)| uid.to_owned()).collect();
        let held = |uid: &String| {
            let sources = self.sources.iter().enumerate();
            sources.filter(|(_, source)| self.ledger.holds(&source.domain, uid)).map(|(index, _)| index).collect()
        };
        self.held = uids.into_iter().map(|uid| (uid.clone(), held(&uid))).collect();
    }

    /// Whether the last step read the load of a GPU anew.
    #[must_use]
    pub fn has_fresh_load(&self) -> bool {
        self.gpus().any(|gpu| gpu.fresh().is_some())
    }

    /// How busy the whole GPUs of a pod are, if the last step read it anew. An instance in MIG mode has no figures of its own.
    #[must_use]
    pub fn fresh_load_of(&self, uid: &str) -> Option<GpuLoad> {
        let whole = self.gpus_of(uid).filter(|gpu| gpu.board().instances.is_none());
        let (mut since, mut busy, mut memory, mut count) = (None, Some(0), 0, 0);
        for gpu in whole {
            // All GPUs are read in the same steps, but for one that could not be read in between.
            since = since.max(gpu.fresh());
            let load = gpu.load()?;
            busy = busy.zip(load.busy_percent).map(|(sum, percent)| sum + u64::from(percent) * 10);
            memory += load.memory_used_bytes;
            count += 1;
        }
        Some(GpuLoad { since: since?, busy_millis: busy.map(|sum| sum / count), memory_bytes: memory })
    }

    /// Which kind of meter a domain has: `rapl` or `nvml`.
    #[must_use]
    pub fn kind(&self, domain: usize) -> &'static str {
        self.sources.get(domain).map_or("none", Source::meter)
    }

    /// What was left out when the meters were opened.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Mean power of each domain over the last second or so; absent until it is known.
    pub fn power(&self) -> impl Iterator<Item = (&str, Option<Milliwatts>)> {
        self.sources.iter().map(|source| (source.domain.name.as_str(), source.power()))
    }

    /// Measured idle power of each domain.
    pub fn baselines(&self) -> impl Iterator<Item = (&str, Option<Baseline>)> {
        self.sources.iter().map(|source| (source.domain.name.as_str(), source.baseline()))
    }

    /// Idle power of all domains that gross counts; `None` until it is known.
    #[must_use]
    pub fn idle(&self) -> Option<Milliwatts> {
        let gross = self.ledger.domains().enumerate().filter(|(_, domain)| domain.in_gross);
        let mut gross = gross.map(|(index, _)| self.ledger.idle(index)).peekable();
        gross.peek()?;
        gross.try_fold(Milliwatts(0), |sum, idle| Some(Milliwatts(sum.0 + idle?.0)))
    }

    /// The highest power that packages and GPUs are allowed for long, if it is told of all that are metered.
    #[must_use]
    pub fn max(&self) -> Option<Milliwatts> {
        let counts = |source: &&Source| source.is_package() || source.as_gpu().is_some();
        let mut sources = self.sources.iter().filter(counts).peekable();
        sources.peek()?;
        sources.try_fold(Milliwatts(0), |sum, source| Some(Milliwatts(sum.0 + source.max_power()?.0)))
    }

    /// One phrase for reports: the meters of a pod and what its figures cover.
    #[must_use]
    pub fn describe(&self, uid: &str) -> String {
        let own = |source: &&Source| source.as_gpu().is_some() && self.ledger.holds(&source.domain, uid);
        let name = |source: &Source| match source.domain.division {
            Division::Slices(_) => format!("{} BoardShared", source.domain.name),
            Division::CpuTime { .. } | Division::Whole => source.domain.name.clone(),
        };
        let gpus: Vec<_> = self.sources.iter().filter(own).map(name).collect();
        let by = self.cgroups.as_ref().map_or("", |cgroups| cgroups.describe());
        let rapl = self.sources.iter().filter(|source| source.as_gpu().is_none() && source.domain.in_gross);
        let rapl: Vec<_> = rapl.map(|source| source.domain.name.as_str()).collect();
        let rapl = (!rapl.is_empty()).then(|| format!("rapl ({}), by CPU time ({by})", rapl.join(" + ")));
        let nvml = (!gpus.is_empty()).then(|| format!("nvml ({})", gpus.join(" + ")));
        match (nvml, rapl) {
            (Some(nvml), Some(rapl)) => format!("node agent: {nvml} + {rapl}"),
            (Some(nvml), None) => format!("node agent: {nvml}, processors not metered"),
            (None, rapl) => format!("node agent: {}", rapl.unwrap_or_default()),
        }
    }

    /// The slots that must not be given out, with the reason: their GPU is lost or told of an error that it does not recover
    /// from, or their counter could not be read for longer than `limit`.
    #[must_use]
    pub fn failing(&self, now: Duration, limit: Duration) -> BTreeMap<String, String> {
        let ill = |source: &Source| {
            let why = source.ill(now, limit)?;
            Some(source.domain.slots().map(|slot| (slot.to_owned(), why.clone())).collect::<Vec<_>>())
        };
        self.troubled.clone().into_iter().chain(self.sources.iter().filter_map(ill).flatten()).collect()
    }

    /// Why a pod has no use of one of its GPUs any more, if so.
    #[must_use]
    pub fn device_lost(&self, uid: &str) -> Option<String> {
        let troubled = self.ledger.owners().filter(|(_, owner)| *owner == uid);
        let troubled = troubled.filter_map(|(slot, _)| self.troubled.get(slot).cloned()).next();
        troubled.or_else(|| self.gpus_of(uid).find_map(|gpu| Some(format!("{} is lost: {}", gpu.name(), gpu.lost()?))))
    }

    /// Takes in what NVML tells of a GPU; if it does not say which, it may be any. It stays so until the agent starts anew:
    /// such GPUs want a reset.
    pub fn trouble(&mut self, trouble: &Trouble) {
        for source in &self.sources {
            let Some(gpu) = source.as_gpu() else { continue };
            if trouble.uuid.as_ref().is_none_or(|uuid| *uuid == gpu.board.uuid) {
                tracing::warn!(gpu = source.domain.name, uuid = gpu.board.uuid, "{}", trouble.what);
                let why = format!("{} of {}", trouble.what, source.domain.name);
                self.troubled.extend(source.domain.slots().map(|slot| (slot.to_owned(), why.clone())));
            }
        }
    }

    /// Counter and integrated power of each GPU that a pod holds, by domain.
    #[must_use]
    pub fn marks(&self, uid: &str) -> BTreeMap<String, Mark> {
        let own = self.sources.iter().filter(|source| self.ledger.holds(&source.domain, uid));
        own.filter_map(|source| Some((source.domain.name.clone(), mark(source)?))).collect()
    }

    /// What counter and integrated power of a GPU moved since an earlier mark.
    #[must_use]
    pub fn since(&self, domain: &str, mark_then: Mark) -> Option<Moved> {
        let source = self.sources.iter().find(|source| source.domain.name == domain)?;
        let now = mark(source)?;
        let counter = Microjoules(now.total.checked_sub(mark_then.total)?);
        let integrated = now.sum.since(mark_then.sum)?;
        Some(Moved { counter, integrated, apart: disagreement(counter, integrated)? })
    }

    /// Reads the counters, and power and load of GPUs, and divides nothing: a look between two steps, so that power is
    /// integrated finely and no counter wraps unseen.
    pub fn look(&mut self, now: Duration) {
        self.read(now);
    }

    /// The totals of all domains, read now.
    fn read(&mut self, now: Duration) -> Vec<Option<u64>> {
        let mut totals = Vec::with_capacity(self.sources.len());
        for (index, source) in self.sources.iter_mut().enumerate() {
            let (total, lost) = source.read(now);
            if let Some(loss) = lost {
                tracing::warn!(domain = source.domain.name, "counter lost: {loss}");
                self.ledger.lost(index, loss);
            }
            totals.push(total);
        }
        totals
    }

    /// Reads everything and divides what was used since the last step.
    pub fn step(&mut self, now: Duration, unix_seconds: u64) {
        let cpu = self.cgroups.as_mut().and_then(|cgroups| cgroups.sample(&self.holders)).map(Arc::new);
        let totals = self.read(now);
        for (index, (source, total)) in self.sources.iter_mut().zip(&totals).enumerate() {
            if self.idle_by_hand.is_some() && source.as_gpu().is_none() {
                continue;
            }
            let held = self.ledger.is_held(&source.domain);
            if let Some(idle) = source.watch(now, unix_seconds, *total, cpu.as_deref(), &self.cpus, held) {
                self.ledger.set_idle(index, Some(idle));
            }
        }
        self.ledger.step(now, &totals, cpu.as_ref());
        self.cpu_times = cpu;
    }

    /// Gives a slot to a pod, from now on. `false` if the pod's cgroup is not there.
    pub fn hold(&mut self, slot: &str, uid: &str) -> bool {
        let found = self.cgroups.as_ref().and_then(|cgroups| cgroups.pod(uid));
        let there = found.is_some();
        if let Some(dir) = found {
            self.holders.insert(uid.to_owned(), dir);
            if self.ledger.owner(slot) != Some(uid) {
                self.ledger.set_owner(slot, Some(uid.to_owned()));
                self.find_held();
            }
        }
        there
    }

    /// Takes a slot back.
    pub fn free(&mut self, slot: &str) {
        self.ledger.set_owner(slot, None);
        self.find_held();
    }

    /// Forgets a pod that is gone.
    pub fn forget(&mut self, uid: &str) {
        self.holders.remove(uid);
        self.ledger.forget(uid);
        self.find_held();
    }

    /// CPU time of a pod that holds a slot, in nanoseconds, as of the last step.
    #[must_use]
    pub fn cpu_nanos(&self, uid: &str) -> Option<u64> {
        self.cpu_times.as_ref()?.holders.get(uid).map(|times| times.iter().sum())
    }

    /// Gross energy of a pod since it was given a slot.
    #[must_use]
    pub fn gross_of(&self, uid: &str) -> Microjoules {
        let in_gross = self.ledger.books().filter(|(domain, _)| domain.in_gross);
        in_gross.filter_map(|(_, books)| books.holders.get(uid)).fold(Microjoules(0), |sum, one| sum.plus(one.gross()))
    }

    /// Memory that a pod uses now, page cache included.
    #[must_use]
    pub fn memory_bytes(&self, uid: &str) -> Option<u64> {
        self.cgroups.as_ref()?.memory_bytes(uid)
    }

    /// Whether a pod's cgroup is still there.
    #[must_use]
    pub fn lives(&self, uid: &str) -> bool {
        self.cgroups.as_ref().is_some_and(|cgroups| cgroups.pod(uid).is_some())
    }

    /// What outlives a restart.
    #[must_use]
    pub fn save(&self) -> Saved {
        let counter = |source: &Source| (source.domain.name.clone(), (source.counter.clone(), source.baseline()));
        Saved {
            ledger: self.ledger.clone(),
            counters: self.sources.iter().map(counter).collect(),
            integrals: self.gpus().map(|gpu| (gpu.name(), gpu.integral().clone())).collect(),
        }
    }

    /// Goes on where an earlier process left off. `false`, and nothing is taken over, if it had other domains.
    pub fn resume(&mut self, saved: Saved) -> bool {
        let Saved { ledger, mut counters, mut integrals } = saved;
        if !ledger.domains().eq(self.ledger.domains()) {
            return false;
        }
        for source in &mut self.sources {
            if let Some((counter, baseline)) = counters.remove(&source.domain.name) {
                source.resume(counter, baseline);
            }
            let integral = integrals.remove(&source.domain.name);
            if let (Probe::Gpu(gpu), Some(integral)) = (&mut source.probe, integral) {
                gpu.resume(integral);
            }
        }
        self.ledger = ledger;
        self.find_held();
        // What is set by hand counts now, not what an earlier process was told.
        self.set_idle_by_hand();
        // Those who hold slots must be in the first step, which bridges the time without an agent.
        if let Some(cgroups) = &self.cgroups {
            let dir = |uid: &str| Some((uid.to_owned(), cgroups.pod(uid)?));
            self.holders = self.ledger.owners().filter_map(|(_, uid)| dir(uid)).collect();
        }
        true
    }
}
