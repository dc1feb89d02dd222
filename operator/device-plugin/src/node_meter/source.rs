//! One domain of the node: its counter, and what is known of it.

use super::gpu::Gpu;
use crate::slots::cpu_slot_id;
use joulecast_meter::cgroup_time::CpuTimes;
use joulecast_meter::counter::{Counter, MAX_WATTS};
use joulecast_meter::idle::{Baseline, IdleWatch};
use joulecast_meter::ledger::{Division, Domain};
use joulecast_meter::rapl::zones::{Kind, Zone};
use joulecast_meter::topology::Package;
use joulecast_meter::{Microjoules, Milliwatts};
use std::time::Duration;

/// RAPL counters are updated about every millisecond.
const RAPL_LAG: Duration = Duration::from_millis(10);
/// Power is the mean over at least this time.
const POWER_OVER: Duration = Duration::from_secs(1);

/// One domain.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) domain: Domain,
    pub(super) probe: Probe,
    pub(super) counter: Counter,
    watch: IdleWatch,
    /// The last reading failed: since when and why.
    failing: Option<(Duration, String)>,
    power: Power,
}

/// Where its readings come from.
#[derive(Debug)]
pub(super) enum Probe {
    Rapl { zone: Zone, package: usize },
    Gpu(Box<Gpu>),
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

impl Source {
    /// A zone of RAPL, with the machine's packages; `None` if it belongs to none of them.
    pub(super) fn rapl(zone: Zone, packages: &[Package]) -> Option<Self> {
        let package = package_of(&zone, packages)?;
        let domain = Domain {
            name: zone.domain.clone(),
            division: Division::CpuTime { package },
            in_gross: zone.kind.in_gross(),
            slot: cpu_slot_id(packages[package].id),
            max: Milliwatts(MAX_WATTS * 1000),
            lag: RAPL_LAG,
        };
        Some(Self::new(domain, Counter::new(zone.range()), Probe::Rapl { zone, package }))
    }

    /// A GPU with an energy counter.
    pub(super) fn gpu(gpu: Gpu) -> Self {
        Self::new(gpu.domain(), Counter::new(None), Probe::Gpu(Box::new(gpu)))
    }

    fn new(domain: Domain, counter: Counter, probe: Probe) -> Self {
        let (watch, power) = (IdleWatch::default(), Power::default());
        Self { domain, probe, counter, watch, failing: None, power }
    }

    pub(super) fn is_package(&self) -> bool {
        matches!(&self.probe, Probe::Rapl { zone, .. } if zone.kind == Kind::Package)
    }

    pub(super) fn as_gpu(&self) -> Option<&Gpu> {
        match &self.probe {
            Probe::Gpu(gpu) => Some(gpu),
            Probe::Rapl { .. } => None,
        }
    }

    /// `rapl` or `nvml`.
    pub(super) fn meter(&self) -> &'static str {
        match self.probe {
            Probe::Rapl { .. } => "rapl",
            Probe::Gpu(_) => "nvml",
        }
    }

    /// The highest power that it is allowed for long, if it tells it.
    pub(super) fn max_power(&self) -> Option<Milliwatts> {
        match &self.probe {
            Probe::Rapl { zone, .. } => zone.max_power(),
            Probe::Gpu(gpu) => gpu.board.max,
        }
    }

    pub(super) fn power(&self) -> Option<Milliwatts> {
        self.power.now
    }

    pub(super) fn baseline(&self) -> Option<Baseline> {
        self.watch.baseline()
    }

    /// Takes over what an earlier process knew.
    pub(super) fn resume(&mut self, counter: Counter, baseline: Option<Baseline>) {
        self.counter = counter;
        self.watch = IdleWatch::with(baseline);
    }

    /// Why its slots must not be given out, if so: it is lost, or could not be read for longer than `limit`.
    pub(super) fn ill(&self, now: Duration, limit: Duration) -> Option<String> {
        if let Some(why) = self.as_gpu().and_then(Gpu::lost) {
            return Some(format!("{} is lost: {why}", self.domain.name));
        }
        // A part of a package that cannot be read is no reason: the package itself counts.
        let counts = self.is_package() || self.as_gpu().is_some();
        let (since, why) = self.failing.as_ref().filter(|_| counts)?;
        let long = now.saturating_sub(*since) > limit;
        long.then(|| format!("meter {} cannot be read: {why}", self.domain.name))
    }

    /// Reads the counter. Its total in microjoules; and why an earlier total was lost with this reading, if so.
    pub(super) fn read(&mut self, now: Duration) -> (Option<u64>, Option<String>) {
        let value = match &mut self.probe {
            Probe::Rapl { zone, .. } => zone.read().map_err(|error| error.to_string()),
            Probe::Gpu(gpu) => gpu.read(now),
        };
        let value = match value {
            Ok(value) => value,
            Err(why) => {
                self.failing.get_or_insert((now, why));
                return (None, None);
            }
        };
        self.failing = None;
        self.counter.read(now, value);
        let lost = self.counter.loss().map(|loss| loss.to_string());
        if lost.is_some() {
            let range = match &self.probe {
                Probe::Rapl { zone, .. } => zone.range(),
                Probe::Gpu(_) => None,
            };
            self.counter = Counter::new(range);
            self.counter.read(now, value);
            self.power = Power::default();
        }
        let total = self.counter.total();
        if let Some(total) = total {
            self.power.observe(now, total);
        }
        if let Probe::Gpu(gpu) = &mut self.probe {
            gpu.compare(now, total, lost.is_some());
        }
        (total, lost)
    }

    /// Looks for idle power; it is returned when it was measured anew. `cpus` are the CPUs of each package.
    pub(super) fn watch(
        &mut self,
        now: Duration,
        unix_seconds: u64,
        total: Option<u64>,
        cpu: Option<&CpuTimes>,
        cpus: &[usize],
        held: bool,
    ) -> Option<Milliwatts> {
        let (busy, of) = match &self.probe {
            Probe::Rapl { package, .. } => {
                (cpu.and_then(|cpu| cpu.node.get(*package).copied()), cpus.get(*package).copied().unwrap_or(1))
            }
            Probe::Gpu(gpu) => (gpu.busy_nanos(held), 1),
        };
        let before = self.watch.baseline();
        self.watch.observe(now, unix_seconds, total, busy, of);
        let found = self.watch.baseline().filter(|_| self.watch.baseline() != before)?;
        tracing::debug!(domain = self.domain.name, watts = found.power.watts(), "idle power measured");
        Some(found.power)
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
