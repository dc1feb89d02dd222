//! How many threads this process may use: its CPU set and its cgroup's quota, not the host's cores.

/// CPUs that this process may use at once: those of its affinity mask, at most the whole CPUs of its
/// cgroup's quota (v1 or v2; 1.5 CPUs count as 1, since a thread that is throttled holds up all others), at least 1.
pub fn allowed() -> usize {
    // The standard library asks sched_getaffinity and reads the quota of the process's cgroup and its parents.
    std::thread::available_parallelism().map_or(1, usize::from)
}
