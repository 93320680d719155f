//! A paused job is taken up again.

use super::{Error, Jobs, Result, find_job};
use crate::store;
use crate::types::event::NewEvent;
use crate::types::ids::JobId;
use crate::types::job::{Job, Status};
use crate::types::now_ms;

/// Puts this owner's paused job back into the queue, from which it goes on at its last checkpoint, or to the reading of its data
/// set if that was not done. A job that is not paused and has not ended stays as it is.
///
/// # Errors
/// No such job, a job that has come to its end.
pub async fn resume(jobs: &Jobs, owner: &str, id: JobId) -> Result<Job> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let mut job = find_job(&mut tx, owner, id).await?;
    if job.status.is_final() {
        return Err(Error::JobHasEnded { job: id, done: "resumed", status: job.status });
    }
    if job.status != Status::Paused {
        return Ok(job);
    }
    let next = if job.validated_at_ms.is_some() { Status::Queued } else { Status::ValidatingFiles };
    store::job::transition(&mut tx, id, Status::Paused, next, now_ms).await?;
    store::event::append(&mut tx, id, &NewEvent::resumed(next), now_ms).await?;
    tx.commit().await?;
    tracing::info!(job.id = %id, "job resumed");
    jobs.tell_readers();
    jobs.tell_scheduler();
    job.status = next;
    Ok(job)
}
