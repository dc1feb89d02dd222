//! The `joulecast-operator` binary.
fn main() {}
