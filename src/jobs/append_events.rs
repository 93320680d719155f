//! A worker's news becomes part of the job's story; told twice, it stands there once.

use sqlx::SqliteConnection;

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::attempt::{Attempt, AttemptState};
use crate::types::event::NewEvent;
use crate::types::ids::AttemptId;
use crate::types::job::{Job, Status};
use crate::types::now_ms;
use crate::types::worker_protocol::{Action, Events, WorkerEvent};

/// Appends a worker's sentences and figures, each only if it is new, and tells it whether to go on.
///
/// # Errors
/// The attempt has ended, or its job has.
pub async fn append_events(jobs: &Jobs, attempt: &Attempt, news: &Events) -> Result<Action> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let (job, state) = reporting_job(&mut tx, attempt.id).await?;
    append_worker_events(&mut tx, &job, attempt.id, &news.events, now_ms).await?;
    for metric in &news.metrics {
        if store::metric::insert(&mut tx, job.id, metric, now_ms).await? {
            store::event::append(&mut tx, job.id, &NewEvent::step(metric), now_ms).await?;
        }
    }
    if let (None, Some(metric)) = (job.total_steps, news.metrics.first()) {
        store::job::set_total_steps(&mut tx, job.id, metric.total_steps).await?;
    }
    tx.commit().await?;
    jobs.tell_readers();
    Ok(Action::of(state))
}

/// Appends a worker's sentences, each only if it is new.
pub(super) async fn append_worker_events(
    conn: &mut SqliteConnection,
    job: &Job,
    attempt_id: AttemptId,
    events: &[WorkerEvent],
    now_ms: i64,
) -> Result<()> {
    for WorkerEvent { worker_seq, level, kind, message, data } in events {
        let event = NewEvent { level: *level, kind: *kind, message: message.clone(), data: data.clone() };
        store::event::append_from_worker(conn, job.id, &event, (attempt_id, *worker_seq), now_ms).await?;
    }
    Ok(())
}

/// The job of an attempt that is wanted to work, looked at inside the transaction that writes down what it did.
pub(super) async fn working_job(conn: &mut SqliteConnection, attempt_id: AttemptId) -> Result<Job> {
    let (job, state) = reporting_job(conn, attempt_id).await?;
    match state {
        AttemptState::Starting | AttemptState::Running => Ok(job),
        AttemptState::Pausing | AttemptState::Stopping | AttemptState::Ended => Err(Error::AttemptEnded),
    }
}

/// The job of an attempt whose word still counts, and how far the attempt is. The steps that a worker did before it learned
/// that its job is paused count, also if the job waits in the queue again.
pub(super) async fn reporting_job(conn: &mut SqliteConnection, attempt_id: AttemptId) -> Result<(Job, AttemptState)> {
    let Some(attempt) = store::attempt::find(conn, attempt_id).await? else { return Err(Error::AttemptEnded) };
    let job = store::job::get(conn, attempt.job_id).await?.ok_or(Error::AttemptEnded)?;
    let counts = match attempt.state {
        AttemptState::Starting | AttemptState::Running => {
            matches!(job.status, Status::ValidatingFiles | Status::Running)
        }
        AttemptState::Pausing => !job.status.is_final(),
        AttemptState::Stopping | AttemptState::Ended => false,
    };
    if counts { Ok((job, attempt.state)) } else { Err(Error::AttemptEnded) }
}
