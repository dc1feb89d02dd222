//! A pool of threads for regions of a few microseconds to milliseconds.
//!
//! Decoding one token enters some two hundred parallel regions, so waking a thread for each would cost more
//! than the work. A worker therefore looks for the next region for a bounded time (about [`SPINS`] pauses, some
//! ten microseconds) before it goes to sleep, and so does the caller for the workers' last tasks. Neither ever spins
//! longer, so that a thread that has lost its CPU (to a quota or to another process) costs its peers little.
//! A worker that wakes late finds the region closed, and the caller does not wait for it.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Pauses before a thread that waits goes to sleep.
const SPINS: u32 = 400;

/// In the state word: workers may join the region.
const OPEN: u64 = 1 << 31;
/// In the state word: one region.
const REGION: u64 = 1 << 32;
/// In the state word: the workers that have joined.
const JOINED: u64 = OPEN - 1;

/// A fixed set of threads, the caller among them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Arc<Sleeper>)>,
    /// Held by the caller of a region: one region at a time.
    gate: Mutex<()>,
}

/// What the caller lends to the workers for the time of one region.
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    caller: Arc<Sleeper>,
}

struct Shared {
    /// Region number (upper half), [`OPEN`], and the number of workers that have joined.
    state: AtomicU64,
    /// Written by the caller while no worker has joined and the region is closed; read by workers that have joined.
    job: UnsafeCell<Option<Job>>,
    /// One range of tasks for each thread, the caller's first.
    ranges: Vec<Range>,
    quit: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: `job` is the only part that is not `Sync` by itself; `state` orders its accesses (see its comment), and the
// closure behind it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// Tasks that one thread takes from the front and others, when they have none left, from the back: a thread that walks
/// through neighbouring tasks reads memory in one stream. On a cache line of its own.
#[repr(align(128))]
struct Range(AtomicU64);

impl Range {
    fn set(&self, from: usize, to: usize) {
        self.0.store((to as u64) << 32 | from as u64, Ordering::Relaxed);
    }

    fn take(&self, front: bool) -> Option<usize> {
        let split = |range: u64| (range & u64::from(u32::MAX), range >> 32);
        let shrink = |range| {
            let (from, to) = split(range);
            let (from, to) = if front { (from + 1, to) } else { (from, to.checked_sub(1)?) };
            (from <= to).then_some(to << 32 | from)
        };
        let (from, to) = split(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shrink).ok()?);
        Some(if front { from } else { to - 1 } as usize)
    }
}

/// A thread that may be asleep.
struct Sleeper {
    thread: Thread,
    asleep: AtomicBool,
}

impl Sleeper {
    fn current() -> Self {
        Self { thread: std::thread::current(), asleep: AtomicBool::new(false) }
    }

    /// Waits on its own thread until `ready`: first awake, then asleep.
    fn wait(&self, ready: impl Fn() -> bool) {
        for _ in 0..SPINS {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        loop {
            self.asleep.store(true, Ordering::SeqCst);
            // Either this thread sees what its waker published, or the waker sees that it sleeps.
            fence(Ordering::SeqCst);
            if ready() {
                break;
            }
            std::thread::park();
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Called after publishing what the sleeper waits for.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, at least 1, of which the caller is one.
    ///
    /// Where the system refuses further threads, the pool has fewer ([`Pool::threads`]).
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            ranges: (0..threads.max(1)).map(|_| Range(AtomicU64::new(0))).collect(),
            quit: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for i in 1..threads {
            let (tell, told) = std::sync::mpsc::channel();
            let theirs = Arc::clone(&shared);
            let spawned = std::thread::Builder::new().name(format!("kernel-{i}")).spawn(move || {
                let sleeper = Arc::new(Sleeper::current());
                if tell.send(Arc::clone(&sleeper)).is_ok() {
                    theirs.work(&sleeper, i);
                }
            });
            match (spawned, told.recv()) {
                (Ok(handle), Ok(sleeper)) => workers.push((handle, sleeper)),
                _ => break,
            }
        }
        Self { shared, workers, gate: Mutex::new(()) }
    }

    /// Threads that compute, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with each number below `tasks`, on all threads, in no certain order, and returns when all are
    /// done. Neighbouring tasks go to the same thread as far as possible. At most `u32::MAX` tasks. Must not be called from within a task. A panic in a task is passed on after the others have finished.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks < 2 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        thread_local! {
            static ME: Arc<Sleeper> = Arc::new(Sleeper::current());
        }
        let me = ME.with(Arc::clone);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `Region` below keeps this function from returning, also by a panic, before
        // every worker that has joined has left, and none joins later.
        let task_for_workers: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        // SAFETY: the last region is closed and left by all, so no worker reads the job.
        unsafe { *shared.job.get() = Some(Job { task: task_for_workers, caller: Arc::clone(&me) }) };
        let threads = self.threads();
        for (i, range) in shared.ranges[..threads].iter().enumerate() {
            range.set(i * tasks / threads, (i + 1) * tasks / threads);
        }
        let region = (shared.state.load(Ordering::Relaxed) & !JOINED & !OPEN).wrapping_add(REGION);
        shared.state.store(region | OPEN, Ordering::SeqCst);
        for (_, worker) in self.workers.iter().take(tasks - 1) {
            worker.wake();
        }
        let region = Region { shared, me: &me };
        shared.drain(task, 0);
        drop(region);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a task of a parallel region panicked"));
        }
    }
}

/// An open region; closes it and waits for the workers in it.
struct Region<'a> {
    shared: &'a Shared,
    me: &'a Sleeper,
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        self.shared.state.fetch_and(!OPEN, Ordering::SeqCst);
        self.me.wait(|| self.shared.state.load(Ordering::Acquire) & JOINED == 0);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        for (handle, sleeper) in self.workers.drain(..) {
            sleeper.wake();
            // A worker's panic was already passed on by `run`.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// Takes tasks, its own first, until there are none.
    fn drain(&self, task: &(dyn Fn(usize) + Sync), index: usize) {
        let own = &self.ranges[index];
        while let Some(i) = own.take(true) {
            task(i);
        }
        for others in self.ranges[index + 1..].iter().chain(&self.ranges[..index]) {
            while let Some(i) = others.take(false) {
                task(i);
            }
        }
    }

    /// A worker's life.
    fn work(&self, me: &Sleeper, index: usize) {
        let mut seen = 0;
        loop {
            let region = || self.state.load(Ordering::SeqCst) & !(JOINED | OPEN);
            me.wait(|| region() != seen || self.quit.load(Ordering::SeqCst));
            if self.quit.load(Ordering::SeqCst) {
                return;
            }
            seen = region();
            let join = |state: u64| (state & !(JOINED | OPEN) == seen && state & OPEN != 0).then_some(state + 1);
            if self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).is_err() {
                continue;
            }
            // SAFETY: having joined an open region, this thread sees the job of that region, and the caller does not
            // touch it before this thread has left.
            let job = unsafe { (*self.job.get()).as_ref() };
            if let Some(Job { task, caller }) = job {
                let caller = Arc::clone(caller);
                // SAFETY: the caller keeps the closure alive until all have left.
                let task = unsafe { &**task };
                if catch_unwind(AssertUnwindSafe(|| self.drain(task, index))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                let before = self.state.fetch_sub(1, Ordering::SeqCst);
                if before & JOINED == 1 {
                    caller.wake();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..2000 {
                let tasks = round % 37;
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn workers_that_sleep_are_woken_and_help() {
        let pool = Pool::new(2);
        for _ in 0..20 {
            // Two tasks that need each other can only finish on two threads.
            let met = std::sync::Barrier::new(2);
            // Longer than the spinning lasts: the worker is asleep, or about to be.
            std::thread::yield_now();
            (0..50_000).for_each(|_| std::hint::spin_loop());
            pool.run(2, &|_| {
                met.wait();
            });
        }
    }

    #[test]
    fn a_panic_in_a_task_is_passed_on_and_the_pool_stays_usable() {
        let pool = Pool::new(3);
        for bad in 0..6 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(6, &|i| assert_ne!(i, bad, "on purpose"))));
            assert!(result.is_err(), "task {bad}");
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 200 * 10);
    }
}
