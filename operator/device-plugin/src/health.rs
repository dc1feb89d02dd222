//! Health of GPUs: a thread of its own waits for what NVML tells of them, since that call blocks.

use crate::service::Service;
use joulecast_meter::nvml::Events;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// One wait; nothing depends on its length.
const WAIT: Duration = Duration::from_secs(5);
/// Pause after a wait that failed.
const PAUSE: Duration = Duration::from_secs(5);

/// Starts the thread; it lives as long as the process.
///
/// # Errors
/// If there can be no thread.
pub fn watch(service: Arc<Service>, events: Events) -> io::Result<()> {
    let run = move || {
        let mut failing = false;
        loop {
            match events.wait(WAIT) {
                Ok(trouble) => {
                    failing = false;
                    if let Some(trouble) = trouble {
                        service.metering().trouble(&trouble);
                    }
                }
                Err(error) => {
                    // A lost GPU makes every wait fail: once in the log is enough. Its reading tells which it is.
                    if !failing {
                        tracing::warn!("no news of GPUs: {error}; trying again");
                    }
                    failing = true;
                    std::thread::sleep(PAUSE);
                }
            }
        }
    };
    std::thread::Builder::new().name("gpu-events".to_owned()).spawn(run).map(drop)
}
