//! A job is put aside, to be taken up again where it was.

use super::{Error, Jobs, Result, find_job};
use crate::store;
use crate::types::event::NewEvent;
use crate::types::ids::JobId;
use crate::types::job::{Job, Status};
use crate::types::now_ms;

/// Pauses this owner's job: its state changes at once; a worker that trains ends its step and hands in a checkpoint, any other is
/// stopped. Pausing twice is fine.
///
/// # Errors
/// No such job, a job that has come to its end.
pub async fn pause(jobs: &Jobs, owner: &str, id: JobId) -> Result<Job> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let mut job = find_job(&mut tx, owner, id).await?;
    if job.status == Status::Paused {
        return Ok(job);
    }
    if !job.status.may_become(Status::Paused) {
        return Err(Error::JobHasEnded { job: id, done: "paused", status: job.status });
    }
    store::job::transition(&mut tx, id, job.status, Status::Paused, now_ms).await?;
    store::event::append(&mut tx, id, &NewEvent::paused(), now_ms).await?;
    store::attempt::set_pausing(&mut tx, Some(id)).await?;
    tx.commit().await?;
    tracing::info!(job.id = %id, "job paused");
    jobs.tell_readers();
    jobs.tell_scheduler();
    job.status = Status::Paused;
    Ok(job)
}
