//! Faults with real processes: workers and servers killed at any moment, jobs cancelled, inputs that lie.

mod backup;
mod bad_input;
mod cancelled;
mod exports;
mod paused;
mod server_killed;
mod start_up;
mod support;
mod worker_killed;
