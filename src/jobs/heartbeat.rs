//! A worker lives.

use std::time::Duration;

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::attempt::Attempt;
use crate::types::now_ms;
use crate::types::worker_protocol::{Action, Heartbeat};

/// Renews the lease of an attempt and tells its worker whether to go on.
///
/// # Errors
/// The attempt has ended.
pub async fn heartbeat(jobs: &Jobs, attempt: &Attempt, heartbeat: &Heartbeat, lease: Duration) -> Result<Action> {
    let now_ms = now_ms();
    let expires_at_ms = now_ms + i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 2);
    let progress = heartbeat.progress.map(|count| i64::try_from(count).unwrap_or(i64::MAX));
    let mut tx = jobs.store.begin_write().await?;
    if !store::attempt::renew_lease(&mut tx, attempt.id, expires_at_ms, progress, now_ms).await? {
        return Err(Error::AttemptEnded);
    }
    let state = store::attempt::find(&mut tx, attempt.id).await?.map(|attempt| attempt.state);
    tx.commit().await?;
    Ok(state.map_or(Action::Stop, Action::of))
}
