//! The pod's side: a meter whose readings come from the node agent.

use super::{Answer, MAX_ANSWER_BYTES, Refusal, Request, WindowEnergy};
use crate::meter::{GpuUse, Meter, Source, Totals};
use crate::units::{Microjoules, Milliwatts};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for one answer. The agent takes well below a millisecond.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two attempts while the agent is away.
const PAUSE: Duration = Duration::from_millis(100);
/// Attempts to open a window, and to read it for the last time: an agent that is replaced is back within seconds.
const ATTEMPTS: u32 = 100;

/// Why a slot cannot be metered.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// No connection, or it broke.
    #[error("{}: {source}: is the node agent running on this node?", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The agent refused.
    #[error("{}: the node agent refused ({reason:?}): {message}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// What to do about it.
        reason: Refusal,
        /// The agent's words.
        message: String,
    },
    /// The agent speaks otherwise.
    #[error("{}: the node agent's answer is not understood ({what}): agent and runtime may be of different releases", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// A window at the node agent.
#[derive(Debug)]
pub struct SlotMeter {
    link: Link,
    window: u64,
    meter: String,
    /// The notes of the last answer.
    notes: Vec<String>,
    /// Why there is no figure now.
    missing: Option<String>,
    /// Readings that failed so far.
    failures: u64,
    /// Why the slot's device is lost, since the agent said so.
    device_lost: Option<String>,
    /// Use of the slot's GPUs, by the last answer that told it.
    gpu: GpuUse,
}

#[derive(Debug)]
struct Link {
    path: PathBuf,
    stream: Option<BufReader<UnixStream>>,
}

impl SlotMeter {
    /// Opens a window for the job of this name, and says the slot's idle power if the agent knows it. `wait` lets time
    /// pass between two attempts.
    ///
    /// # Errors
    /// When the agent does not answer for about ten seconds, or this node has no meter.
    pub fn open(
        path: &Path,
        job: Option<&str>,
        wait: &mut dyn FnMut(Duration),
    ) -> Result<(Self, Option<Milliwatts>), SlotError> {
        let mut link = Link { path: path.to_owned(), stream: None };
        let request = Request::Open { job: job.map(str::to_owned) };
        let answer = link.ask_patiently(&request, wait)?;
        let Answer::Opened { window, meter, idle_milliwatts } = answer else { return Err(link.unexpected(&answer)) };
        let meter = Self {
            link,
            window,
            meter,
            notes: Vec::new(),
            missing: None,
            failures: 0,
            device_lost: None,
            gpu: GpuUse::default(),
        };
        Ok((meter, idle_milliwatts.map(Milliwatts)))
    }

    fn totals(&mut self, now: Duration, answer: Result<Answer, SlotError>) -> Totals {
        let answer = match answer {
            Ok(Answer::Window(energy)) => Ok(energy),
            Ok(other) => Err(self.link.unexpected(&other)),
            Err(error) => Err(error),
        };
        match answer {
            Ok(WindowEnergy { gross_microjoules, domain_microjoules, notes, device_lost, gpu, .. }) => {
                self.missing = None;
                self.notes = notes;
                // It does not come back within a run.
                self.device_lost = self.device_lost.take().or(device_lost);
                self.gpu = gpu.unwrap_or(self.gpu);
                Totals {
                    at: now,
                    gross: gross_microjoules.map(Microjoules),
                    domains: domain_microjoules.into_iter().map(|(name, energy)| (name, Microjoules(energy))).collect(),
                }
            }
            Err(error) => {
                self.failures += 1;
                self.missing = Some(error.to_string());
                Totals { at: now, ..Totals::default() }
            }
        }
    }
}

impl Meter for SlotMeter {
    fn source(&self) -> Source {
        Source::Measured
    }

    fn describe(&self) -> String {
        self.meter.clone()
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        match &self.missing {
            Some(missing) => notes.push(format!("no reading: {missing}")),
            None if self.failures > 0 => {
                notes.push(format!("{} readings failed; the agent's counters went on", self.failures));
            }
            None => {}
        }
        notes
    }

    fn device_lost(&self) -> Option<&str> {
        self.device_lost.as_deref()
    }

    fn gpu(&self) -> GpuUse {
        self.gpu
    }

    fn sample(&mut self, now: Duration) -> Totals {
        let answer = self.link.ask(&Request::Mark { window: self.window });
        self.totals(now, answer)
    }

    fn finish(&mut self, now: Duration) -> Totals {
        // The totals must not be lost with an agent that is being replaced at this moment.
        let request = Request::Close { window: self.window };
        let answer = self.link.ask_patiently(&request, &mut |pause| std::thread::sleep(pause));
        self.totals(now, answer)
    }
}

impl Link {
    /// Asks until there is an answer, as long as asking again can help.
    fn ask_patiently(&mut self, request: &Request, wait: &mut dyn FnMut(Duration)) -> Result<Answer, SlotError> {
        let mut left = ATTEMPTS;
        loop {
            let outcome = self.ask(request);
            left -= 1;
            let hope = match &outcome {
                Err(SlotError::Io { .. }) => true,
                Err(SlotError::Refused { reason, .. }) => *reason == Refusal::NotReady,
                Err(SlotError::Answer { .. }) | Ok(_) => false,
            };
            if !hope || left == 0 {
                return outcome;
            }
            wait(PAUSE);
        }
    }

    /// Asks once; a broken connection is made anew the next time.
    fn ask(&mut self, request: &Request) -> Result<Answer, SlotError> {
        let line = self.exchange(request).map_err(|source| {
            self.stream = None;
            SlotError::Io { path: self.path.clone(), source }
        })?;
        let answer = serde_json::from_slice(&line)
            .map_err(|error| SlotError::Answer { path: self.path.clone(), what: error.to_string() })?;
        match answer {
            Answer::Refused { reason, message } => Err(SlotError::Refused { path: self.path.clone(), reason, message }),
            answer => Ok(answer),
        }
    }

    fn exchange(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let stream = UnixStream::connect(&self.path)?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                none.insert(BufReader::new(stream))
            }
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.get_mut().write_all(&line)?;
        line.clear();
        let limit = u64::try_from(MAX_ANSWER_BYTES).unwrap_or(u64::MAX);
        stream.take(limit).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the answer ended before its newline"));
        }
        Ok(line)
    }

    fn unexpected(&self, answer: &Answer) -> SlotError {
        SlotError::Answer { path: self.path.clone(), what: format!("unexpected {answer:?}") }
    }
}

#[cfg(test)]
mod tests;
