//! This crate's own CPU kernels: what a transformer needs, on plain slices, spread over a small pool of threads.
//!
//! They exist because decoding is bound by memory: every weight is read once per step, so the kernels are written
//! to stream weights and to use each one for all rows of a batch. Results do not depend on the number of rows:
//! each output is summed in an order of its own that neither batch neighbours nor threads change.

pub mod activation;
pub mod attention;
pub mod linear;
pub mod norm;
pub mod packed;
pub mod pool;
pub mod simd;

pub use pool::Pool;
pub use simd::Isa;

/// The kernels: a pool and the vector instructions to use.
pub struct Kernels {
    /// Threads that compute.
    pub pool: Pool,
    /// Vector instructions.
    pub isa: Isa,
}

impl Kernels {
    /// Kernels on `threads` threads (at least 1) with the widest instructions that this processor has.
    pub fn new(threads: usize) -> Self {
        Self { pool: Pool::new(threads), isa: Isa::detect() }
    }
}

/// A pointer that tasks of one parallel region may share, each writing a part of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: only the pointer is shared; each use says why its writes are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The pointer `offset` elements on. Taking the whole struct keeps closures from capturing the bare pointer.
    ///
    /// # Safety
    /// `offset` lies within the slice that it was made of.
    unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}
