//! How metered energy is divided among the requests of a run.
//!
//! At the moment a request ends, what has been metered since generation began and is not yet handed out is divided by
//! device-seconds: the request gets its own share of those that the engine has spent and that belong to no ended
//! request. With P the joules in hand, d the request's device-seconds and D those in hand: `P * d / D`. So the sum over
//! all requests equals what was metered from the begin of generation to the last request's end, to the microjoule, and
//! nothing has to be kept per request.

use joulecast_meter::Microjoules;
use std::time::Duration;

/// Energy in hand and handed out.
#[derive(Debug, Clone)]
pub struct Shares {
    begin: Option<Microjoules>,
    handed_out: Microjoules,
    device: Duration,
    /// What `device` may hold too much: a request's part of a step is rounded down to whole nanoseconds.
    rounding: Duration,
}

impl Shares {
    /// Generation begins; `begin` is the meter's running total.
    #[must_use]
    pub fn begin(begin: Option<Microjoules>) -> Self {
        Self { begin, handed_out: Microjoules(0), device: Duration::ZERO, rounding: Duration::ZERO }
    }

    /// The engine was busy for so long with so many requests at once.
    pub fn spend(&mut self, busy: Duration, requests: usize) {
        self.device += busy;
        self.rounding += Duration::from_nanos(requests as u64);
    }

    /// A request ends that used `device` of the engine's time; `gross` is the meter's running total. `None` while the
    /// meter cannot tell: its device-seconds then stay in hand, so that no other request is charged for it.
    pub fn end(&mut self, device: Duration, gross: Option<Microjoules>) -> Option<Microjoules> {
        if device.is_zero() {
            return self.begin.and(gross).map(|_| Microjoules(0));
        }
        let in_hand = gross?.minus(self.begin?)?.minus(self.handed_out).unwrap_or_default();
        let share = if device + self.rounding < self.device {
            let share = u128::from(in_hand.0) * device.as_nanos() / self.device.as_nanos();
            self.device -= device;
            // Less than `in_hand`, which is a u64.
            Microjoules(u64::try_from(share).unwrap_or(in_hand.0))
        } else {
            // Nobody else has device-seconds in hand: what is left but rounding is this request's.
            (self.device, self.rounding) = (Duration::ZERO, Duration::ZERO);
            in_hand
        };
        self.handed_out = self.handed_out.plus(share);
        Some(share)
    }

    /// What has been handed out; `None` if there was never a reading.
    #[must_use]
    pub fn handed_out(&self) -> Option<Microjoules> {
        self.begin.map(|_| self.handed_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn equal_work_gets_equal_energy_and_no_work_gets_none() {
        let mut shares = Shares::begin(Some(Microjoules(100)));
        assert_eq!(shares.end(Duration::ZERO, Some(Microjoules(150))), Some(Microjoules(0)));
        shares.spend(ms(30), 1);
        assert_eq!(shares.end(ms(10), Some(Microjoules(400))), Some(Microjoules(100)));
        assert_eq!(shares.end(ms(10), Some(Microjoules(400))), Some(Microjoules(100)));
        assert_eq!(shares.end(ms(10), Some(Microjoules(400))), Some(Microjoules(100)));
        assert_eq!(shares.handed_out(), Some(Microjoules(300)));
    }

    #[test]
    fn a_missing_reading_charges_nobody_else() {
        let mut shares = Shares::begin(Some(Microjoules(0)));
        shares.spend(ms(20), 1);
        assert_eq!(shares.end(ms(10), None), None);
        assert_eq!(shares.end(ms(10), Some(Microjoules(1000))), Some(Microjoules(500)));
        let mut never = Shares::begin(None);
        assert_eq!((never.end(ms(1), Some(Microjoules(5))), never.handed_out()), (None, None));
        assert_eq!(never.end(Duration::ZERO, None), None);
    }

    proptest! {
        #[test]
        fn the_sum_over_requests_is_what_was_metered(
            requests in prop::collection::vec((1..5000u64, 0..10_000_000u64), 1..60),
            ahead in 0..8usize,
        ) {
            // Up to `ahead` requests are in flight beyond the one that ends; energy comes in between.
            let mut shares = Shares::begin(Some(Microjoules(7)));
            let (mut gross, mut sum, mut spent) = (7, 0, 0);
            for (number, (device, energy)) in requests.iter().enumerate() {
                while spent < requests.len().min(number + 1 + ahead) {
                    shares.spend(ms(requests[spent].0), 1);
                    spent += 1;
                }
                gross += energy;
                sum += shares.end(ms(*device), Some(Microjoules(gross))).unwrap().0;
            }
            prop_assert_eq!(sum, gross - 7);
            prop_assert_eq!(shares.handed_out(), Some(Microjoules(sum)));
        }
    }
}
