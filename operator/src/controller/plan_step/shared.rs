//! What a plan's status says of the classes of nodes that it shares with other jobs, from what was asked and what the plan pod
//! answered. Pure.

use super::answer::{joules, number, thousandths};
use joulecast_crds::DeviceClass;
use joulecast_crds::plan_step::{PlanClass, PlanFigures, PlanPrice, PlanSpec, PlannedClass};
use joulecast_crds::planned::SharedClass;

/// Longest message, in characters.
const MESSAGE_CHARS: usize = 512;

/// The classes of which there is anything to say.
pub(super) fn classes(spec: &PlanSpec, figures: &PlanFigures) -> Vec<SharedClass> {
    DeviceClass::ALL.iter().filter_map(|class| shared(*class, spec, figures)).collect()
}

fn shared(class: DeviceClass, spec: &PlanSpec, figures: &PlanFigures) -> Option<SharedClass> {
    let told = spec.classes.iter().find(|told| told.device_class == class);
    let made = figures.classes.iter().find(|made| made.device_class == class);
    let charged = told.and_then(|told| Some((told, told.prices.first()?)));
    let worth = made.map(|made| made.joules_per_second).filter(|worth| *worth > 0.0);
    let taken = told.filter(|told| told.taken > 0).map(|told| {
        let slots = told.slots.map(|slots| format!(" on {}", count(slots, "slot", "slots"))).unwrap_or_default();
        format!("other jobs have {} there{slots}", count(told.taken, "pod", "pods"))
    });
    let charge = charged.map(|(told, price)| charge(told, price) + &changed(class, made, spec, figures));
    let asks = worth.map(|worth| {
        format!("a further device-second would save {} J: jobs that come later are charged so", joules(worth))
    });
    let sentences: Vec<String> = [taken, charge, asks].into_iter().flatten().collect();
    (!sentences.is_empty()).then(|| SharedClass {
        device_class: class,
        slots: told.and_then(|told| told.slots).map(signed),
        taken: told.map_or(0, |told| signed(told.taken)),
        free_in_milliseconds: told.map_or(0, |told| thousandths(told.free_in_seconds)),
        charged_joules_per_second: charged.map(|(_, price)| number(price.joules_per_second)),
        charged_milliseconds: charged.map(|(_, price)| thousandths(price.seconds)),
        charged_by: charged.map_or(0, |(told, _)| signed(told.asking)),
        price_joules_per_second: worth.map(number),
        message: format!("{class}: {}", sentences.join("; ")).chars().take(MESSAGE_CHARS).collect(),
    })
}

fn charge(class: &PlanClass, price: &PlanPrice) -> String {
    let others = count(class.asking, "other plan with a deadline needs it", "other plans with a deadline need it");
    let (charged, seconds) = (joules(price.joules_per_second), joules(price.seconds));
    format!("+{charged} J per device-second charged for {seconds} s: {others}")
}

/// What the charges changed of a class.
fn changed(class: DeviceClass, made: Option<&PlannedClass>, spec: &PlanSpec, figures: &PlanFigures) -> String {
    let given = spec.candidates.iter().zip(&figures.candidates);
    let own = given.filter(|(one, _)| one.configuration.device_class == class);
    let here: u64 = own.map(|(_, given)| given.requests).sum();
    let free = made.and_then(|made| made.uncharged_requests);
    match free.zip(figures.uncharged_joules) {
        None => String::new(),
        Some((free, before)) if free > here => {
            let more = joules(figures.joules[1] - before);
            let moved = free - here;
            let moved = count(u32::try_from(moved).unwrap_or(u32::MAX), "request goes", "requests go");
            format!(", so {moved} elsewhere, for {more} J more in all")
        }
        // Another class is charged more.
        Some((free, _)) if free < here => {
            let come = count(u32::try_from(here - free).unwrap_or(u32::MAX), "request comes", "requests come");
            format!(", and {come} here from where it is dearer")
        }
        Some(_) => ", which moves no request elsewhere".to_owned(),
    }
}

fn count(number: u32, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

fn signed(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_crds::plan_step::{PlanNormalisers, PlannedCandidate};
    use serde_json::json;

    /// A job of ten requests with a candidate of each class.
    fn spec(classes: Vec<PlanClass>) -> PlanSpec {
        let candidate = |provider: &str| {
            json!({"name": provider, "model": 0, "energy": {}, "runtime": {}, "accuracy": 0.5, "slots": 1,
                "configuration": {"format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": provider,
                    "deviceClass": provider, "batch": 1}})
        };
        let mut spec: PlanSpec = serde_json::from_value(json!({
            "version": 1, "run": {"namespace": "n", "job": "j", "jobUid": "u", "epoch": 1, "configuration": 0},
            "inputPath": "/in", "models": [{"name": "m", "path": "/m", "output": {"low": 1.0, "mean": 1.0, "high": 1.0}}],
            "candidates": [candidate("cpu"), candidate("cuda")], "zeta": 1.0, "loadBytesPerSecond": 1.0, "timeLimitSeconds": 1.0
        }))
        .unwrap();
        spec.classes = classes;
        spec
    }

    fn figures(requests: [u64; 2], uncharged_joules: Option<f64>, classes: Vec<PlannedClass>) -> PlanFigures {
        let given = |n: u64| PlannedCandidate { requests: n, ..PlannedCandidate::default() };
        PlanFigures {
            requests: requests.iter().sum(),
            malformed: 0,
            finished: 0,
            finished_failed: 0,
            joules: [90.0, 131.0, 200.0],
            seconds: [1.0; 3],
            candidates: requests.map(given).into(),
            objective: 1.0,
            lower_bound: 1.0,
            gap: 0.0,
            normalisers: PlanNormalisers { energy: 1.0, accuracy: 1.0 },
            accuracy: None,
            charged_joules: 0.0,
            uncharged_joules,
            classes,
            assignment_sha256: None,
            unsuited: vec![],
            read_milliseconds: 0,
            solve_milliseconds: 0,
        }
    }

    fn class(prices: Vec<PlanPrice>) -> PlanClass {
        PlanClass {
            device_class: DeviceClass::Cuda,
            slots: Some(2),
            taken: 3,
            asking: 2,
            free_in_seconds: 41.5,
            prices,
            configuration_seconds: None,
            class_seconds: None,
        }
    }

    #[test]
    fn a_charge_is_told_with_who_asks_and_what_it_changed() {
        let price = PlanPrice { joules_per_second: 0.8, seconds: 120.0 };
        let made = |uncharged_requests| PlannedClass {
            device_class: DeviceClass::Cuda,
            joules_per_second: 0.0,
            uncharged_requests,
        };
        let of = |requests, free, before| {
            let all = classes(&spec(vec![class(vec![price])]), &figures(requests, before, vec![made(free)]));
            assert_eq!(all.len(), 1);
            all[0].clone()
        };
        let moved = of([6, 4], Some(10), Some(100.0));
        assert_eq!(
            moved.message,
            "cuda: other jobs have 3 pods there on 2 slots; +0.800 J per device-second charged for 120 s: 2 other plans with a \
             deadline need it, so 6 requests go elsewhere, for 31.0 J more in all"
        );
        assert_eq!((moved.charged_joules_per_second.as_deref(), moved.charged_by, moved.taken), (Some("0.8"), 2, 3));
        assert_eq!((moved.charged_milliseconds, moved.free_in_milliseconds), (Some(120_000), 41_500));
        assert!(of([0, 10], Some(10), Some(131.0)).message.ends_with("need it, which moves no request elsewhere"));
        assert!(of([0, 10], None, None).message.ends_with("need it"), "the other plan was not made in time");
    }

    #[test]
    fn what_nobody_asks_and_nothing_limits_is_not_told() {
        assert_eq!(classes(&spec(vec![]), &figures([10, 0], None, vec![])), []);
        let idle = classes(&spec(vec![class(vec![])]), &figures([10, 0], None, vec![]));
        assert_eq!(idle[0].message, "cuda: other jobs have 3 pods there on 2 slots");
        assert_eq!(
            (idle[0].charged_joules_per_second.as_ref(), idle[0].price_joules_per_second.as_ref()),
            (None, None)
        );
        let scarce = PlannedClass { device_class: DeviceClass::Cpu, joules_per_second: 1.25, uncharged_requests: None };
        let own = classes(&spec(vec![]), &figures([10, 0], None, vec![scarce]));
        assert_eq!(own[0].price_joules_per_second.as_deref(), Some("1.25"));
        assert!(
            own[0].message.contains("would save 1.25 J: jobs that come later are charged so"),
            "{}",
            own[0].message
        );
    }
}
