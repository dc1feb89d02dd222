//! What is told of jobs, for metrics: energy, power, CPU time, memory and GPU-seconds of the pods that named them when they
//! opened a window. There are at most [`MAX_JOBS`] of them beside those that have pods now.

use crate::node_meter::{Gpu, NodeMeter};
use joulecast_meter::{Microjoules, Milliwatts};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A job by namespace and name.
pub type JobKey = (String, String);

/// Jobs that are remembered after their pods are gone; the one that was heard of longest ago is forgotten first.
pub const MAX_JOBS: usize = 500;
/// Power is the mean over at least this time.
const POWER_OVER: Duration = Duration::from_secs(1);

/// A job's pods on this node, while they held slots.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct JobFigures {
    /// Gross energy since the agent first started.
    pub gross: Microjoules,
    /// Mean gross power over the last second or so; absent when none of its pods is here.
    pub power: Option<Milliwatts>,
    /// CPU time since this process began.
    pub cpu: Duration,
    /// Time that its pods held GPUs, each times its utilisation, since this process began.
    pub gpu_seconds: f64,
    /// Memory that its pods use now, page cache included; absent when none is here, and where cgroups do not tell it.
    pub memory_bytes: Option<u64>,
}

/// All that is known of jobs.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// By UID of a pod: the namespace of its job is the kubelet's word, the name the pod's own.
    pods: BTreeMap<String, PodOfJob>,
    known: BTreeMap<JobKey, Known>,
    heard: u64,
}

/// What a pod stands at when it names its job.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Start {
    pub(super) cpu_nanos: Option<u64>,
    /// When, and its energy until then.
    pub(super) then: Option<(Duration, Microjoules)>,
}

#[derive(Debug)]
struct PodOfJob {
    job: JobKey,
    /// Its CPU time at the last step.
    cpu_nanos: Option<u64>,
    /// Its energy when power was last made up, and when that was.
    then: Option<(Duration, Microjoules)>,
    power: Option<Milliwatts>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Known {
    /// Of pods that are gone.
    gross: Microjoules,
    cpu: Duration,
    gpu_seconds: f64,
    /// Order in which jobs were heard of.
    heard: u64,
}

impl Jobs {
    /// Of a state that an earlier process left.
    pub(super) fn resumed(pods: BTreeMap<String, JobKey>) -> Self {
        let mut jobs = Self::default();
        for (uid, job) in pods {
            jobs.name(&uid, job, Start::default());
        }
        jobs
    }

    /// Job by UID of its pod, for the state.
    pub(super) fn pods(&self) -> BTreeMap<String, JobKey> {
        self.pods.iter().map(|(uid, pod)| (uid.clone(), pod.job.clone())).collect()
    }

    /// A pod says that it is a job's.
    pub(super) fn name(&mut self, uid: &str, job: JobKey, start: Start) {
        if let Some(pod) = self.pods.get_mut(uid) {
            if pod.job == job {
                return;
            }
            let before = std::mem::replace(&mut pod.job, job.clone());
            // A pod that names ever other jobs makes no series of each.
            let is_left = !self.pods.values().any(|pod| pod.job == before);
            if is_left && self.known.get(&before).is_some_and(|known| known.gross.0 == 0) {
                self.known.remove(&before);
            }
        } else {
            let pod = PodOfJob { job: job.clone(), cpu_nanos: start.cpu_nanos, then: start.then, power: None };
            self.pods.insert(uid.to_owned(), pod);
        }
        self.hear(&job);
    }

    fn hear(&mut self, job: &JobKey) {
        self.heard += 1;
        self.known.entry(job.clone()).or_default().heard = self.heard;
        let living: BTreeSet<&JobKey> = self.pods.values().map(|pod| &pod.job).collect();
        while self.known.keys().filter(|job| !living.contains(job)).count() > MAX_JOBS {
            let past = self.known.iter().filter(|(job, _)| !living.contains(job));
            let Some(oldest) = past.min_by_key(|(_, known)| known.heard).map(|(job, _)| job.clone()) else { break };
            self.known.remove(&oldest);
        }
    }

    /// A pod is gone, and used so much while it was here.
    pub(super) fn leave(&mut self, uid: &str, gross: Microjoules) {
        let Some(pod) = self.pods.remove(uid) else { return };
        let known = self.known.entry(pod.job.clone()).or_default();
        known.gross = known.gross.plus(gross);
        self.hear(&pod.job);
    }

    /// Follows a step of the meters that came so long after the one before.
    pub(super) fn step(&mut self, now: Duration, since: Duration, meter: &NodeMeter) {
        for (uid, pod) in &mut self.pods {
            let busy: f64 = meter.gpus_of(uid).filter_map(Gpu::busy_ratio).sum();
            let used = meter.cpu_nanos(uid);
            let grew = used.zip(pod.cpu_nanos).map_or(0, |(used, before)| used.saturating_sub(before));
            pod.cpu_nanos = used.or(pod.cpu_nanos);
            if let Some(known) = self.known.get_mut(&pod.job) {
                known.cpu += Duration::from_nanos(grew);
                known.gpu_seconds += busy * since.as_secs_f64();
            }
            let length = pod.then.map(|(then, _)| now.saturating_sub(then));
            if length.is_none_or(|length| length >= POWER_OVER) {
                let gross = meter.gross_of(uid);
                let before = pod.then.replace((now, gross));
                let used = before.and_then(|(_, before)| gross.minus(before));
                pod.power = used.zip(length).and_then(|(used, length)| Milliwatts::mean(used, length));
            }
        }
    }

    /// Everything.
    pub(super) fn figures(&self, meter: &NodeMeter) -> BTreeMap<JobKey, JobFigures> {
        let figures = |known: &Known| JobFigures {
            gross: known.gross,
            power: None,
            cpu: known.cpu,
            gpu_seconds: known.gpu_seconds,
            memory_bytes: None,
        };
        let mut jobs: BTreeMap<JobKey, JobFigures> =
            self.known.iter().map(|(job, known)| (job.clone(), figures(known))).collect();
        let sum = |all: Option<u64>, one: Option<u64>| match (all, one) {
            (Some(all), Some(one)) => Some(all + one),
            (all, one) => all.or(one),
        };
        for (uid, pod) in &self.pods {
            let job = jobs.entry(pod.job.clone()).or_default();
            job.gross = job.gross.plus(meter.gross_of(uid));
            job.power = sum(job.power.map(|power| power.0), pod.power.map(|power| power.0)).map(Milliwatts);
            job.memory_bytes = sum(job.memory_bytes, meter.memory_bytes(uid));
        }
        jobs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str) -> JobKey {
        ("team".into(), name.into())
    }

    #[test]
    fn there_are_never_more_jobs_than_so_many_and_those_with_pods() {
        let mut jobs = Jobs::default();
        jobs.name("stays", job("stays"), Start::default());
        for number in 0..3 * MAX_JOBS {
            let uid = format!("uid-{number}");
            jobs.name(&uid, job(&format!("job-{number}")), Start::default());
            jobs.leave(&uid, Microjoules(5));
            assert!(jobs.known.len() <= MAX_JOBS + 1, "{}", jobs.known.len());
        }
        assert!(jobs.known.contains_key(&job("stays")) && !jobs.known.contains_key(&job("job-0")));
        assert!(jobs.known.contains_key(&job(&format!("job-{}", 3 * MAX_JOBS - 1))));
        // Several pods of one job add up.
        for uid in ["a", "b"] {
            jobs.name(uid, job("same"), Start::default());
            jobs.leave(uid, Microjoules(5));
        }
        assert_eq!(jobs.known[&job("same")].gross, Microjoules(10));
    }

    #[test]
    fn a_pod_that_names_ever_other_jobs_makes_one_series() {
        let mut jobs = Jobs::default();
        for number in 0..1000 {
            jobs.name("uid", job(&format!("job-{number}")), Start::default());
        }
        assert_eq!(jobs.known.len(), 1);
        assert_eq!(Jobs::resumed(jobs.pods()).pods(), [("uid".into(), job("job-999"))].into());
    }
}
