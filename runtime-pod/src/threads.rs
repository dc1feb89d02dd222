//! How many threads this process may use: its CPU set and its cgroup's quota, not the host's cores.
