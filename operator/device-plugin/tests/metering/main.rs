//! The metering service on a fake node: a directory with a powercap tree and a cgroup tree whose numbers a test moves.
#![allow(missing_docs, clippy::print_stdout)]

mod fake_node;
mod hostile;
mod sequences;
mod sockets;
mod windows;
