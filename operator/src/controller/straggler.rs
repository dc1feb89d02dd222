//! When all blocks but one are done, and that one has long to go, what is left of it is divided among all pods. Pure.
//!
//! That is a plan of a new epoch: it fences the slow pod, whose results so far are kept, as those of every attempt are. Which
//! lines are whose is decided by the number of lines that were done when the rest was divided, which stands in the plan; so
//! all pods divide alike, whatever else has been written meanwhile.

use crate::controller::attempts::{self, Review, UnitState, Verdict};
use crate::controller::facts::Place;
use crate::controller::observe::Snapshot;
use crate::controller::validate::ValidJob;
use joulecast_crds::inference_job::{Plan, PlannedRest, Progress};
use joulecast_crds::report::RunProgress;

/// The plan that divides what is left, if that is worth its while: with more than so many seconds of work left. What was
/// divided so is not divided again.
#[must_use]
pub fn divide(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, review: &Review, seconds: u32) -> Option<Plan> {
    if job.parallelism < 2 || job.suspend || plan.rest.is_some() || review.verdict != Verdict::Open {
        return None;
    }
    let (done, others): (Vec<_>, Vec<_>) = review.units.iter().partition(|unit| unit.state == UnitState::Done);
    let [slow] = others[..] else { return None };
    // One block, and not the merge, which comes after all of them.
    if !matches!(slow.state, UnitState::Working(_)) || done.len() + 1 != plan.chosen.len() * job.parallelism as usize {
        return None;
    }
    let pod = snapshot.at_work().find(|pod| pod.place == slow.place)?;
    let progress = snapshot.progress.get(&pod.uid)?;
    let left = progress.lines_total?.checked_sub(progress.lines_done)?;
    // Its lines are the work of all attempts at them, those that were lost included.
    let Place { epoch, configuration, shard, attempt: _ } = slow.place;
    let lost = attempts::records(snapshot.status(), epoch, configuration, shard)
        .filter_map(|record| Some(record.end_time.as_ref()?.0.duration_since(record.start_time.as_ref()?.0)));
    let worked: f64 = lost.chain([snapshot.now.duration_since(pod.created?)]).map(|time| time.as_secs_f64()).sum();
    let needed = worked * left as f64 / progress.lines_done as f64;
    // Before the first line is done nothing is known of its pace.
    let worth = progress.lines_done > 0 && left >= u64::from(job.parallelism) && needed > f64::from(seconds);
    let signed = |number: u32| i32::try_from(number).ok();
    let rest = PlannedRest {
        epoch: plan.epoch,
        configuration: signed(slow.place.configuration)?,
        shard: signed(slow.place.shard)?,
        from_line: i64::try_from(progress.lines_done).ok()?,
    };
    worth.then(|| Plan { epoch: plan.epoch.saturating_add(1), rest: Some(rest), ..plan.clone() })
}

/// The progress of the whole job from that of the pods that share the rest: everything else is done.
#[must_use]
pub fn whole(pods: &RunProgress, before: &Progress, rest: &PlannedRest) -> Option<RunProgress> {
    let PlannedRest { epoch: _, configuration: _, shard: _, from_line: _ } = rest;
    let total = u64::try_from(before.lines_total?).ok()?;
    let left = pods.lines_total?.checked_sub(pods.lines_done)?;
    let known = |number: i64| u64::try_from(number).unwrap_or(0);
    Some(RunProgress {
        lines_total: Some(total),
        lines_done: total.saturating_sub(left),
        lines_failed: known(before.lines_failed).max(pods.lines_failed),
        tokens_out: known(before.tokens_out).max(pods.tokens_out),
        ..RunProgress::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::attempts::superseded;
    use crate::controller::decide::{ChildAction, Planning, decide};
    use crate::controller::samples::{self, SnapshotBuilder};
    use crate::controller::validate::validate;
    use joulecast_crds::inference_job::{Attempt, Outcome};
    use serde_json::json;

    fn record(shard: i32, ended: bool) -> Attempt {
        let record = json!({"epoch": 1, "configuration": 0, "shard": shard, "attempt": 1});
        let mut record: Attempt = serde_json::from_value(record).unwrap();
        if ended {
            record.outcome = Some(Outcome::Succeeded);
            record.end_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(samples::now()));
        }
        record
    }

    /// Three pods, of which the second works, so many lines done of 100 in so many seconds.
    fn slow(lines_done: u64, seconds: i64) -> Snapshot {
        let mut pod = samples::running_pod("hello-1-0s1-1-x");
        pod.metadata.labels.as_mut().unwrap().insert("joulecast.dev/shard".into(), "1".into());
        let created = samples::now().as_second() - seconds;
        let created = k8s_openapi::jiff::Timestamp::from_second(created).unwrap();
        pod.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(created));
        let uid = pod.metadata.uid.clone().unwrap();
        let mut snapshot = SnapshotBuilder::new()
            .spec(|spec| spec.parallelism = 3)
            .started()
            .status(|status| status.attempts = vec![record(0, true), record(1, false), record(2, true)])
            .child(|child| {
                child.place.shard = 1;
                child.name = "hello-1-0s1-1".into();
            })
            .pod(&pod)
            .build();
        let progress = RunProgress { lines_total: Some(100), lines_done, ..RunProgress::default() };
        snapshot.progress.insert(uid, progress);
        snapshot
    }

    fn planned(snapshot: &Snapshot) -> Plan {
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        match decide(snapshot, Ok(&job), &samples::config()).planning {
            Planning::Found(plan) => plan,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_rest_of_the_last_block_is_divided_if_it_takes_long() {
        let plan = planned(&slow(40, 100));
        let rest = PlannedRest { epoch: 1, configuration: 0, shard: 1, from_line: 40 };
        assert_eq!((plan.epoch, plan.rest), (2, Some(rest)), "150 s are left");
        for (lines, seconds, why) in
            [(60, 100, "67 s are left"), (0, 1000, "its pace is not known"), (98, 100_000, "fewer lines than pods")]
        {
            assert_eq!(planned(&slow(lines, seconds)).rest, None, "{why}");
        }
    }

    #[test]
    fn the_pace_of_a_block_is_that_of_all_attempts_at_it() {
        let mut snapshot = slow(90, 2);
        assert_eq!(planned(&snapshot).rest, None, "90 lines in 2 s");
        let status = std::sync::Arc::make_mut(&mut snapshot.job).status.as_mut().unwrap();
        let mut lost = record(1, true);
        let ended = lost.end_time.clone().unwrap();
        lost.outcome = Some(Outcome::InfrastructureFailed);
        lost.start_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            ended.0.checked_sub(k8s_openapi::jiff::SignedDuration::from_secs(1800)).unwrap(),
        ));
        status.attempts[1].attempt = 2;
        status.attempts.insert(1, lost);
        snapshot.children[0].place.attempt = 2;
        snapshot.pods[0].place.attempt = 2;
        assert_eq!(planned(&snapshot).rest.map(|rest| rest.from_line), Some(90), "200 s are left");
    }

    #[test]
    fn a_new_plan_stops_the_slow_pod_and_starts_all_on_its_lines() {
        let mut snapshot = slow(40, 100);
        let plan = planned(&snapshot);
        std::sync::Arc::make_mut(&mut snapshot.job).status.as_mut().unwrap().plan = Some(plan);
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        let decision = decide(&snapshot, Ok(&job), &samples::config());
        let names: Vec<_> = decision
            .children
            .iter()
            .map(|action| match action {
                ChildAction::Launch(launch) => (launch.name.as_str(), true),
                ChildAction::Suspend { name, suspend } => (name.as_str(), !suspend),
                ChildAction::Blocked { message, .. } => panic!("{message}"),
            })
            .collect();
        let started = [("hello-2-0-1", true), ("hello-2-0s1-1", true), ("hello-2-0s2-1", true)];
        assert_eq!(names, [&started[..], &[("hello-1-0s1-1", false)]].concat());
        assert_eq!(superseded(&snapshot, decision.review.as_ref()).len(), 1);
        assert_eq!(decision.review.as_ref().unwrap().ended, [], "the slow pod is still at work");
        snapshot.pods.clear();
        let ended = decide(&snapshot, Ok(&job), &samples::config()).review.unwrap().ended;
        assert_eq!((ended.len(), ended[0].0.shard, ended[0].1.outcome), (1, 1, Outcome::Stopped));
    }

    #[test]
    fn progress_is_that_of_the_whole_job() {
        let pods = RunProgress {
            lines_total: Some(60),
            lines_done: 45,
            lines_failed: 1,
            tokens_out: 7,
            ..RunProgress::default()
        };
        let before: Progress = serde_json::from_value(
            json!({"summary": "", "linesTotal": 300, "linesDone": 240, "linesFailed": 3, "tokensOut": 900}),
        )
        .unwrap();
        let rest = PlannedRest { epoch: 1, configuration: 0, shard: 1, from_line: 40 };
        let told = whole(&pods, &before, &rest).unwrap();
        assert_eq!((told.lines_total, told.lines_done, told.lines_failed), (Some(300), 285, 3));
    }
}
