//! Plans of small workloads against every possible assignment.

mod cases;
mod limits;
mod medium;
mod shares;
mod sharing;
