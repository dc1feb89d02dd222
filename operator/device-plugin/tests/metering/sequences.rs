//! Any sequence of requests of two pods, while time passes, counters wrap and the agent is restarted: held against a model.

use crate::fake_node::FakeNode;
use joulecast_device_plugin::metering::{MAX_WINDOWS, Metering};
use joulecast_meter::slot::{Answer, Refusal, Request, WindowStatus};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What happens.
#[derive(Debug, Clone)]
enum Act {
    Open(usize),
    /// A window by its place among all that were ever opened, and a few that never were.
    Read(usize, u64, bool),
    Pass(u64, [u64; 3]),
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..2usize).prop_map(Act::Open),
        6 => (0..2usize, 0..40u64, any::<bool>()).prop_map(|(slot, window, close)| Act::Read(slot, window, close)),
        6 => (1..5_000u64, [0..900u64, 0..900, 0..900]).prop_map(|(millis, used)| Act::Pass(millis, used)),
        1 => Just(Act::Restart),
    ]
}

/// A window as it must be: whose it is, what its pod was due when it was opened, and when that was.
struct Known {
    slot: usize,
    due: u64,
    at: std::time::Duration,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_requests_breaks_a_window_or_the_books(acts in prop::collection::vec(act(), 1..80)) {
        let mut node = FakeNode::new(2);
        let mut metering = node.metering();
        let mut windows: BTreeMap<u64, Known> = BTreeMap::new();
        for act in acts {
            match act {
                Act::Open(slot) => {
                    let answer = metering.answer(&format!("cpu-{slot}"), Request::Open { job: None }, node.now(), 0);
                    let Answer::Opened { window, .. } = answer else { panic!("{answer:?}") };
                    let known = Known { slot, due: node.due(slot), at: node.now() };
                    prop_assert!(windows.insert(window, known).is_none(), "window {window} was opened twice");
                }
                Act::Read(slot, window, close) => {
                    let request = if close { Request::Close { window } } else { Request::Mark { window } };
                    let answer = metering.answer(&format!("cpu-{slot}"), request, node.now(), 0);
                    match windows.get(&window).filter(|known| known.slot == slot) {
                        None => {
                            let unknown = matches!(answer, Answer::Refused { reason: Refusal::UnknownWindow, .. });
                            prop_assert!(unknown, "{answer:?}");
                        }
                        Some(known) => {
                            let Answer::Window(energy) = answer else { panic!("{answer:?}") };
                            let length = u128::from(energy.length_microseconds);
                            prop_assert_eq!(energy.status, WindowStatus::Complete);
                            prop_assert_eq!(length, (node.now() - known.at).as_micros());
                            // Each step rounds a microjoule at most; the wave of use is even within each.
                            let (want, got) = (node.due(slot) - known.due, energy.gross_microjoules.unwrap());
                            prop_assert!(got.abs_diff(want) <= 100, "{got} is not {want}");
                            if close {
                                windows.remove(&window);
                            }
                        }
                    }
                }
                Act::Pass(millis, used) => node.pass(millis, |_| used.map(|used| used * millis / 5_000)),
                Act::Restart => {
                    let state = node.path("state.json");
                    metering.save(&state, "boot").unwrap();
                    metering = Metering::new(node.meter(), node.slots());
                    prop_assert_eq!(metering.resume(&state, "boot").unwrap(), windows.len());
                    metering.held(node.now(), 0, &node.holders());
                }
            }
            prop_assert_eq!(metering.open_windows(), windows.len());
            prop_assert!(windows.len() <= 2 * MAX_WINDOWS);
        }
        metering.tick(node.now(), 0);
        for (index, (_, books)) in metering.meter().ledger().books().enumerate() {
            prop_assert_eq!((books.moved, books.accounted()), (node.moved(index), node.moved(index)));
        }
    }
}
