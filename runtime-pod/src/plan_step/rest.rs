//! What is left of a job that has been started: which lines have no result yet, how they are placed at present, and whether
//! another assignment of them is worth stopping everybody and loading models anew.

use super::PlanError;
use crate::assignment::{FINISHED, Reader};
use crate::batch_file::parts::Parts;
use crate::batch_file::results::Results;
use crate::batch_file::{Line, OutputError, merged};
use crate::bucket::{Address, Bucket, mirror::Mirror};
use joulecast_crds::plan_step::{PlanLimits, PlanRest, PlanSpec};
use joulecast_planner::plan::{Candidate, Normalisers};
use joulecast_planner::units::Tokens;
use std::path::Path;
use std::sync::Arc;

/// The results that a job has, and its present assignment.
pub(super) struct Left {
    results: Results,
    assignment: Option<Reader>,
}

/// What is known of a line besides its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// It has a result; whether that is an error.
    Finished(bool),
    /// It has none, and belongs to this configuration of the plan at work.
    Open(u8),
}

impl Left {
    /// Reads what the attempts of the job have left beside its output.
    ///
    /// # Errors
    /// As the system and the server give them; [`PlanError::NothingLeft`] once the output is finished.
    pub(super) fn open(spec: &PlanSpec, rest: &PlanRest, output: Option<&Address>) -> Result<Self, PlanError> {
        let mut parts = Parts::of(Path::new(&rest.output_path), &spec.run.job_uid)?;
        std::fs::create_dir_all(parts.dir())
            .map_err(|source| PlanError::Directory { path: parts.dir().to_owned(), source })?;
        if let Some(object) = output {
            let bucket = Arc::new(Bucket::open(object).map_err(OutputError::from)?);
            parts = parts.mirrored(Arc::new(Mirror::new(bucket, &object.object.key, &spec.run.job_uid)));
            parts.fetch().map_err(OutputError::from)?;
        }
        if merged::finished(&parts)?.is_some() {
            return Err(PlanError::NothingLeft);
        }
        let attempts = parts.attempts().map_err(OutputError::from)?;
        let index = parts.dir().join(format!("plan-{}.index", spec.run.epoch));
        let results = Results::open(&parts, &attempts, &index)?;
        tracing::info!(attempts = attempts.len(), places = results.places(), "results of earlier attempts");
        // Only the configurations of lines are asked for, not how many are whose.
        let reader = |assignment| Reader::open(assignment, 0).map(|(reader, _)| reader);
        Ok(Self { results, assignment: rest.assignment.as_ref().map(reader).transpose()? })
    }

    /// To be asked once for each line that is not blank, in order.
    ///
    /// # Errors
    /// As the system gives them.
    pub(super) fn look(&mut self, line: &Line<'_>) -> Result<Look, PlanError> {
        let present = match &mut self.assignment {
            None => 0,
            // One that had a result at the last plan and lost it is the first configuration's.
            Some(reader) => reader.next_configuration()?.filter(|present| *present != FINISHED).unwrap_or(0),
        };
        let entry = self.results.get(line.place).map_err(OutputError::from)?;
        match entry.filter(|entry| entry.request == line.content.checksum()) {
            Some(entry) => Ok(Look::Finished(entry.failed)),
            None => Ok(Look::Open(u8::try_from(present).unwrap_or(0))),
        }
    }
}

/// What an assignment comes to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sums {
    /// Sum of zeta e/E - (1 - zeta) a (x + y)/A, and of what is charged over E.
    pub(super) objective: f64,
    /// Sum of the magnitudes of these.
    pub(super) magnitude: f64,
    /// Joules.
    pub(super) joules: f64,
    /// By candidate: seconds until its last slot is done; None where no request goes.
    pub(super) seconds: Vec<Option<f64>>,
}

/// What an assignment is weighed by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weights<'a> {
    /// Of energy against accuracy.
    pub(super) zeta: f64,
    /// The job's own.
    pub(super) normalisers: Normalisers,
    /// By candidate: joules charged for a device-second.
    pub(super) charges: &'a [f64],
}

impl Weights<'_> {
    /// What a candidate's device-seconds are charged, in the objective's unit.
    fn charged(&self, candidate: usize, seconds: f64) -> f64 {
        over(self.charges[candidate] * seconds, self.normalisers.energy.0)
    }
}

/// What nobody spends, or what all score 0 in, weighs nothing.
fn over(value: f64, mean: f64) -> f64 {
    if mean > 0.0 { value / mean } else { 0.0 }
}

impl Sums {
    /// Of requests that are placed so, without loading.
    pub(super) fn of(
        candidates: &[Candidate],
        requests: &[Tokens],
        placed: impl Fn(usize) -> usize,
        weights: &Weights<'_>,
    ) -> Self {
        let Weights { zeta, normalisers, .. } = *weights;
        let mut sums = Self { objective: 0.0, magnitude: 0.0, joules: 0.0, seconds: vec![None; candidates.len()] };
        for (index, tokens) in requests.iter().enumerate() {
            let candidate = &candidates[placed(index)];
            let energy = candidate.energy.at(*tokens);
            let score = candidate.accuracy * (f64::from(tokens.input) + f64::from(tokens.output));
            let runtime = candidate.runtime.at(*tokens);
            let cost = zeta * over(energy, normalisers.energy.0) - (1.0 - zeta) * over(score, normalisers.accuracy)
                + weights.charged(placed(index), runtime);
            sums.objective += cost;
            sums.magnitude += cost.abs();
            sums.joules += energy;
            let slots = f64::from(candidate.slots.unwrap_or(1).max(1));
            *sums.seconds[placed(index)].get_or_insert(0.0) += runtime / slots;
        }
        sums
    }

    /// The same with the loading of each candidate that has a request.
    pub(super) fn with_loading(mut self, candidates: &[Candidate], weights: &Weights<'_>) -> Self {
        for (k, (seconds, candidate)) in self.seconds.iter_mut().zip(candidates).enumerate() {
            if let Some(seconds) = seconds {
                let slots = f64::from(candidate.slots.unwrap_or(1).max(1));
                *seconds += candidate.setup.time.0;
                self.joules += candidate.setup.energy.0;
                self.objective += weights.zeta * over(candidate.setup.energy.0, weights.normalisers.energy.0)
                    + weights.charged(k, slots * candidate.setup.time.0);
            }
        }
        self
    }

    /// Seconds until all is done.
    fn done(&self) -> f64 {
        self.seconds.iter().flatten().fold(0.0, |latest: f64, seconds| latest.max(*seconds))
    }

    /// Whether it keeps these limits of the job.
    fn keeps(&self, limits: &PlanLimits) -> bool {
        limits.energy_joules.is_none_or(|most| self.joules <= most)
            && limits.deadline_seconds.is_none_or(|most| self.done() <= most)
    }

    /// Whether another assignment of the same requests is better by this fraction of the magnitude; one that does not keep the limits has to give way to any that does.
    ///
    /// # Errors
    /// [`PlanError::NoGain`] with the figures.
    pub(super) fn gives_way_to(&self, other: &Self, limits: &PlanLimits, least_gain: f64) -> Result<(), PlanError> {
        if !self.keeps(limits) || self.objective - other.objective >= least_gain * self.magnitude {
            return Ok(());
        }
        let [stay, stay_seconds, go, go_seconds] =
            [self.joules, self.done(), other.joules, other.done()].map(|value| format!("{value:.4}"));
        Err(PlanError::NoGain(format!(
            "what is left takes {stay} J and {stay_seconds} s as it is placed; placed anew it would take {go} J and {go_seconds} s, loading included, and another plan has to be better by {} %",
            least_gain * 100.0
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_planner::cost::{Cost, Terms};
    use joulecast_planner::plan::Setup;
    use joulecast_planner::units::{Joules, Seconds};

    fn candidate(joules: f64, seconds: f64, slots: u32) -> Candidate {
        let flat = |constant| Cost { terms: Terms { constant, ..Terms::default() }, knots: vec![], floor_terms: None };
        Candidate {
            name: String::new(),
            energy: flat(joules),
            runtime: flat(seconds),
            accuracy: 0.5,
            share: None,
            budget: None,
            setup: Default::default(),
            slots: Some(slots),
        }
    }

    #[test]
    fn an_assignment_is_summed_up_and_gives_way_to_one_that_is_better_by_enough() {
        let candidates = [candidate(10.0, 4.0, 2), candidate(4.0, 1.0, 1)];
        let requests = [Tokens { input: 3, output: 1 }; 4];
        let normalisers = Normalisers { energy: Joules(5.0), accuracy: 2.0 };
        let free = |zeta| Weights { zeta, normalisers, charges: &[0.0, 0.0] };
        let of = |placed: [usize; 4], zeta| Sums::of(&candidates, &requests, |at| placed[at], &free(zeta));
        let present = of([0, 0, 0, 1], 1.0);
        let mut loading = candidates.clone();
        loading[0].setup = Setup { energy: Joules(10.0), time: Seconds(3.0) };
        let loaded = present.clone().with_loading(&loading, &free(1.0));
        assert_eq!((loaded.objective, loaded.joules, loaded.done()), (8.8, 44.0, 9.0));
        assert_eq!((present.objective, present.joules, present.done()), (6.8, 34.0, 6.0));
        assert_eq!(of([0, 0, 0, 1], 0.0).objective, -4.0);
        // Twelve device-seconds on the first and one on the second; loading takes three on each of the first's two slots.
        let charged = Weights { charges: &[1.0, 0.5], ..free(1.0) };
        let dear = Sums::of(&candidates, &requests, |at| [0, 0, 0, 1][at], &charged);
        assert!((dear.objective - (6.8 + 12.5 / 5.0)).abs() < 1e-12, "{dear:?}");
        assert_eq!((dear.joules, dear.done()), (34.0, 6.0), "nobody spends what is charged");
        let both = dear.with_loading(&loading, &charged).objective;
        assert!((both - (6.8 + 12.5 / 5.0 + 2.0 + 6.0 / 5.0)).abs() < 1e-12, "{both}");
        let better = |objective| Sums { objective, ..present.clone() };
        let none = PlanLimits::default();
        assert!(present.gives_way_to(&better(6.8 - 0.35), &none, 0.05).is_ok());
        let kept = present.gives_way_to(&better(6.8 - 0.33), &none, 0.05).unwrap_err().to_string();
        assert!(kept.contains("34.0000 J and 6.0000 s") && kept.contains("5 %"), "{kept}");
        // One that does not keep the limits gives way to any.
        for (energy_joules, deadline_seconds, gives_way) in
            [(Some(33.0), None, true), (None, Some(5.0), true), (Some(34.0), Some(6.0), false)]
        {
            let limits = PlanLimits { energy_joules, deadline_seconds, min_accuracy: None };
            assert_eq!(present.gives_way_to(&better(9.0), &limits, 0.05).is_ok(), gives_way, "{limits:?}");
        }
    }
}
