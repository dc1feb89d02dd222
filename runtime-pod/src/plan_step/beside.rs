//! What other jobs charge for the device time of the candidates and leave of it, as the planner takes it; and what the plan
//! makes of the classes of nodes in turn.

use joulecast_crds::DeviceClass;
use joulecast_crds::plan_step::{PlanCandidate, PlanClass, PlannedClass, six_digits};
use joulecast_planner::plan::{Plan, Pool, Sharing};
use joulecast_planner::units::Seconds;

/// Part of the plan's joules that the device-seconds of a candidate have to be worth for their price to be told.
const LEAST: f64 = 1e-6;

/// What is charged and left, by candidate as the planner counts them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Beside {
    /// Joules for a device-second.
    pub(super) charges: Vec<f64>,
    pools: Vec<Pool>,
}

impl Beside {
    /// For candidates, each with the device-seconds that all requests would take there.
    pub(super) fn of(classes: &[PlanClass], candidates: &[(&PlanCandidate, f64)]) -> Self {
        let class_of = |one: &PlanCandidate| one.configuration.device_class;
        let charge = |(one, seconds): &(&PlanCandidate, f64)| {
            let class = classes.iter().find(|class| class.device_class == class_of(one));
            class.map_or(0.0, |class| class.charge(one.slots, *seconds))
        };
        let mut pools = vec![];
        for class in classes {
            let own = (0..candidates.len()).filter(|k| class_of(candidates[*k].0) == class.device_class);
            let members: Vec<usize> = own.collect();
            let mut pool = |members: Vec<usize>, seconds: Option<f64>, whose: &str| {
                let name = class.device_class;
                pools.extend(seconds.filter(|_| !members.is_empty()).map(|seconds| Pool {
                    members,
                    seconds: Seconds(seconds),
                    title: format!(
                        "what other jobs leave of the nodes of class {name} until the deadline ({} device-seconds for {whose})",
                        six_digits(seconds)
                    ),
                }));
            };
            for k in &members {
                pool(vec![*k], class.configuration_seconds, "one configuration");
            }
            pool(members, class.class_seconds, "all configurations");
        }
        Self { charges: candidates.iter().map(charge).collect(), pools }
    }

    /// As the planner takes it.
    pub(super) fn sharing(&self) -> Sharing<'_> {
        Sharing { charges: &self.charges, pools: &self.pools }
    }

    /// The same with nothing charged.
    pub(super) fn uncharged(&self) -> Sharing<'_> {
        Sharing { charges: &[], pools: &self.pools }
    }

    /// Whether anything is charged.
    pub(super) fn is_charged(&self) -> bool {
        self.charges.iter().any(|charge| *charge > 0.0)
    }
}

/// What further device-seconds of the classes would be worth; a class of which nothing is to be said is left out.
///
/// At the margin a request goes there as long as its cost elsewhere exceeds that here by (price + charge) times its seconds: so
/// much, and not the price alone, is what one second more saves.
pub(super) fn classes(charges: &[f64], candidates: &[(&PlanCandidate, f64)], plan: &Plan) -> Vec<PlannedClass> {
    let of_class = |class: DeviceClass| {
        let own = (0..candidates.len()).filter(|k| candidates[*k].0.configuration.device_class == class);
        let worth = own.clone().map(|k| (plan.placements[k].second_price * plan.normalisers.energy.0, charges[k]));
        // What converges leaves a hair of a price on limits that do not bind.
        let seconds = |k: usize| plan.placements[k].seconds_used.0;
        let worth = own.clone().zip(worth).filter(|(k, (price, _))| price * seconds(*k) > LEAST * plan.energy.0);
        let price = worth.map(|(_, worth)| worth).map(|(price, charge)| price + charge).fold(0.0, f64::max);
        let is_charged = own.into_iter().any(|k| charges[k] > 0.0);
        let told = PlannedClass { device_class: class, joules_per_second: six_digits(price), uncharged_requests: None };
        (price > 0.0 || is_charged).then_some(told)
    };
    DeviceClass::ALL.iter().filter_map(|class| of_class(*class)).collect()
}

/// Adds how many requests would go to the classes without charges; `requests` are those by candidate.
pub(super) fn tell(classes: &mut Vec<PlannedClass>, candidates: &[(&PlanCandidate, f64)], requests: &[u64]) {
    for class in DeviceClass::ALL {
        let own = candidates.iter().zip(requests).filter(|((one, _), _)| one.configuration.device_class == *class);
        let requests: Vec<u64> = own.map(|(_, requests)| *requests).collect();
        if requests.is_empty() {
            continue;
        }
        let uncharged_requests = Some(requests.iter().sum());
        match classes.iter_mut().find(|told| told.device_class == *class) {
            Some(told) => told.uncharged_requests = uncharged_requests,
            None => classes.push(PlannedClass { device_class: *class, joules_per_second: 0.0, uncharged_requests }),
        }
    }
}
