//! Object storage against real servers: S3-compatible ones, Azurite, rclone's S3 face; and what happens when they fail.
//!
//! A server is started by the test that needs it, from a program that a variable names or that is on the `PATH`
//! (`scripts/storage-servers.sh` installs them). Where it is not there the test says so and passes.

mod backends;
mod end_to_end;
mod faults;
#[path = "../faults/support.rs"]
#[expect(dead_code, reason = "other tests need more of it")]
mod home;
mod presigned;
mod proxy;
mod servers;
#[path = "../shim/mod.rs"]
#[expect(dead_code, reason = "other tests need more of it")]
mod shim;
mod start_up;
#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "other tests need more of it")]
mod support;
