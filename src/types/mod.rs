//! Plain data that every layer speaks: ids, states, job specifications, events, the worker protocol. No I/O.

pub mod api_key;
pub mod artifact;
pub mod attempt;
pub mod checkpoint;
pub mod device;
pub mod event;
pub mod export;
pub mod file;
pub mod ids;
pub mod inspection;
pub mod job;
pub mod job_request;
pub mod job_spec;
pub mod metric;
pub mod rerun_request;
mod text;
pub mod upload;
pub mod worker_protocol;

/// Owner of what callers do without a key, or with the bootstrap key.
pub const DEFAULT_OWNER: &str = "default";

/// The `{org}` of model names, and the `organization_id` of jobs.
pub const ORGANIZATION: &str = "lorad";

/// Milliseconds since 1970, the clock of every `*_at_ms` column.
pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}
