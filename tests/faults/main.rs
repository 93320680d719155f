//! Faults with real processes: workers and servers killed at any moment, jobs cancelled, inputs and
//! workers that lie, clocks that jump, work that stands still.

mod backup;
mod bad_input;
mod cancelled;
mod exports;
mod lies;
mod paused;
mod server_killed;
#[path = "../shim/mod.rs"]
mod shim;
mod start_up;
mod support;
mod time;
mod worker_killed;
