//! Samples a recorder at a fixed rate on a thread of its own, beside the work that it records.

use crate::meter::Source;
use crate::recorder::{Recorder, Recording, SoFar};
use crate::units::Microjoules;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A monotonic clock; only differences count.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Time between two samples: 10 Hz. Safe against missed wraps by orders of magnitude, and about 30 us of work each.
pub const INTERVAL: Duration = Duration::from_millis(100);

/// A recorder with its sampling thread.
pub struct Sampler {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    clock: Clock,
    source: Source,
    meter: String,
}

struct Inner {
    /// `None` once the window was finished.
    recorder: Mutex<Option<Recorder>>,
    stopped: Mutex<bool>,
    bell: Condvar,
}

impl Sampler {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(recorder: Recorder, clock: Clock, interval: Duration) -> std::io::Result<Self> {
        let (source, meter) = (recorder.source(), recorder.describe());
        let inner =
            Arc::new(Inner { recorder: Mutex::new(Some(recorder)), stopped: Mutex::new(false), bell: Condvar::new() });
        let (shared, time) = (Arc::clone(&inner), Arc::clone(&clock));
        let thread =
            std::thread::Builder::new().name("meter".to_owned()).spawn(move || shared.work(&time, interval))?;
        Ok(Self { inner, thread: Some(thread), clock, source, meter })
    }

    /// Where the figures come from.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// The meter and what it covers.
    #[must_use]
    pub fn meter(&self) -> &str {
        &self.meter
    }

    /// Gross energy from the window's begin to now.
    #[must_use]
    pub fn gross(&self) -> Option<Microjoules> {
        // The clock is read under the lock, so that the meter sees time go forwards only.
        let mut recorder = lock(&self.inner.recorder);
        recorder.as_mut()?.gross((self.clock)())
    }

    /// Why the device is lost, as of the last sample; `None` while it is not known to be, and once the window was finished.
    #[must_use]
    pub fn device_lost(&self) -> Option<String> {
        lock(&self.inner.recorder).as_ref()?.device_lost().map(str::to_owned)
    }

    /// The window's totals so far; `None` once it was finished.
    #[must_use]
    pub fn so_far(&self) -> Option<SoFar> {
        let mut recorder = lock(&self.inner.recorder);
        recorder.as_mut().map(|recorder| recorder.so_far((self.clock)()))
    }

    /// Ends the window and the thread. `None` if it was finished before.
    #[must_use]
    pub fn finish(&mut self) -> Option<Recording> {
        self.stop();
        let recorder = lock(&self.inner.recorder).take()?;
        Some(recorder.finish((self.clock)()))
    }

    fn stop(&mut self) {
        *lock(&self.inner.stopped) = true;
        self.inner.bell.notify_all();
        if let Some(thread) = self.thread.take() {
            // A sampling thread that panicked has left its recorder in the lock; its last totals still count.
            let _ = thread.join();
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn work(&self, clock: &Clock, interval: Duration) {
        let mut stopped = lock(&self.stopped);
        while !*stopped {
            stopped = self.bell.wait_timeout(stopped, interval).unwrap_or_else(PoisonError::into_inner).0;
            if let Some(recorder) = lock(&self.recorder).as_mut() {
                recorder.tick(clock());
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::Choice;
    use crate::host::fake::FakeHost;
    use crate::meter::{Meter, Totals};
    use std::sync::mpsc;

    /// A fake meter that tells a channel of every sample.
    struct FakeMeter(mpsc::Sender<Duration>);

    impl Meter for FakeMeter {
        fn source(&self) -> Source {
            Source::Measured
        }
        fn describe(&self) -> String {
            "fake".to_owned()
        }
        fn notes(&self) -> Vec<String> {
            Vec::new()
        }
        fn sample(&mut self, now: Duration) -> Totals {
            let _ = self.0.send(now);
            Totals { at: now, gross: Some(Microjoules(u64::try_from(now.as_micros()).unwrap())), ..Totals::default() }
        }
    }

    #[test]
    fn it_samples_until_it_is_finished_and_then_no_more() {
        let (send, samples) = mpsc::channel();
        let choice = Choice { meter: Box::new(FakeMeter(send)), idle: None, notes: Vec::new() };
        let start = std::time::Instant::now();
        let clock: Clock = Arc::new(move || start.elapsed());
        let recorder = Recorder::begin(choice, &FakeHost::new(&[]).host(), clock());
        let mut sampler = Sampler::start(recorder, clock, Duration::from_millis(1)).unwrap();
        let times: Vec<_> = samples.iter().take(5).collect();
        assert!(times.is_sorted(), "{times:?}");
        assert!(sampler.gross().is_some());
        let recording = sampler.finish().unwrap();
        assert!(recording.gross.unwrap().0 > 0);
        assert_eq!(sampler.finish(), None);
        assert_eq!(sampler.gross(), None);
        assert!(samples.iter().all(|at| at >= times[0]), "the channel closes: nothing samples any more");
    }
}
