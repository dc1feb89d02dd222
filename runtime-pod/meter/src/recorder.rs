//! One window of metering: energy, idle energy, use of CPU and memory between its begin and its end.

use crate::choice::Choice;
use crate::cpu_time::CpuTime;
use crate::host::Host;
use crate::meter::{GpuUse, Meter, Source, Totals};
use crate::units::{Microjoules, Milliwatts};
use std::collections::BTreeMap;
use std::time::Duration;

/// Peak use is taken over intervals of at least this length: process CPU time moves in ticks of 10 ms.
pub const MIN_PEAK_INTERVAL: Duration = Duration::from_millis(50);

/// A window that is being recorded.
pub struct Recorder {
    meter: Box<dyn Meter>,
    idle: Option<Milliwatts>,
    notes: Vec<String>,
    host: Host,
    cpu: CpuTime,
    first: Totals,
    cpu_first: Option<Duration>,
    cpu_last: Option<(Duration, Duration)>,
    cpu_peak_millis: Option<u64>,
}

/// A finished window. What was not read is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    /// Where the figures come from; `Unavailable` if there is no gross figure for the whole window.
    pub source: Source,
    /// The meter and what it covers.
    pub meter: String,
    /// Length of the window.
    pub length: Duration,
    /// All energy of the slot.
    pub gross: Option<Microjoules>,
    /// What the slot would have used idle: idle power times the window.
    pub idle: Option<Microjoules>,
    /// Gross minus idle; 0 where idle was larger.
    pub net: Option<Microjoules>,
    /// By domain, those included that gross does not add.
    pub domains: BTreeMap<String, Microjoules>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// Mean use of CPUs in thousandths of one.
    pub cpu_mean_millis: Option<u64>,
    /// Highest use of CPUs over one sampling interval.
    pub cpu_peak_millis: Option<u64>,
    /// Highest resident memory of the process in bytes, since it started.
    pub memory_peak_bytes: Option<u64>,
    /// Use of the slot's GPUs, where it has some.
    pub gpu: GpuUse,
}

/// Totals of a window that goes on. What was not read is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoFar {
    /// Length of the window.
    pub length: Duration,
    /// All energy of the slot.
    pub gross: Option<Microjoules>,
    /// What the slot would have used idle.
    pub idle: Option<Microjoules>,
    /// Gross minus idle; 0 where idle was larger.
    pub net: Option<Microjoules>,
}

impl Recorder {
    /// Begins a window at `now`.
    #[must_use]
    pub fn begin(choice: Choice, host: &Host, now: Duration) -> Self {
        let Choice { mut meter, idle, notes } = choice;
        let cpu = CpuTime::discover(host);
        let (first, cpu_first) = (meter.sample(now), cpu.read());
        Self {
            meter,
            idle,
            notes,
            host: host.clone(),
            cpu,
            first,
            cpu_first,
            cpu_last: cpu_first.map(|used| (now, used)),
            cpu_peak_millis: None,
        }
    }

    /// Where the figures come from, as long as they come.
    #[must_use]
    pub fn source(&self) -> Source {
        self.meter.source()
    }

    /// The meter and what it covers.
    #[must_use]
    pub fn describe(&self) -> String {
        self.meter.describe()
    }

    /// Why the device is lost, as of the last sample.
    #[must_use]
    pub fn device_lost(&self) -> Option<&str> {
        self.meter.device_lost()
    }

    /// Gross energy from the window's begin to `now`.
    pub fn gross(&mut self, now: Duration) -> Option<Microjoules> {
        let totals = self.meter.sample(now);
        totals.gross.zip(self.first.gross).and_then(|(now, first)| now.minus(first))
    }

    /// The window's totals up to `now`.
    pub fn so_far(&mut self, now: Duration) -> SoFar {
        let gross = self.gross(now);
        let length = now.saturating_sub(self.first.at);
        let idle = gross.and(self.idle).map(|power| power.over(length));
        let net = gross.zip(idle).map(|(gross, idle)| gross.minus(idle).unwrap_or_default());
        SoFar { length, gross, idle, net }
    }

    /// One regular sample: keeps the meter from missing a wrap, and follows the use of CPUs.
    pub fn tick(&mut self, now: Duration) {
        self.meter.sample(now);
        self.follow_cpu(now);
    }

    fn follow_cpu(&mut self, now: Duration) {
        let Some(((then, before), used)) = self.cpu_last.zip(self.cpu.read()) else { return };
        let interval = now.saturating_sub(then);
        if interval < MIN_PEAK_INTERVAL {
            return;
        }
        self.cpu_peak_millis = self.cpu_peak_millis.max(use_millis(used.saturating_sub(before), interval));
        self.cpu_last = Some((now, used));
    }

    /// Ends the window at `now`.
    #[must_use]
    pub fn finish(mut self, now: Duration) -> Recording {
        let totals = self.meter.finish(now);
        self.follow_cpu(now);
        let length = now.saturating_sub(self.first.at);
        let gross = totals.gross.zip(self.first.gross).and_then(|(now, first)| now.minus(first));
        let idle = gross.and(self.idle).map(|power| power.over(length));
        let net = gross.zip(idle).map(|(gross, idle)| gross.minus(idle).unwrap_or_default());
        let first = &self.first;
        let domains = totals
            .domains
            .into_iter()
            .filter_map(|(domain, total)| Some((domain.clone(), total.minus(*first.domains.get(&domain)?)?)))
            .collect();
        let mut notes = self.notes;
        notes.extend(self.meter.notes());
        if gross.zip(idle).is_some_and(|(gross, idle)| idle > gross) {
            notes.push("idle power before the run was higher than power during it: net is 0".to_owned());
        }
        let used = self.cpu_first.zip(self.cpu.read()).map(|(first, used)| used.saturating_sub(first));
        let cpu_mean_millis = used.and_then(|used| use_millis(used, length));
        Recording {
            source: if gross.is_some() { self.meter.source() } else { Source::Unavailable },
            meter: self.meter.describe(),
            length,
            gross,
            idle,
            net,
            domains,
            notes,
            cpu_mean_millis,
            // A short window's last piece, too short for a peak of its own, may lift the mean above all others.
            cpu_peak_millis: self.cpu_peak_millis.max(cpu_mean_millis),
            memory_peak_bytes: self.host.memory_peak_bytes(),
            gpu: self.meter.gpu(),
        }
    }
}

/// Use of CPUs in thousandths of one, rounded; `None` for an empty time.
fn use_millis(used: Duration, time: Duration) -> Option<u64> {
    let time = time.as_nanos();
    (time > 0).then(|| u64::try_from((used.as_nanos() * 1000 + time / 2) / time).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;

    /// A fake meter that gives the totals it is told, one after the other.
    struct FakeMeter(Vec<Option<u64>>);

    impl Meter for FakeMeter {
        fn source(&self) -> Source {
            Source::Measured
        }
        fn describe(&self) -> String {
            "fake".to_owned()
        }
        fn notes(&self) -> Vec<String> {
            Vec::new()
        }
        fn sample(&mut self, now: Duration) -> Totals {
            let gross = self.0.remove(0).map(Microjoules);
            let domains = gross.map(|gross| BTreeMap::from([("package-0".to_owned(), gross)])).unwrap_or_default();
            Totals { at: now, gross, domains }
        }
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn stat(ticks: u64) -> String {
        format!("1 (x) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0 5 0 0\n")
    }

    fn record(readings: &[Option<u64>], idle: Option<u64>) -> Recording {
        let fake = FakeHost::new(&[("/proc/self/stat", &stat(100)), ("/proc/self/status", "VmHWM:\t10 kB\n")]);
        let meter = Box::new(FakeMeter(readings.to_vec()));
        let choice = Choice { meter, idle: idle.map(Milliwatts), notes: vec!["chosen".to_owned()] };
        let mut recorder = Recorder::begin(choice, &fake.host(), ms(1000));
        fake.set("/proc/self/stat", &stat(120));
        recorder.tick(ms(1100));
        fake.set("/proc/self/stat", &stat(121));
        recorder.tick(ms(1101));
        fake.set("/proc/self/stat", &stat(130));
        recorder.finish(ms(3000))
    }

    #[test]
    fn a_window_keeps_gross_idle_and_net_apart() {
        let recording = record(&[Some(5), Some(6), Some(7), Some(9_000_005)], Some(1500));
        assert_eq!(recording.gross, Some(Microjoules(9_000_000)));
        assert_eq!(recording.idle, Some(Microjoules(3_000_000)));
        assert_eq!(recording.net, Some(Microjoules(6_000_000)));
        assert_eq!(recording.domains["package-0"], Microjoules(9_000_000));
        assert_eq!(recording.length, ms(2000));
        assert_eq!(recording.cpu_mean_millis, Some(150));
        assert_eq!(recording.cpu_peak_millis, Some(2000), "the 1 ms interval does not count");
        assert_eq!(recording.memory_peak_bytes, Some(10 * 1024));
        assert_eq!(recording.notes, ["chosen"]);
    }

    #[test]
    fn no_peak_is_below_the_mean() {
        let fake = FakeHost::new(&[("/proc/self/stat", &stat(100))]);
        let choice = Choice { meter: Box::new(FakeMeter(vec![None, None, None])), idle: None, notes: Vec::new() };
        let mut recorder = Recorder::begin(choice, &fake.host(), ms(1000));
        fake.set("/proc/self/stat", &stat(101));
        recorder.tick(ms(1100));
        fake.set("/proc/self/stat", &stat(103));
        let recording = recorder.finish(ms(1101));
        assert_eq!((recording.cpu_mean_millis, recording.cpu_peak_millis), (Some(297), Some(297)));
    }

    #[test]
    fn an_open_window_has_totals_too() {
        let choice = Choice {
            meter: Box::new(FakeMeter(vec![Some(5), Some(3_000_005), None])),
            idle: Some(Milliwatts(1500)),
            notes: Vec::new(),
        };
        let mut recorder = Recorder::begin(choice, &FakeHost::new(&[]).host(), ms(1000));
        let energy = |joules: u64| Some(Microjoules(joules * 500_000));
        let want = SoFar { length: ms(1000), gross: energy(6), idle: energy(3), net: energy(3) };
        assert_eq!(recorder.so_far(ms(2000)), want);
        let dark = SoFar { length: ms(1500), gross: None, idle: None, net: None };
        assert_eq!(recorder.so_far(ms(2500)), dark);
    }

    #[test]
    fn what_is_not_known_is_absent() {
        let recording = record(&[Some(5), None, None, Some(7)], None);
        assert_eq!((recording.gross, recording.idle, recording.net), (Some(Microjoules(2)), None, None));
        let recording = record(&[Some(5), None, None, None], Some(1500));
        assert_eq!((recording.gross, recording.idle, recording.net), (None, None, None));
        assert_eq!(recording.source, Source::Unavailable);
        assert!(recording.domains.is_empty());
        let recording = record(&[Some(0), Some(0), Some(0), Some(1)], Some(1500));
        assert_eq!(recording.net, Some(Microjoules(0)));
        assert!(recording.notes[1].contains("net is 0"), "{:?}", recording.notes);
    }
}
