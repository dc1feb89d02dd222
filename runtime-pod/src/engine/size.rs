//! Checks of what the options ask for against the model and the machine, before anything large is allocated.

use std::path::Path;

use super::{DEFAULT_MAX_CONTEXT, Dtype, EngineError, LoadOptions};
use crate::memory;

/// Sequences in flight, at most.
const MAX_SLOTS: usize = 1024;
/// Compute threads, at most.
const MAX_THREADS: usize = 1024;

/// Slots and threads.
pub(super) fn slots_and_threads(options: &LoadOptions) -> Result<(usize, usize), EngineError> {
    let slots = within("--batch", options.batch, MAX_SLOTS)?;
    let threads = within("--threads", options.threads.unwrap_or_else(crate::threads::allowed), MAX_THREADS)?;
    Ok((slots, threads))
}

fn within(option: &'static str, value: usize, most: usize) -> Result<usize, EngineError> {
    if (1..=most).contains(&value) {
        Ok(value)
    } else {
        Err(EngineError::Option { option, problem: format!("{value} is out of range; give 1 to {most}") })
    }
}

/// Tokens of one slot, of a model that was made for `most`.
pub(super) fn context(wanted: Option<usize>, most: usize) -> Result<usize, EngineError> {
    match wanted {
        None => Ok(most.min(DEFAULT_MAX_CONTEXT)),
        Some(n) if (2..=most).contains(&n) => Ok(n),
        Some(n) => {
            let problem =
                format!("{n} is out of range; give 2 to {most}, the longest that the model is known to be good for");
            Err(EngineError::Option { option: "--max-context", problem })
        }
    }
}

/// Refuses what would be killed for its memory later. All in bytes, but for slots and their context in tokens.
pub(super) fn fits(weights: u64, kv_per_token: u64, slots: usize, context: usize) -> Result<(), EngineError> {
    let kv = kv_per_token.saturating_mul(slots as u64).saturating_mul(context as u64);
    let Some(free) = memory::available_bytes(Path::new("/")) else { return Ok(()) };
    if weights.saturating_add(kv) <= free {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    Err(EngineError::Option {
        option: "--batch, --max-context",
        problem: format!(
            "the weights take {} MiB and the KV cache of {slots} slots of {context} tokens up to {} MiB, but this process \
             may use {} MiB; lower --batch or --max-context, or give the pod more memory",
            mib(weights),
            mib(kv),
            mib(free)
        ),
    })
}

/// Of engines that take an artifact's weights as they are: refuses another type.
pub(super) fn dtype(wanted: Option<Dtype>, found: Dtype) -> Result<(), EngineError> {
    match wanted.filter(|wanted| *wanted != found) {
        None => Ok(()),
        Some(wanted) => Err(EngineError::Option {
            option: "--dtype",
            problem: format!(
                "the artifact's weights are {found}, not {wanted}; leave the option out, or choose another artifact"
            ),
        }),
    }
}
