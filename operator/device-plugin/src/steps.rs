//! The regular work: steps, saving, asking the kubelet, and the health of slots.

use crate::clock::Clock;
use crate::service::Service;
use crate::slots::Slot;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Time between two looks at the counters: 10 Hz.
const LOOK: Duration = Duration::from_millis(100);
/// Every so many looks energy is divided among pods, for which the CPU time of each is read; windows have steps of their own at
/// their edges.
const STEP_EVERY: u64 = 5;
/// Every so many looks the state is saved, so that a crash loses the division of a second at most.
const SAVE_EVERY: u64 = 10;
/// Every so many looks the kubelet is asked who holds the slots.
const ASK_EVERY: u64 = 100;
/// A counter that cannot be read for so long makes its slot unhealthy.
const UNHEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Works until it is aborted. `lists` are the slots of each resource, as the kubelet is told of them.
pub async fn keep(service: Arc<Service>, lists: Vec<watch::Sender<Vec<Slot>>>) {
    let clock = Clock::system();
    let mut interval = tokio::time::interval(LOOK);
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for count in 1u64.. {
        interval.tick().await;
        if count % STEP_EVERY == 0 {
            service.tick();
        } else {
            service.look();
        }
        if count % SAVE_EVERY == 0 {
            service.save();
        }
        if count % ASK_EVERY == 0 {
            service.ask_kubelet().await;
        }
        let failing = service.metering().meter().failing(clock.since_boot(), UNHEALTHY_AFTER);
        for list in &lists {
            list.send_if_modified(|slots| {
                let mut changed = false;
                for slot in slots {
                    let now = failing.get(&slot.id).cloned();
                    if now != slot.unhealthy {
                        tracing::warn!(
                            slot = slot.id,
                            health = now.as_deref().unwrap_or("well again"),
                            "health changed"
                        );
                        slot.unhealthy = now;
                        changed = true;
                    }
                }
                changed
            });
        }
    }
}
