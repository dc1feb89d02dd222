//! The metering service without its sockets: who holds which slot, which windows are open, and what each request gets.
//!
//! A window belongs to a pod, not to a connection: a pod that connects again finds it, and so does one whose agent was
//! restarted ([`state`]). When the pod is gone, its windows are forgotten.

use crate::holders::Holder;
use crate::node_meter::{Gpu, GpuLoad, Mark, NodeMeter};
use jobs::{Jobs, Start};
use joulecast_meter::ledger::{Edge, Figure, Metered};
use joulecast_meter::nvml::Trouble;
use joulecast_meter::slot::{Answer, Refusal, Request, WindowEnergy, WindowStatus};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

mod gpu_use;
mod jobs;
pub mod state;
pub use jobs::{JobFigures, JobKey, MAX_JOBS};

/// Windows that may be open for one slot.
pub const MAX_WINDOWS: usize = 256;
/// Longest name of a job that is taken.
const MAX_JOB_BYTES: usize = 253;
/// An edge may use a step that was made at most this long ago: counters move no faster, and nobody can keep the agent
/// reading files.
const FRESH: Duration = Duration::from_millis(1);

/// An open window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Window {
    /// UID of its pod.
    uid: String,
    edge: Edge,
    /// Counter and integrated power of its GPUs, by domain.
    marks: BTreeMap<String, Mark>,
    /// Use of its GPUs so far.
    #[serde(default)]
    gpu: gpu_use::Gathered,
}

/// The state of the service.
#[derive(Debug)]
pub struct Metering {
    meter: NodeMeter,
    /// Identities of the slots by resource.
    slots: BTreeMap<&'static str, Vec<String>>,
    /// Holder by slot.
    holders: BTreeMap<String, Holder>,
    /// Slots that may have a new holder.
    stale: BTreeSet<String>,
    windows: BTreeMap<u64, Window>,
    next: u64,
    stepped: Option<Duration>,
    jobs: Jobs,
    /// Whether windows were opened or closed since the state was last saved.
    changed: bool,
}

impl Metering {
    /// A service over the meters of this node, which has these slots, by resource.
    #[must_use]
    pub fn new(meter: NodeMeter, slots: BTreeMap<&'static str, Vec<String>>) -> Self {
        Self {
            meter,
            slots,
            holders: BTreeMap::new(),
            stale: BTreeSet::new(),
            windows: BTreeMap::new(),
            next: 1,
            stepped: None,
            jobs: Jobs::default(),
            changed: false,
        }
    }

    /// The meters.
    #[must_use]
    pub fn meter(&self) -> &NodeMeter {
        &self.meter
    }

    /// Holder by slot.
    #[must_use]
    pub fn holders(&self) -> &BTreeMap<String, Holder> {
        &self.holders
    }

    /// What the pods of each job used on this node while they held slots.
    #[must_use]
    pub fn jobs(&self) -> BTreeMap<JobKey, JobFigures> {
        self.jobs.figures(&self.meter)
    }

    /// How many slots of each resource are held, and how many there are.
    pub fn slots(&self) -> impl Iterator<Item = (&'static str, usize, usize)> {
        let held = |slots: &[String]| slots.iter().filter(|slot| self.holders.contains_key(*slot)).count();
        self.slots.iter().map(move |(resource, slots)| (*resource, held(slots), slots.len()))
    }

    /// NVML told of an error of a GPU.
    pub fn trouble(&mut self, trouble: &Trouble) {
        self.meter.trouble(trouble);
    }

    /// When the last step was made.
    #[must_use]
    pub fn stepped(&self) -> Option<Duration> {
        self.stepped
    }

    /// Open windows.
    #[must_use]
    pub fn open_windows(&self) -> usize {
        self.windows.len()
    }

    /// A slot was given to a pod: who holds it must be asked before it is used.
    pub fn allocated(&mut self, slots: &[String]) {
        self.stale.extend(slots.iter().cloned());
    }

    /// Whether the kubelet must be asked who holds a slot.
    #[must_use]
    pub fn must_ask(&self, slot: &str) -> bool {
        self.stale.contains(slot) || !self.holders.contains_key(slot)
    }

    /// A look at the counters between two steps.
    pub fn look(&mut self, now: Duration) {
        self.meter.look(now);
        self.gather_gpu_use(now);
    }

    /// Regular step; `now` is the time since boot.
    pub fn tick(&mut self, now: Duration, unix_seconds: u64) {
        self.meter.step(now, unix_seconds);
        let since = self.stepped.replace(now).map_or(Duration::ZERO, |then| now.saturating_sub(then));
        self.jobs.step(now, since, &self.meter);
        self.gather_gpu_use(now);
    }

    /// Takes readings of the load of GPUs into the windows of those who hold them, in the steps that made some.
    fn gather_gpu_use(&mut self, now: Duration) {
        if !self.meter.has_fresh_load() {
            return;
        }
        let uids: BTreeSet<&String> = self.holders.values().map(|holder| &holder.uid).collect();
        let load = |uid: &String| Some((uid.clone(), self.meter.fresh_load_of(uid)?));
        let loads: BTreeMap<String, GpuLoad> = uids.into_iter().filter_map(load).collect();
        for window in self.windows.values_mut() {
            if let Some(load) = loads.get(&window.uid) {
                window.gpu.add(load, now.saturating_sub(window.edge.at));
            }
        }
    }

    /// Takes over who holds which slot. A holder that the kubelet does not name is kept while its cgroup is there and
    /// nobody else holds the slot: a kubelet that was just restarted does not know its pods yet.
    pub fn held(&mut self, now: Duration, unix_seconds: u64, holders: &BTreeMap<String, Holder>) {
        // What was used until now belongs to those who held the slots until now.
        self.tick(now, unix_seconds);
        for (slot, holder) in holders {
            if self.holders.get(slot).is_some_and(|before| before.uid != holder.uid) {
                self.meter.free(slot);
                self.holders.remove(slot);
            }
            if !self.meter.hold(slot, &holder.uid) {
                tracing::warn!(slot, pod = holder.name, uid = holder.uid, "no cgroup of the pod that holds the slot");
                continue;
            }
            if self.holders.insert(slot.clone(), holder.clone()).as_ref() != Some(holder) {
                tracing::info!(slot, namespace = holder.namespace, pod = holder.name, "the slot is held");
            }
            self.stale.remove(slot);
        }
        let gone: Vec<String> = self
            .holders
            .iter()
            .filter(|(slot, holder)| !holders.contains_key(*slot) && !self.meter.lives(&holder.uid))
            .map(|(slot, _)| slot.clone())
            .collect();
        for slot in gone {
            tracing::info!(slot, "the slot is free");
            self.meter.free(&slot);
            self.holders.remove(&slot);
        }
        let living: BTreeSet<&String> = self.holders.values().map(|holder| &holder.uid).collect();
        let of_ledger: BTreeSet<String> = self
            .meter
            .ledger()
            .books()
            .flat_map(|(_, books)| books.holders.keys().cloned())
            .chain(self.windows.values().map(|window| window.uid.clone()))
            .filter(|uid| !living.contains(uid) && !self.meter.lives(uid))
            .collect();
        for uid in of_ledger {
            self.jobs.leave(&uid, self.meter.gross_of(&uid));
            self.meter.forget(&uid);
            let before = self.windows.len();
            self.windows.retain(|_, window| window.uid != uid);
            self.changed |= before != self.windows.len();
        }
        // A new holder counts from a step that knows it.
        self.tick(now, unix_seconds);
    }

    /// Answers a request that came through the socket of a slot.
    pub fn answer(&mut self, slot: &str, request: Request, now: Duration, unix_seconds: u64) -> Answer {
        if let Some(lacks) = self.meter.lacks() {
            return refused(Refusal::NoMeter, format!("this node has no meter: {lacks}"));
        }
        let Some(holder) = self.holders.get(slot).cloned().filter(|_| !self.stale.contains(slot)) else {
            return refused(Refusal::NotReady, format!("the kubelet does not yet say which pod holds slot {slot}"));
        };
        let at = self.edge_time(now, unix_seconds);
        if let Some(lacks) = self.meter.lacks_for(&holder.uid) {
            return refused(Refusal::NoMeter, format!("this slot has no meter: {lacks}"));
        }
        match request {
            Request::Open { job } => self.open(slot, &holder, job, at),
            Request::Mark { window } => self.read(window, &holder, at, false),
            Request::Close { window } => self.read(window, &holder, at, true),
        }
    }

    /// The moment of the step that an edge made now stands on.
    fn edge_time(&mut self, now: Duration, unix_seconds: u64) -> Duration {
        match self.stepped {
            Some(stepped) if now.saturating_sub(stepped) < FRESH => stepped,
            _ => {
                self.tick(now, unix_seconds);
                now
            }
        }
    }

    fn open(&mut self, slot: &str, holder: &Holder, job: Option<String>, at: Duration) -> Answer {
        let slots = self.holders.values().filter(|other| other.uid == holder.uid).count();
        let open = self.windows.values().filter(|window| window.uid == holder.uid).count();
        if open >= MAX_WINDOWS * slots.max(1) {
            let message = format!("{open} windows are open for slot {slot}, which is the most: close some");
            return refused(Refusal::TooMany, message);
        }
        if let Some(job) = job {
            if job.is_empty() || job.len() > MAX_JOB_BYTES || job.chars().any(char::is_control) {
                let message = format!("job: a name of 1 to {MAX_JOB_BYTES} bytes without control characters is wanted");
                return refused(Refusal::Malformed, message);
            }
            let then = Some((at, self.meter.gross_of(&holder.uid)));
            let start = Start { cpu_nanos: self.meter.cpu_nanos(&holder.uid), then };
            self.jobs.name(&holder.uid, (holder.namespace.clone(), job), start);
        }
        let window = self.next;
        self.next += 1;
        let edge = self.meter.ledger().edge(&holder.uid, at);
        let marks = self.meter.marks(&holder.uid);
        self.windows.insert(window, Window { uid: holder.uid.clone(), edge, marks, gpu: Default::default() });
        self.changed = true;
        let idle = self.meter.ledger().idle_of(&holder.uid);
        Answer::Opened { window, meter: self.meter.describe(&holder.uid), idle_milliwatts: idle.map(|idle| idle.0) }
    }

    fn read(&mut self, number: u64, holder: &Holder, at: Duration, close: bool) -> Answer {
        let ledger = self.meter.ledger();
        let Some(window) = self.windows.get(&number).filter(|window| window.uid == holder.uid) else {
            let message = format!("this pod has no open window {number}: it was closed, or the agent lost it");
            return refused(Refusal::UnknownWindow, message);
        };
        let metered = ledger.between(&holder.uid, &window.edge, &ledger.edge(&holder.uid, at));
        let mut energy = energy(number, &metered);
        energy.device_lost = self.meter.device_lost(&holder.uid);
        energy.gpu = window.gpu.told(metered.length);
        energy.notes.extend(self.meter.gpus_of(&holder.uid).filter_map(shared));
        energy.notes.extend(cross_check(&self.meter, metered.length, &window.marks));
        if close {
            self.windows.remove(&number);
            self.changed = true;
        }
        Answer::Window(energy)
    }
}

/// Windows shorter than this are not cross-checked: power may be told as the mean of the last second.
const CHECKED: Duration = Duration::from_secs(10);

/// How far the counters of a window's GPUs are from the power that they told, for the one where that is furthest.
fn cross_check(meter: &NodeMeter, length: Duration, marks: &BTreeMap<String, Mark>) -> Option<String> {
    let checked = marks.iter().filter(|_| length >= CHECKED);
    let moved = checked.filter_map(|(name, mark)| Some((name, meter.since(name, *mark)?)));
    let (name, furthest) = moved.max_by(|(_, a), (_, b)| a.apart.abs().total_cmp(&b.apart.abs()))?;
    let (counter, integrated) = (furthest.counter.joules(), furthest.integrated.joules());
    let percent = furthest.apart * 100.0;
    Some(format!("{name}: energy counter {counter:.1} J, integrated power {integrated:.1} J ({percent:+.1} %)"))
}

/// What must be known of the energy of a GPU that several pods share.
fn shared(gpu: &Gpu) -> Option<String> {
    gpu.board().instances.as_ref()?;
    let name = gpu.name();
    Some(format!(
        "{name} is BoardShared: one counter for all its MIG instances, divided by the slices of those that were held"
    ))
}

/// A refusal.
#[must_use]
pub fn refused(reason: Refusal, message: String) -> Answer {
    Answer::Refused { reason, message }
}

fn energy(window: u64, metered: &Metered) -> WindowEnergy {
    let mut status = WindowStatus::Complete;
    let mut notes = Vec::new();
    let mut domains = BTreeMap::new();
    for (name, _, figure) in &metered.domains {
        match figure {
            Figure::Known { gross, .. } => drop(domains.insert(name.clone(), gross.0)),
            Figure::Absent(why) => {
                if status == WindowStatus::Complete {
                    status = WindowStatus::Partial;
                }
                notes.push(format!("{name} absent: {why}"));
            }
            Figure::Invalid(why) => {
                status = WindowStatus::Invalid;
                notes.push(format!("{name} invalid: {why}"));
            }
        }
    }
    WindowEnergy {
        window,
        status,
        length_microseconds: u64::try_from(metered.length.as_micros()).unwrap_or(u64::MAX),
        gross_microjoules: metered.gross().map(|energy| energy.0),
        idle_microjoules: metered.idle().map(|energy| energy.0),
        domain_microjoules: domains,
        notes,
        gpu: None,
        device_lost: None,
    }
}
