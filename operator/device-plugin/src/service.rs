//! The sockets of the metering service: one for each slot, in a directory that only the slot's pod sees.
//!
//! Against hostile clients: a request has at most [`MAX_REQUEST_BYTES`], a slot at most [`MAX_CONNECTIONS`] connections and,
//! for long, [`RATE`] requests a second, a client that does not read is cut off after [`WRITE_TIMEOUT`], and what is no request
//! ends its connection. Memory of a slot is bounded by these numbers.

use crate::clock::Clock;
use crate::holders::HolderSource;
use crate::metering::{Metering, refused};
use crate::own_file::OwnFile;
use joulecast_meter::slot::{Answer, MAX_REQUEST_BYTES, Refusal, Request};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Connections that a slot may have.
pub const MAX_CONNECTIONS: usize = 128;
/// Requests a second that a slot may send for long; those beyond wait.
pub const RATE: u32 = 1000;
/// Requests that a slot may send at once.
const BURST: u32 = 200;
/// How long a client may take to read an answer.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The kubelet is asked who holds the slots at most this often, whatever clients do.
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// What all sockets share.
#[derive(Debug)]
pub struct Service {
    metering: Mutex<Metering>,
    holders: tokio::sync::Mutex<HolderSource>,
    /// When the kubelet may be asked again because of a client.
    may_ask: Mutex<Duration>,
    clock: Clock,
    /// File of the state, and the boot that it is of.
    state: PathBuf,
    boot: String,
}

impl Service {
    /// A service.
    #[must_use]
    pub fn new(metering: Metering, holders: HolderSource, clock: Clock, state: PathBuf, boot: String) -> Self {
        Self {
            metering: Mutex::new(metering),
            holders: tokio::sync::Mutex::new(holders),
            may_ask: Mutex::default(),
            clock,
            state,
            boot,
        }
    }

    /// The state behind its lock. No lock is held while anything is awaited.
    pub fn metering(&self) -> MutexGuard<'_, Metering> {
        self.metering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A look at the counters.
    pub fn look(&self) {
        self.metering().look(self.clock.since_boot());
    }

    /// A regular step now.
    pub fn tick(&self) {
        self.metering().tick(self.clock.since_boot(), self.clock.unix_seconds());
    }

    /// A step now, unless one was made a moment ago: what is told next is of this moment. Whoever asks often makes no more steps
    /// than there are looks.
    pub fn catch_up(&self) {
        let mut metering = self.metering();
        let now = self.clock.since_boot();
        if metering.stepped().is_none_or(|stepped| now.saturating_sub(stepped) >= LOOK_AGAIN) {
            metering.tick(now, self.clock.unix_seconds());
        }
    }

    /// Asks the kubelet who holds the slots. A failure is logged, and everything stays as it was.
    pub async fn ask_kubelet(&self) {
        let holders = self.holders.lock().await.read().await;
        match holders {
            Ok(holders) => self.metering().held(self.clock.since_boot(), self.clock.unix_seconds(), &holders),
            Err(error) => tracing::warn!("who holds the slots is not known: {error}"),
        }
    }

    /// Saves the state; a failure is logged: a restart would then lose the open windows.
    pub fn save(&self) {
        if let Err(error) = self.metering().save(&self.state, &self.boot) {
            tracing::warn!(path = %self.state.display(), %error, "the state cannot be saved");
        }
    }

    fn may_ask(&self) -> bool {
        let now = self.clock.since_boot();
        let mut from = self.may_ask.lock().unwrap_or_else(PoisonError::into_inner);
        let may = now >= *from;
        if may {
            *from = now + ASK_PAUSE;
        }
        may
    }

    /// Answers one request of the pod that holds the slot.
    pub async fn answer(&self, slot: &str, request: Request) -> Answer {
        let must_ask = self.metering().must_ask(slot);
        if must_ask && self.may_ask() {
            self.ask_kubelet().await;
        }
        let opens = matches!(request, Request::Open { .. });
        let answer = self.metering().answer(slot, request, self.clock.since_boot(), self.clock.unix_seconds());
        // Before the client knows of its window: once it does, no crash of ours may lose it.
        if opens && matches!(answer, Answer::Opened { .. }) {
            self.save();
        }
        answer
    }
}

impl crate::plugin::OnAllocate for Service {
    fn allocated(&self, slots: &[String]) {
        self.metering().allocated(slots);
    }
}

/// The socket of a slot.
#[derive(Debug)]
pub struct SlotSocket {
    directory: PathBuf,
    name: String,
    listener: UnixListener,
    file: OwnFile,
}

/// Makes the socket of a slot. The directory stays the same for as long as the node is up: a container that sees it sees
/// the socket of a restarted agent too.
///
/// # Errors
/// As the system gives them.
pub fn listen(directory: &Path, name: &str) -> io::Result<SlotSocket> {
    std::fs::create_dir_all(directory)?;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    let path = directory.join(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    // Any user of the pod that holds the slot; nobody else sees the directory.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    Ok(SlotSocket { directory: directory.to_owned(), name: name.to_owned(), listener, file: OwnFile::made(path) })
}

/// A step is of this moment for so long.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How often is looked whether a slot's socket is still there.
const LOOK: Duration = Duration::from_secs(2);

/// Serves a slot until `stopped` says so, and removes its socket then. A socket that somebody removed is made anew; one
/// that another agent put in its place is left to that one.
pub async fn serve(service: Arc<Service>, slot: String, mut socket: SlotSocket, mut stopped: watch::Receiver<bool>) {
    let connections = Arc::new(AtomicUsize::new(0));
    let pace = Arc::new(Mutex::new(Pace::default()));
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let accepted = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            _ = look.tick() => {
                if socket.file.is_gone() {
                    match listen(&socket.directory, &socket.name) {
                        Ok(anew) => {
                            tracing::warn!(slot, "the socket was removed: there is a new one");
                            socket = anew;
                        }
                        Err(error) => tracing::warn!(slot, %error, "the socket was removed, and there can be no new one"),
                    }
                }
                continue;
            }
            accepted = socket.listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Too many open files, for example: wait until some are closed.
                tracing::warn!(slot, %error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let seat = Seat::take(&connections);
        let (service, slot, pace) = (Arc::clone(&service), slot.clone(), Arc::clone(&pace));
        tokio::spawn(async move {
            let outcome = match seat {
                Some(_seat) => converse(&service, &slot, &pace, stream).await,
                None => turn_away(&slot, stream).await,
            };
            if let Err(error) = outcome {
                tracing::debug!(slot, %error, "a connection ended");
            }
        });
    }
    if let Err(error) = socket.file.remove() {
        tracing::warn!(slot, %error, "the socket cannot be removed");
    }
}

/// Spreads a slot's requests over time: when the next one is due if all before it had been evenly spaced.
#[derive(Debug, Default)]
struct Pace {
    due: Duration,
}

impl Pace {
    /// How long a request that came now must wait.
    fn next(&mut self, now: Duration) -> Duration {
        const SPACE: Duration = Duration::from_nanos(1_000_000_000 / RATE as u64);
        let due = self.due.max(now);
        self.due = due + SPACE;
        due.saturating_sub(now + SPACE * BURST)
    }
}

/// One of the connections that a slot may have.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let seat = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn turn_away(slot: &str, mut stream: UnixStream) -> io::Result<()> {
    let message = format!("slot {slot} has {MAX_CONNECTIONS} connections, which is the most: close some");
    send(&mut stream, &refused(Refusal::TooMany, message)).await
}

async fn converse(service: &Service, slot: &str, pace: &Mutex<Pace>, mut stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut read = BufReader::with_capacity(1024, read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(MAX_REQUEST_BYTES).unwrap_or(u64::MAX);
        let length = (&mut read).take(limit).read_until(b'\n', &mut line).await?;
        if length == 0 {
            return Ok(());
        }
        let request = if line.last() == Some(&b'\n') {
            serde_json::from_slice::<Request>(&line).map_err(|error| error.to_string())
        } else {
            Err(format!("a line of at most {MAX_REQUEST_BYTES} bytes that ends in a newline is wanted"))
        };
        let answer = match request {
            Ok(request) => {
                let wait = pace.lock().unwrap_or_else(PoisonError::into_inner).next(service.clock.since_boot());
                if !wait.is_zero() {
                    tokio::time::sleep(wait).await;
                }
                service.answer(slot, request).await
            }
            Err(problem) => refused(Refusal::Malformed, problem),
        };
        send(&mut write, &answer).await?;
        if let Answer::Refused { reason: Refusal::Malformed, .. } = answer {
            return Ok(());
        }
    }
}

async fn send(to: &mut (impl tokio::io::AsyncWrite + Unpin), answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    tokio::time::timeout(WRITE_TIMEOUT, to.write_all(&line))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client does not read"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_the_rate_holds() {
        let mut pace = Pace::default();
        let now = Duration::from_secs(9);
        let waits: Vec<Duration> = (0..BURST + 101).map(|_| pace.next(now)).collect();
        assert!(waits[..BURST as usize].iter().all(Duration::is_zero));
        assert_eq!(waits.last(), Some(&Duration::from_millis(100)));
        assert_eq!(pace.next(Duration::from_secs(99)), Duration::ZERO);
    }
}
