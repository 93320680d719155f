//! A job is not wanted any more.

use super::{Error, Jobs, Result, find_job};
use crate::store;
use crate::types::event::NewEvent;
use crate::types::ids::JobId;
use crate::types::job::{Job, Status};
use crate::types::now_ms;

/// Cancels this owner's job: its state changes at once, its worker is told to stop. Cancelling twice is fine.
///
/// # Errors
/// No such job, a job that has come to another end.
pub async fn cancel(jobs: &Jobs, owner: &str, id: JobId) -> Result<Job> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let mut job = find_job(&mut tx, owner, id).await?;
    if job.status == Status::Cancelled {
        return Ok(job);
    }
    if !job.status.may_become(Status::Cancelled) {
        return Err(Error::JobHasEnded { job: id, done: "cancelled", status: job.status });
    }
    store::job::transition(&mut tx, id, job.status, Status::Cancelled, now_ms).await?;
    store::event::append(&mut tx, id, &NewEvent::cancelled(), now_ms).await?;
    store::attempt::set_stopping(&mut tx, id).await?;
    let keys = store::checkpoint::delete_unlisted(&mut tx, id).await?;
    tx.commit().await?;
    tracing::info!(job.id = %id, "job cancelled");
    jobs.tell_readers();
    jobs.tell_scheduler();
    jobs.remove_objects(keys).await;
    job.status = Status::Cancelled;
    job.finished_at_ms = Some(now_ms);
    Ok(job)
}
