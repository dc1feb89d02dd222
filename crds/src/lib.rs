//! What two processes of Joulecast must agree on: kinds, run specification, report, names.
