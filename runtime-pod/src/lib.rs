//! One run of one engine in one pod.
