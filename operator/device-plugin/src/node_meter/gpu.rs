//! One GPU as a domain of energy: its counter, its power integrated beside it, and how busy it is.

use joulecast_meter::Milliwatts;
use joulecast_meter::counter::MAX_WATTS;
use joulecast_meter::integral::{Comparison, Integral};
use joulecast_meter::ledger::{Division, Domain, Share};
use joulecast_meter::nvml::{Board, Load, Missing};
use std::time::Duration;

/// The longest time by which the counter may lag: it is updated every 20 to 100 ms.
const LAG: Duration = Duration::from_millis(200);
/// What a board may draw for a moment above its highest limit, in percent: the limit is kept on average only.
const OVER_LIMIT_PERCENT: u64 = 125;
/// Power is asked for at most so often: it is no fresher.
const POWER_EVERY: Duration = Duration::from_millis(50);
/// Load is asked for so often.
const LOAD_EVERY: Duration = Duration::from_secs(1);

/// One GPU.
#[derive(Debug)]
pub struct Gpu {
    pub(super) board: Board,
    integral: Integral,
    asked_power: Option<Duration>,
    comparison: Comparison,
    load: Option<Load>,
    asked_load: Option<Duration>,
    /// Time since the reading of the load before, if the last step read it.
    fresh: Option<Duration>,
    /// Busy time as far as it was told, in nanoseconds.
    busy_nanos: u64,
    lost: Option<String>,
}

impl Gpu {
    pub(super) fn new(board: Board) -> Self {
        Self {
            board,
            integral: Integral::default(),
            asked_power: None,
            comparison: Comparison::default(),
            load: None,
            asked_load: None,
            fresh: None,
            busy_nanos: 0,
            lost: None,
        }
    }

    pub(super) fn domain(&self) -> Domain {
        let share = |instance: &joulecast_meter::nvml::Instance| Share {
            slot: instance.uuid.clone(),
            slices: u64::from(instance.slices),
        };
        let (division, slot) = match &self.board.instances {
            Some(instances) => (Division::Slices(instances.iter().map(share).collect()), String::new()),
            None => (Division::Whole, self.board.uuid.clone()),
        };
        let max = self.board.max.map_or(MAX_WATTS * 1000, |max| max.0 * OVER_LIMIT_PERCENT / 100);
        Domain { name: self.name(), division, in_gross: true, slot, max: Milliwatts(max), lag: LAG }
    }

    /// Name of its domain.
    #[must_use]
    pub fn name(&self) -> String {
        format!("gpu-{}", self.board.index)
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// How busy it was when it was last asked, within the last second or so.
    #[must_use]
    pub fn load(&self) -> Option<Load> {
        self.load
    }

    /// Time since the reading of the load before, if the last step read it anew.
    pub(super) fn fresh(&self) -> Option<Duration> {
        self.fresh
    }

    /// Utilisation from 0 to 1 when it was last asked; absent in MIG mode.
    #[must_use]
    pub fn busy_ratio(&self) -> Option<f64> {
        Some(f64::from(self.load?.busy_percent?) / 100.0)
    }

    /// Counter against integrated power.
    #[must_use]
    pub fn comparison(&self) -> &Comparison {
        &self.comparison
    }

    pub(super) fn integral(&self) -> &Integral {
        &self.integral
    }

    pub(super) fn resume(&mut self, integral: Integral) {
        self.integral = integral;
    }

    /// Why it is lost, if it is.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// The counter in microjoules; power and load are asked for on the way.
    pub(super) fn read(&mut self, now: Duration) -> Result<u64, String> {
        self.fresh = None;
        let energy = self.board.energy().map_err(|missing| match missing {
            Missing::Lost(why) => {
                self.lost = Some(why.clone());
                why
            }
            Missing::Failed(why) => why,
            Missing::NotSupported => "it tells no energy any more".to_owned(),
        })?;
        if due(self.asked_power, now, POWER_EVERY) {
            self.asked_power = Some(now);
            if let Ok(power) = self.board.power() {
                self.integral.observe(now, power);
            }
        }
        if due(self.asked_load, now, LOAD_EVERY) {
            let since = self.asked_load.replace(now).map_or(Duration::ZERO, |then| now.saturating_sub(then));
            self.load = self.board.load().ok();
            self.fresh = self.load.map(|_| since);
            let percent = self.load.and_then(|load| load.busy_percent).unwrap_or(0);
            let nanos = u64::try_from(since.as_nanos()).unwrap_or(0) / 100;
            self.busy_nanos += nanos * u64::from(percent);
        }
        Ok(energy.0)
    }

    /// Holds the counter against the integral.
    pub(super) fn compare(&mut self, now: Duration, total: Option<u64>, lost: bool) {
        if lost {
            self.comparison.restart();
        }
        if let Some(total) = total {
            self.comparison.observe(now, total, self.integral.sum());
        }
    }

    /// Busy time so far, in nanoseconds. In MIG mode it is not told: nobody works there while nobody holds an instance.
    pub(super) fn busy_nanos(&self, held: bool) -> Option<u64> {
        match self.load?.busy_percent {
            Some(_) => Some(self.busy_nanos),
            None => (!held).then_some(0),
        }
    }
}

fn due(asked: Option<Duration>, now: Duration, every: Duration) -> bool {
    asked.is_none_or(|asked| now.saturating_sub(asked) >= every)
}
