//! The node agent: kubelet device plugins that hand out execution slots, and with each slot the right to be metered.
//!
//! A pod that holds a slot gets a socket, not a privilege: the agent alone reads the counters (uid 0, no capability), and
//! answers on one socket for each slot, which only the pod that holds the slot can see.
//!
//! Invariants: allocation is arithmetic ([`allocate`]) apart from gRPC ([`plugin`]). A pod sees its own figures only. What a
//! client sends cannot make memory grow beyond what a slot may have. Nothing here reads a clock: [`clock`] alone does.
#![forbid(unsafe_code)]

pub mod allocate;
pub mod cdi;
pub mod clock;
pub mod gpus;
pub mod health;
pub mod holders;
pub mod labels;
pub mod metering;
pub mod metrics;
pub mod node_meter;
pub mod own_file;
pub mod plugin;
pub mod proto;
pub mod registration;
pub mod service;
pub mod slots;
pub mod steps;
