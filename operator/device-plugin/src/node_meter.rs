//! The meters of this node and the ledger over them: one step reads the counters and CPU times, and divides.

use crate::slots::cpu_slot_id;
use joulecast_meter::cgroup_time::{Cgroups, CpuTimes};
use joulecast_meter::counter::{Counter, MAX_WATTS};
use joulecast_meter::idle::{Baseline, IdleWatch};
use joulecast_meter::ledger::{Division, Domain, Ledger};
use joulecast_meter::rapl::zones::{self, Kind, Zone};
use joulecast_meter::topology::Package;
use joulecast_meter::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// RAPL counters are updated about every millisecond.
const RAPL_LAG: Duration = Duration::from_millis(10);
/// Power is the mean over at least this time.
const POWER_OVER: Duration = Duration::from_secs(1);

/// The counters of one RAPL zone.
#[derive(Debug)]
struct Source {
    zone: Zone,
    package: usize,
    counter: Counter,
    watch: IdleWatch,
    /// The last reading failed, since when.
    failing_since: Option<Duration>,
    power: Power,
}

/// Power of one domain, from its counter.
#[derive(Debug, Default, Clone, Copy)]
struct Power {
    from: Option<(Duration, u64)>,
    now: Option<Milliwatts>,
}

impl Power {
    fn observe(&mut self, at: Duration, total: u64) {
        let (then, before) = *self.from.get_or_insert((at, total));
        let length = at.saturating_sub(then);
        if length >= POWER_OVER {
            self.now = total.checked_sub(before).and_then(|used| Milliwatts::mean(Microjoules(used), length));
            self.from = Some((at, total));
        }
    }
}

/// What of the meters outlives a restart of the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    ledger: Ledger,
    /// Counter and idle power by domain.
    counters: BTreeMap<String, (Counter, Option<Baseline>)>,
}

/// The meters of this node.
#[derive(Debug)]
pub struct NodeMeter {
    sources: Vec<Source>,
    ledger: Ledger,
    cgroups: Option<Cgroups>,
    /// Cgroup by UID of a pod that holds a slot.
    holders: BTreeMap<String, PathBuf>,
    cpus: Vec<usize>,
    /// CPU times of the last step.
    cpu_times: Option<Arc<CpuTimes>>,
    /// Idle power of each package as set by hand; nothing is then measured.
    idle_by_hand: Option<Milliwatts>,
    /// Why pods cannot be metered, if so.
    lacks: Option<String>,
    notes: Vec<String>,
}

impl NodeMeter {
    /// Opens what this node has. Nothing that is missing is an error: a node without a meter has its slots too.
    #[must_use]
    pub fn open(
        packages: &[Package],
        powercap: &Path,
        cgroups: Result<Cgroups, String>,
        idle: Option<Milliwatts>,
    ) -> Self {
        let (found, mut notes) = zones::find(powercap);
        let mut sources = Vec::new();
        for zone in found {
            let Some(package) = package_of(&zone, packages) else { continue };
            match zone.read() {
                Ok(_) => sources.push(Source {
                    package,
                    counter: Counter::new(zone.range()),
                    zone,
                    watch: IdleWatch::default(),
                    failing_since: None,
                    power: Power::default(),
                }),
                Err(error) => notes.push(format!("{} unreadable ({error}) and left out", zone.domain)),
            }
        }
        let has_package = sources.iter().any(|source| source.zone.kind == Kind::Package);
        let lacks = match (&cgroups, has_package) {
            (_, false) => Some(format!("no RAPL package can be read below {}", powercap.display())),
            (Err(problem), true) => Some(format!("energy cannot be divided among pods: {problem}")),
            (Ok(_), true) => None,
        };
        let ledger = Ledger::new(sources.iter().map(|source| domain(source, packages)).collect());
        let cpus = packages.iter().map(|package| package.cpus.len()).collect();
        let cgroups = cgroups.ok();
        let mut meter = Self {
            sources,
            ledger,
            cgroups,
            holders: BTreeMap::new(),
            cpus,
            cpu_times: None,
            idle_by_hand: idle,
            lacks,
            notes,
        };
        meter.set_idle_by_hand();
        meter
    }

    /// By hand the whole idle power of a package is given: none is left for its memory.
    fn set_idle_by_hand(&mut self) {
        let Some(idle) = self.idle_by_hand else { return };
        for (index, source) in self.sources.iter().enumerate() {
            let power = if source.zone.kind == Kind::Package { idle } else { Milliwatts(0) };
            self.ledger.set_idle(index, Some(power));
        }
    }

    /// Why pods cannot be metered on this node, if so.
    #[must_use]
    pub fn lacks(&self) -> Option<&str> {
        self.lacks.as_deref()
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
        self.sources.iter().map(|source| (source.zone.domain.as_str(), source.power.now))
    }

    /// Measured idle power of each domain.
    pub fn baselines(&self) -> impl Iterator<Item = (&str, Option<Baseline>)> {
        self.sources.iter().map(|source| (source.zone.domain.as_str(), source.watch.baseline()))
    }

    /// Idle power of all domains that gross counts; `None` until it is known.
    #[must_use]
    pub fn idle(&self) -> Option<Milliwatts> {
        let gross = self.ledger.domains().enumerate().filter(|(_, domain)| domain.in_gross);
        let mut gross = gross.map(|(index, _)| self.ledger.idle(index)).peekable();
        gross.peek()?;
        gross.try_fold(Milliwatts(0), |sum, idle| Some(Milliwatts(sum.0 + idle?.0)))
    }

    /// The highest power that the packages are allowed for long, if the kernel tells it of all of them.
    #[must_use]
    pub fn max(&self) -> Option<Milliwatts> {
        let mut packages = self.sources.iter().filter(|source| source.zone.kind == Kind::Package).peekable();
        packages.peek()?;
        packages.try_fold(Milliwatts(0), |sum, source| Some(Milliwatts(sum.0 + source.zone.max_power()?.0)))
    }

    /// One phrase for reports: the meter and what its figures cover.
    #[must_use]
    pub fn describe(&self) -> String {
        let gross = self.sources.iter().filter(|source| source.zone.kind.in_gross());
        let domains: Vec<_> = gross.map(|source| source.zone.domain.as_str()).collect();
        let by = self.cgroups.as_ref().map_or("", |cgroups| cgroups.describe());
        format!("node agent: rapl ({}), by CPU time ({by})", domains.join(" + "))
    }

    /// The domains that could not be read for longer than `limit`, by the slot that they belong to.
    #[must_use]
    pub fn failing(&self, now: Duration, limit: Duration) -> BTreeMap<String, String> {
        let long = |source: &&Source| {
            source.zone.kind == Kind::Package
                && source.failing_since.is_some_and(|since| now.saturating_sub(since) > limit)
        };
        let domains: Vec<&Domain> = self.ledger.domains().collect();
        let index = |source: &Source| self.sources.iter().position(|other| other.zone.domain == source.zone.domain);
        self.sources
            .iter()
            .filter(long)
            .filter_map(|source| {
                let slot = domains[index(source)?].slot.clone();
                Some((slot, format!("meter {} cannot be read", source.zone.domain)))
            })
            .collect()
    }

    /// Reads everything and divides what was used since the last step.
    pub fn step(&mut self, now: Duration, unix_seconds: u64) {
        let cpu = self.cgroups.as_mut().and_then(|cgroups| cgroups.sample(&self.holders)).map(Arc::new);
        let mut totals = Vec::with_capacity(self.sources.len());
        for (index, source) in self.sources.iter_mut().enumerate() {
            let Ok(value) = source.zone.read() else {
                source.failing_since.get_or_insert(now);
                totals.push(None);
                continue;
            };
            source.failing_since = None;
            source.counter.read(now, value);
            if let Some(loss) = source.counter.loss() {
                tracing::warn!(domain = source.zone.domain, "counter lost: {loss}");
                self.ledger.lost(index, loss.to_string());
                source.counter = Counter::new(source.zone.range());
                source.counter.read(now, value);
                source.power = Power::default();
            }
            let total = source.counter.total();
            totals.push(total);
            if let Some(total) = total {
                source.power.observe(now, total);
            }
            if self.idle_by_hand.is_some() {
                continue;
            }
            let busy = cpu.as_ref().and_then(|cpu| cpu.node.get(source.package).copied());
            let before = source.watch.baseline();
            source.watch.observe(now, unix_seconds, total, busy, self.cpus.get(source.package).copied().unwrap_or(1));
            if let Some(found) = source.watch.baseline().filter(|_| source.watch.baseline() != before) {
                tracing::debug!(domain = source.zone.domain, watts = found.power.watts(), "idle power measured");
                self.ledger.set_idle(index, Some(found.power));
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
            self.ledger.set_owner(slot, Some(uid.to_owned()));
        }
        there
    }

    /// Takes a slot back.
    pub fn free(&mut self, slot: &str) {
        self.ledger.set_owner(slot, None);
    }

    /// Forgets a pod that is gone.
    pub fn forget(&mut self, uid: &str) {
        self.holders.remove(uid);
        self.ledger.forget(uid);
    }

    /// CPU time of a pod that holds a slot, in nanoseconds, as of the last step.
    #[must_use]
    pub fn cpu_nanos(&self, uid: &str) -> Option<u64> {
        self.cpu_times.as_ref()?.holders.get(uid).map(|times| times.iter().sum())
    }

    /// Whether a pod's cgroup is still there.
    #[must_use]
    pub fn lives(&self, uid: &str) -> bool {
        self.cgroups.as_ref().is_some_and(|cgroups| cgroups.pod(uid).is_some())
    }

    /// What outlives a restart.
    #[must_use]
    pub fn save(&self) -> Saved {
        let counter = |source: &Source| (source.zone.domain.clone(), (source.counter.clone(), source.watch.baseline()));
        Saved { ledger: self.ledger.clone(), counters: self.sources.iter().map(counter).collect() }
    }

    /// Goes on where an earlier process left off. `false`, and nothing is taken over, if it had other domains.
    pub fn resume(&mut self, saved: Saved) -> bool {
        let Saved { ledger, mut counters } = saved;
        if !ledger.domains().eq(self.ledger.domains()) {
            return false;
        }
        for source in &mut self.sources {
            if let Some((counter, baseline)) = counters.remove(&source.zone.domain) {
                source.counter = counter;
                source.watch = IdleWatch::with(baseline);
            }
        }
        self.ledger = ledger;
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

/// The package of a zone: zones that belong to none (`psys`, unknown ones) are not divided among pods.
fn package_of(zone: &Zone, packages: &[Package]) -> Option<usize> {
    if !matches!(zone.kind, Kind::Package | Kind::Dram | Kind::Core) {
        return None;
    }
    // package-1, package-1-die-0, package-1/dram
    let number = zone.domain.strip_prefix("package-")?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    let id: u32 = digits.parse().ok()?;
    packages.iter().position(|package| package.id == id)
}

fn domain(source: &Source, packages: &[Package]) -> Domain {
    Domain {
        name: source.zone.domain.clone(),
        division: Division::CpuTime { package: source.package },
        in_gross: source.zone.kind.in_gross(),
        slot: cpu_slot_id(packages[source.package].id),
        max: Milliwatts(MAX_WATTS * 1000),
        lag: RAPL_LAG,
    }
}
