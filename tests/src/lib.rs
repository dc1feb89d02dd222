//! What the cluster tests stand on: the cluster, a namespace of one's own with a model in it, and waiting for a condition.
//!
//! The tests need a cluster with Joulecast installed; `make test` provides both (`tests/install.sh`). They talk to it as
//! users do: manifests, kubectl, helm and `joulecast`, and the API where a condition is awaited.

pub mod agent;
pub mod audit;
pub mod cluster;
pub mod fake_nvidia_plugin;
pub mod job;
pub mod namespace;
pub mod pry;
