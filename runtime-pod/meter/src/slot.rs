//! The protocol between the node agent and the pod that holds a slot, over the slot's Unix socket.
//!
//! One JSON object a line in each direction, one answer to each request, in order. The agent knows the pod by the socket:
//! a request names no pod, and can name no other pod's windows. docs/metering.md describes it with an example; why it is
//! not gRPC stands in the decision records.

use crate::meter::GpuUse;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

mod client;
pub use client::{SlotError, SlotMeter};

/// Longest line of a request in bytes, its newline included.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Longest line of an answer in bytes, its newline included.
pub const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// What a pod asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Opens a window now.
    Open {
        /// Name of the job for the agent's metrics, at most 253 bytes; the namespace is known to the agent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<String>,
    },
    /// Reads an open window; it stays open.
    Mark {
        /// The window.
        window: u64,
    },
    /// Reads a window for the last time and forgets it.
    Close {
        /// The window.
        window: u64,
    },
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A window is open.
    Opened {
        /// Its number; unique on this node since it booted.
        window: u64,
        /// The meter and what its figures cover, for reports.
        meter: String,
        /// Idle power of the domains that this slot pays the idle energy of; absent while it is not measured.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idle_milliwatts: Option<u64>,
    },
    /// A window's energy until now.
    Window(WindowEnergy),
    /// The request was not carried out.
    Refused {
        /// What to do about it.
        reason: Refusal,
        /// What happened and the way out.
        message: String,
    },
}

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The request is not one; the connection is closed. A defect of the client.
    Malformed,
    /// This node has no meter: use another source. Asking again does not help.
    NoMeter,
    /// The agent cannot tell yet which pod holds the slot. Ask again.
    NotReady,
    /// No such window of this pod: it was closed, or the agent lost it.
    UnknownWindow,
    /// As many windows or connections are open as a slot may have. Close some.
    TooMany,
}

/// Energy of a window of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowEnergy {
    /// The window.
    pub window: u64,
    /// Whether the figures are whole.
    pub status: WindowStatus,
    /// Length in microseconds.
    pub length_microseconds: u64,
    /// All that the pod used and its slot's idle energy; absent if a domain of it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gross_microjoules: Option<u64>,
    /// The idle energy in gross; absent while idle power is not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_microjoules: Option<u64>,
    /// Gross energy by domain, those included that gross does not add; a domain that is not known is missing.
    #[serde(default)]
    pub domain_microjoules: BTreeMap<String, u64>,
    /// What a reader must know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Use of the pod's GPUs in the window; absent for a pod without a whole GPU, and until they were read once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuUse>,
    /// Why the pod's GPU is of no use any more, if so: it is lost, or told of an error that it does not recover from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_lost: Option<String>,
}

/// Whether a window's figures are whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowStatus {
    /// Every domain is known.
    Complete,
    /// A domain is not known: there was no reading, or its counter was lost.
    Partial,
    /// A domain's figure cannot be true and is left out.
    Invalid,
}
