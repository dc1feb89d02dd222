//! What earlier attempts spent and nobody reported: from their journals into the report.

use super::journal::{self, Said};
use crate::batch_file::OutputError;
use crate::batch_file::parts::{Attempt, Parts, Role};
use joulecast_crds::report::{EarlierAttempt, EarlierTotals, EnergySource, JournalTotals};
use std::collections::HashSet;

/// Earlier attempts that are not known to have reported, newest first.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Earlier {
    /// Each with what its journal says.
    pub attempts: Vec<(Attempt, JournalTotals)>,
}

/// Looks for earlier attempts without a report: those of the own block, or of the whole job for whoever merges.
///
/// # Errors
/// As the system gives them.
pub fn find(parts: &Parts, own: &Attempt, whole_job: bool) -> Result<Earlier, OutputError> {
    let mut told = HashSet::new();
    let mut unreported = Vec::new();
    for attempt in parts.attempts()?.into_iter().filter(|attempt| attempt != own) {
        let Said { reported, .. } = &said(parts, &attempt)?;
        match reported {
            Some(earlier) => told.extend(earlier.iter().cloned()),
            None => unreported.push(attempt),
        }
    }
    let mine =
        |attempt: &Attempt| whole_job || (attempt.who.epoch == own.who.epoch && attempt.who.role == own.who.role);
    let mut attempts = Vec::new();
    for attempt in unreported.into_iter().rev() {
        if attempt < *own && mine(&attempt) && !told.contains(&attempt.to_string()) {
            let totals = said(parts, &attempt)?.totals_or_nothing();
            attempts.push((attempt, totals));
        }
    }
    Ok(Earlier { attempts })
}

fn said(parts: &Parts, attempt: &Attempt) -> Result<Said, OutputError> {
    Ok(journal::read(&parts.journal(attempt))?)
}

impl Earlier {
    /// Names of the attempts, as their files have them.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.attempts.iter().map(|(attempt, _)| attempt.to_string()).collect()
    }

    /// As the report holds them, one by one.
    #[must_use]
    pub fn report(&self) -> Vec<EarlierAttempt> {
        let one = |(attempt, totals): &(Attempt, JournalTotals)| {
            let (configuration, shard) = match attempt.who.role {
                Role::Run { configuration, shard } => (configuration, shard),
                Role::Merge => (0, 0),
            };
            let (epoch, attempt) = (attempt.who.epoch, attempt.who.name.clone());
            EarlierAttempt { epoch, configuration, shard, attempt, totals: totals.clone() }
        };
        self.attempts.iter().map(one).collect()
    }
}

/// Leaves so many attempts as they are and adds the others, which are older, to the sum.
pub fn fold(attempts: &mut Vec<EarlierAttempt>, sum: &mut Option<EarlierTotals>, keep: usize) {
    for older in attempts.drain(keep.min(attempts.len())..) {
        *sum = Some(add(sum.take(), older.totals));
    }
}

/// Adds. A part that one metered attempt lacks is absent from the sum, which would else read as the whole.
fn add(sum: Option<EarlierTotals>, new: JournalTotals) -> EarlierTotals {
    let dark = new.gross_millijoules.is_none();
    let Some(EarlierTotals { attempts, without_energy, totals }) = sum else {
        return EarlierTotals { attempts: 1, without_energy: u32::from(dark), totals: new };
    };
    let metered = attempts > without_energy;
    let part = |sum: Option<u64>, new: Option<u64>| match (metered, dark) {
        (_, true) => sum,
        (false, false) => new,
        (true, false) => Some(sum?.saturating_add(new?)),
    };
    let source = match (metered, dark) {
        (_, true) => totals.source,
        (true, false) if totals.source == EnergySource::Modelled => EnergySource::Modelled,
        (_, false) => new.source,
    };
    EarlierTotals {
        attempts: attempts.saturating_add(1),
        without_energy: without_energy.saturating_add(u32::from(dark)),
        totals: JournalTotals {
            source,
            partial: totals.partial || new.partial,
            window_milliseconds: totals.window_milliseconds.saturating_add(new.window_milliseconds),
            gross_millijoules: part(totals.gross_millijoules, new.gross_millijoules),
            idle_millijoules: part(totals.idle_millijoules, new.idle_millijoules),
            net_millijoules: part(totals.net_millijoules, new.net_millijoules),
            lines_done: totals.lines_done.saturating_add(new.lines_done),
            tokens_in: totals.tokens_in.saturating_add(new.tokens_in),
            tokens_out: totals.tokens_out.saturating_add(new.tokens_out),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch_file::parts::Who;
    use crate::run::journal::{Entry, Journal};

    fn totals(gross: Option<u64>, idle: Option<u64>) -> JournalTotals {
        JournalTotals {
            source: if gross.is_some() { EnergySource::Measured } else { EnergySource::Unavailable },
            partial: true,
            window_milliseconds: 1000,
            gross_millijoules: gross,
            idle_millijoules: idle,
            net_millijoules: None,
            lines_done: 2,
            tokens_in: 3,
            tokens_out: 4,
        }
    }

    #[test]
    fn each_attempt_without_a_report_is_told_by_one_that_reports() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::of(&dir.path().join("out"), "u").unwrap();
        let begin = |epoch, shard, gross: Option<u64>| {
            let who = Who { epoch, role: Role::Run { configuration: 0, shard }, name: format!("p{shard}") };
            let (attempt, file) = parts.begin(who).unwrap();
            let journal = Journal::new(parts.journal(&attempt), file);
            if gross.is_some() {
                journal.write(&Entry::Running(totals(gross, gross.map(|gross| gross / 2)))).unwrap();
            }
            (attempt, journal)
        };
        let (killed, _) = begin(1, 0, Some(100));
        let (other_block, _) = begin(1, 1, Some(1000));
        let (dark, _) = begin(1, 0, None);
        let (third, journal) = begin(1, 0, Some(7));
        let earlier = find(&parts, &third, false).unwrap();
        assert_eq!(earlier.names(), [dark.to_string(), killed.to_string()]);
        assert_eq!(earlier.attempts[0].1.gross_millijoules, None);

        let mut single = earlier.report();
        assert_eq!((single.len(), single[1].attempt.as_str(), single[1].epoch), (2, "p0", 1));
        let mut sum = None;
        fold(&mut single, &mut sum, 9);
        assert_eq!((single.len(), &sum), (2, &None));
        fold(&mut single, &mut sum, 1);
        let one = sum.clone().unwrap();
        assert_eq!((one.attempts, one.without_energy, one.totals.gross_millijoules), (1, 0, Some(100)));
        fold(&mut single, &mut sum, 0);
        let all = sum.unwrap();
        assert_eq!((all.attempts, all.without_energy, all.totals.idle_millijoules), (2, 1, Some(50)));
        assert_eq!((all.totals.lines_done, all.totals.source), (2, EnergySource::Measured));

        // Once it has reported, neither it nor those that it told of are told again; whoever merges tells the rest.
        journal.write(&Entry::Reported { earlier: earlier.names() }).unwrap();
        let (fourth, _) = begin(1, 0, None);
        assert_eq!(find(&parts, &fourth, false).unwrap(), Earlier::default());
        let (merge, _) = parts.begin(Who { epoch: 1, role: Role::Merge, name: "m".to_owned() }).unwrap();
        assert_eq!(find(&parts, &merge, true).unwrap().names(), [fourth.to_string(), other_block.to_string()]);
    }

    #[test]
    fn a_sum_is_whole_or_absent() {
        let sum = |parts: &[JournalTotals]| parts.iter().fold(None, |sum, new| Some(add(sum, new.clone()))).unwrap();
        let modelled = JournalTotals { source: EnergySource::Modelled, ..totals(Some(5), None) };
        let measured = totals(Some(100), Some(50));
        let mixed = sum(&[measured.clone(), modelled.clone()]);
        assert_eq!((mixed.totals.gross_millijoules, mixed.totals.idle_millijoules), (Some(105), None));
        assert_eq!(mixed.totals.source, EnergySource::Modelled);
        assert_eq!(sum(&[modelled, measured.clone()]).totals.source, EnergySource::Modelled);
        let late = sum(&[totals(None, None), measured.clone(), totals(None, None), measured]);
        assert_eq!((late.attempts, late.without_energy, late.totals.idle_millijoules), (4, 2, Some(100)));
    }
}
