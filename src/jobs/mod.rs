//! Use cases.

pub mod launcher;
pub mod pulse;
