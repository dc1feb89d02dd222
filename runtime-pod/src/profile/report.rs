//! The report of a campaign, small enough for a termination message.

use super::{Book, Campaign, ProfileFailure};
use crate::report::{engine_name, provider};
use joulecast_crds::Decimal;
use joulecast_crds::energy_model::FittedModel;
use joulecast_crds::names::TERMINATION_MESSAGE_BYTES;
use joulecast_crds::profile_report::{ProfileReport, VERSION};
use joulecast_crds::profile_run::ProfileResult;
use joulecast_crds::report::{EnergySource, Failure};
use joulecast_meter::Source;

/// Builds the report of a campaign as far as it came.
#[must_use]
pub fn build(
    campaign: &Campaign,
    book: &Book,
    result: Result<FittedModel, ProfileFailure>,
) -> (ProfileReport, Option<ProfileFailure>) {
    let (mut fit, failure) = match result {
        Ok(fit) => (Some(fit), None),
        Err(failure) => (None, Some(failure)),
    };
    if let Some(fit) = fit.as_mut().filter(|_| book.left_out > 0) {
        let note =
            format!("{} points of the grid do not fit into the model's context and were left out", book.left_out);
        fit.notes.truncate(7);
        fit.notes.push(note);
    }
    let (source, meter) = book.meter.clone().unwrap_or((Source::Unavailable, "none".to_owned()));
    let info = book.engine.as_ref();
    let report = ProfileReport {
        version: VERSION,
        run_uid: campaign.run_uid.clone(),
        engine: engine_name(campaign.load.engine),
        provider: provider(campaign.load.provider),
        engine_version: info.map(|info| info.engine_version.clone()),
        dtype: info.map(|info| info.dtype.to_string()),
        artifact_digest: book.artifact_digest.clone(),
        batch: match campaign.batch_sizes[..] {
            [one] => Some(one),
            _ => None,
        },
        source: match source {
            Source::Measured => EnergySource::Measured,
            Source::Modelled => EnergySource::Modelled,
            Source::Unavailable => EnergySource::Unavailable,
        },
        meter,
        idle_milliwatts: book.idle.map(|idle| idle.0),
        result: ProfileResult {
            samples: signed(book.settling.samples()),
            points: signed(book.points as u64),
            points_settled: signed(book.settling.settled(&campaign.bound)),
            ended_by: book.ended_by.map_or_else(|| "Unfinished".to_owned(), |by| by.as_str().to_owned()),
            seconds: Decimal::rounded(book.spent.time.as_secs_f64(), 6).unwrap_or_default(),
            joules: (source != Source::Unavailable).then(|| Decimal::rounded(book.spent.joules, 6)).flatten(),
        },
        fit,
        failure: failure.as_ref().map(|failure| Failure {
            reason: failure.reason().to_owned(),
            message: failure.to_string().chars().take(1000).collect(),
        }),
    };
    (report, failure)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The report as JSON of at most [`TERMINATION_MESSAGE_BYTES`] bytes. What does not fit is left out in this order: the
/// meter's details, notes, standard errors; the coefficients never.
#[must_use]
pub fn message(report: &ProfileReport) -> String {
    let mut report = report.clone();
    let cuts: [&dyn Fn(&mut ProfileReport); 4] = [
        &|_| {},
        &|report| {
            report.meter = report.meter.chars().take(80).collect();
            report.failure.iter_mut().for_each(|failure| failure.message.truncate(0));
        },
        &|report| report.fit.iter_mut().for_each(|fit| fit.notes.clear()),
        &|report| {
            if let Some(fit) = &mut report.fit {
                fit.notes.push("standard errors left out: the report was too long".to_owned());
                [&mut fit.energy, &mut fit.runtime]
                    .into_iter()
                    .flatten()
                    .for_each(|quantity| quantity.standard_errors.clear());
            }
        },
    ];
    let mut json = String::new();
    for act in cuts {
        act(&mut report);
        json = serde_json::to_string(&report).unwrap_or_default();
        if json.len() <= TERMINATION_MESSAGE_BYTES {
            return json;
        }
    }
    // Even the coefficients alone are too long, which no fit of ours has: say so instead of half a document.
    report.fit = None;
    report.failure = Some(Failure {
        reason: "ModelTooLarge".to_owned(),
        message: "the fitted model does not fit into a termination message: fit the samples with `joulecast fit`"
            .to_owned(),
    });
    let short = serde_json::to_string(&report).unwrap_or_default();
    if short.len() <= TERMINATION_MESSAGE_BYTES { short } else { json.chars().take(1).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_crds::energy_model::{FittedQuantity, TokenDomain, TokenRange};
    use std::collections::BTreeMap;

    fn report(terms: usize) -> ProfileReport {
        let named = |digits: &str| -> BTreeMap<String, Decimal> {
            (0..terms).map(|n| (format!("context_batch_over_{n}"), Decimal(digits.into()))).collect()
        };
        let quantity = FittedQuantity {
            terms: named("1.234567891e-10"),
            floor_terms: None,
            standard_errors: named("1.23e-10"),
            family: "steps".into(),
            n: 1000,
            r2: None,
            cv_r2: None,
            cv_median_ape: None,
            interval: None,
        };
        let range = TokenRange { min: 1, max: 2 };
        ProfileReport {
            version: VERSION,
            run_uid: Some("11111111-2222-3333-4444-555555555555".into()),
            engine: joulecast_crds::EngineName::Torchscript,
            provider: joulecast_crds::Provider::Openvino,
            engine_version: Some("0.11.1".into()),
            dtype: Some("bf16".into()),
            artifact_digest: Some(format!("files-sha256:{}", "f".repeat(64))),
            batch: None,
            source: EnergySource::Modelled,
            meter: "m".repeat(256),
            idle_milliwatts: Some(u64::MAX),
            result: ProfileResult { ended_by: "Repetitions".into(), ..ProfileResult::default() },
            fit: Some(FittedModel {
                energy: Some(quantity.clone()),
                runtime: Some(quantity),
                domain: TokenDomain { tokens_in: range, tokens_out: range, batch: range },
                samples: 1000,
                flagged: 0,
                notes: vec!["n".repeat(200); 8],
            }),
            failure: None,
        }
    }

    #[test]
    fn a_message_fits_and_keeps_its_coefficients() {
        for terms in [1, 10, 24] {
            let json = message(&report(terms));
            assert!(json.len() <= TERMINATION_MESSAGE_BYTES, "{}", json.len());
            let back: ProfileReport = serde_json::from_str(&json).unwrap();
            assert_eq!(back.fit.unwrap().energy.unwrap().terms, report(terms).fit.unwrap().energy.unwrap().terms);
        }
        let back: ProfileReport = serde_json::from_str(&message(&report(200))).unwrap();
        assert_eq!(back.failure.unwrap().reason, "ModelTooLarge");
    }
}
