//! Cluster tests of Joulecast.
