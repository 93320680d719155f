//! An attempt ends: by its worker's last word, or because the worker is gone.

use std::fmt::Write;

use bytes::Bytes;
use sqlx::SqliteConnection;

use super::append_events::append_worker_events;
use super::{Error, Jobs, Result, exports};
use crate::storage::file_key;
use crate::store;
use crate::types::attempt::{Attempt, AttemptOutcome, AttemptState, TaskKind};
use crate::types::event::NewEvent;
use crate::types::file::{File, FileStatus, Purpose};
use crate::types::ids::{AttemptId, FileId, JobId};
use crate::types::job::{Job, JobError, Status};
use crate::types::metric::Metric;
use crate::types::now_ms;
use crate::types::worker_protocol::{Finish, WorkerEvent};

/// Attempts in a row that may end badly without a new checkpoint before the job fails.
pub const MOST_ATTEMPTS_WITHOUT_PROGRESS: i64 = 3;

/// Takes a worker's last word: the attempt ends, and its job goes on to the next state, in one transaction.
///
/// # Errors
/// The attempt had ended before, a training that did not hand in what was asked for.
pub async fn finish_attempt(jobs: &Jobs, attempt: &Attempt, finish: Finish) -> Result<()> {
    match (finish, attempt.task) {
        (Finish::Succeeded { events, .. }, TaskKind::Validate) => validated(jobs, attempt, &events).await,
        (Finish::Succeeded { trained_tokens, events }, TaskKind::Train) => {
            trained(jobs, attempt, trained_tokens, &events).await
        }
        (finish, TaskKind::Export) => exports::finish(jobs, attempt, finish).await,
        (Finish::Failed { code, message, param, events }, _) => {
            failed(jobs, attempt, &JobError { code, message, param }, &events).await
        }
        (Finish::Stopped, _) => stopped(jobs, attempt).await,
    }
}

/// Ends an attempt whose worker is gone without a word. `Crashed` counts against the job, with `detail` (the last lines of
/// the worker's log) as the reason if that was once too often; `Stopped`, `ServerEnded` and `NotStarted` do not. `false`: it
/// had ended before.
///
/// # Errors
/// The database failed.
pub async fn attempt_lost(jobs: &Jobs, id: AttemptId, outcome: AttemptOutcome, detail: &str) -> Result<bool> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let Some(attempt) = store::attempt::find(&mut tx, id).await? else { return Ok(false) };
    if !store::attempt::end(&mut tx, id, outcome, now_ms).await? {
        return Ok(false);
    }
    let mut keys = Vec::new();
    if attempt.task == TaskKind::Export {
        exports::lost(&mut tx, id, outcome, detail).await?;
    }
    let job = match store::job::get(&mut tx, attempt.job_id).await {
        Err(store::Error::UnreadableJob { id, status, source }) => {
            if !status.is_final() {
                keys = fail_unreadable(&mut tx, id, status, &source, now_ms).await?;
            }
            None
        }
        job => job?,
    };
    if let Some(job) = job.filter(|job| !job.status.is_final() && outcome == AttemptOutcome::Crashed) {
        let left_checkpoint = store::checkpoint::any_of_attempt(&mut tx, id).await?;
        let count = if left_checkpoint { 0 } else { job.attempts_without_progress + 1 };
        store::job::set_attempts_without_progress(&mut tx, job.id, count).await?;
        if count >= MOST_ATTEMPTS_WITHOUT_PROGRESS {
            let message =
                format!("the worker ended unexpectedly {count} times in a row without a new checkpoint: {detail}");
            let error = JobError { code: "worker_crashed".into(), message, param: None };
            keys = fail(&mut tx, job.id, job.status, &error, now_ms).await?;
        }
    }
    tx.commit().await?;
    tracing::warn!(job.id = %attempt.job_id, attempt = %id, %outcome, "attempt lost");
    jobs.tell_readers();
    jobs.tell_scheduler();
    jobs.remove_objects(keys).await;
    Ok(true)
}

async fn validated(jobs: &Jobs, attempt: &Attempt, events: &[WorkerEvent]) -> Result<()> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let job = end(&mut tx, attempt, AttemptOutcome::Succeeded, now_ms).await?;
    append_worker_events(&mut tx, &job, attempt.id, events, now_ms).await?;
    if !store::job::transition(&mut tx, job.id, Status::ValidatingFiles, Status::Queued, now_ms).await? {
        return Err(Error::AttemptEnded);
    }
    store::job::set_attempts_without_progress(&mut tx, job.id, 0).await?;
    store::event::append(&mut tx, job.id, &NewEvent::validated(), now_ms).await?;
    tx.commit().await?;
    tracing::info!(job.id = %job.id, attempt = %attempt.id, "training file validated");
    jobs.tell_readers();
    jobs.tell_scheduler();
    Ok(())
}

async fn trained(jobs: &Jobs, attempt: &Attempt, trained_tokens: Option<i64>, events: &[WorkerEvent]) -> Result<()> {
    let metrics = store::metric::list(&mut *jobs.store.read().await?, attempt.job_id).await?;
    let id = FileId::new();
    let object_key = file_key(&id.to_string());
    let stored = jobs.storage.put_bytes(&object_key, Bytes::from(result_csv(&metrics))).await?;
    let trained_tokens = trained_tokens.or(metrics.last().map(|metric| metric.trained_tokens));
    let mut file = File {
        id,
        owner: String::new(),
        filename: "step_metrics.csv".into(),
        purpose: Purpose::FineTuneResults,
        size_bytes: i64::try_from(stored.size_bytes).unwrap_or(i64::MAX),
        sha256: stored.sha256,
        object_key: object_key.clone(),
        status: FileStatus::Processed,
        created_at_ms: now_ms(),
        expires_at_ms: None,
    };
    match succeed(jobs, attempt, &mut file, trained_tokens, events).await {
        Ok(keys) => {
            tracing::info!(job.id = %attempt.job_id, attempt = %attempt.id, "job succeeded");
            jobs.tell_readers();
            jobs.tell_scheduler();
            jobs.remove_objects(keys).await;
            Ok(())
        }
        Err(error) => {
            jobs.remove_objects([object_key]).await;
            Err(error)
        }
    }
}

async fn succeed(
    jobs: &Jobs,
    attempt: &Attempt,
    file: &mut File,
    trained_tokens: Option<i64>,
    events: &[WorkerEvent],
) -> Result<Vec<String>> {
    let now_ms = file.created_at_ms;
    let mut tx = jobs.store.begin_write().await?;
    let job = end(&mut tx, attempt, AttemptOutcome::Succeeded, now_ms).await?;
    let made = store::artifact::list(&mut tx, job.id).await?;
    for request in &job.spec.artifacts {
        if !made.iter().any(|made| made.kind == request.kind && made.quantization == request.quantization) {
            return Err(Error::Worker(format!("the artifact of type {} was not handed in", request.kind)));
        }
    }
    append_worker_events(&mut tx, &job, attempt.id, events, now_ms).await?;
    if !store::job::transition(&mut tx, job.id, Status::Running, Status::Succeeded, now_ms).await? {
        return Err(Error::AttemptEnded);
    }
    file.owner.clone_from(&job.owner);
    store::file::insert(&mut tx, file).await?;
    store::job::set_result(&mut tx, job.id, file.id, trained_tokens).await?;
    store::event::append(&mut tx, job.id, &NewEvent::model_created(&job.model_name), now_ms).await?;
    store::event::append(&mut tx, job.id, &NewEvent::succeeded(), now_ms).await?;
    let keys = store::checkpoint::delete_unlisted(&mut tx, job.id).await?;
    tx.commit().await?;
    Ok(keys)
}

async fn failed(jobs: &Jobs, attempt: &Attempt, error: &JobError, events: &[WorkerEvent]) -> Result<()> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let job = end(&mut tx, attempt, AttemptOutcome::Failed, now_ms).await?;
    append_worker_events(&mut tx, &job, attempt.id, events, now_ms).await?;
    let keys = fail(&mut tx, job.id, job.status, error, now_ms).await?;
    tx.commit().await?;
    tracing::info!(job.id = %job.id, attempt = %attempt.id, code = error.code, "job failed");
    jobs.tell_readers();
    jobs.tell_scheduler();
    jobs.remove_objects(keys).await;
    Ok(())
}

/// The worker has stopped, so its device is free; what becomes of the job was decided by whoever told it to stop.
async fn stopped(jobs: &Jobs, attempt: &Attempt) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    if !store::attempt::end(&mut tx, attempt.id, AttemptOutcome::Stopped, now_ms()).await? {
        return Err(Error::AttemptEnded);
    }
    tx.commit().await?;
    tracing::info!(job.id = %attempt.job_id, attempt = %attempt.id, "attempt stopped");
    jobs.tell_scheduler();
    Ok(())
}

/// Ends an attempt whose word still counts, and gives its job.
async fn end(conn: &mut SqliteConnection, attempt: &Attempt, outcome: AttemptOutcome, now_ms: i64) -> Result<Job> {
    let current = store::attempt::find(conn, attempt.id).await?;
    if current.is_some_and(|current| current.state == AttemptState::Stopping) {
        return Err(Error::AttemptEnded);
    }
    if !store::attempt::end(conn, attempt.id, outcome, now_ms).await? {
        return Err(Error::AttemptEnded);
    }
    let job = store::job::get(conn, attempt.job_id).await?;
    job.filter(|job| !job.status.is_final()).ok_or(Error::AttemptEnded)
}

/// Fails a job that another build wrote in a way that this one cannot read, and gives the objects that it does not need now.
pub(super) async fn fail_unreadable(
    conn: &mut SqliteConnection,
    id: JobId,
    status: Status,
    source: &serde_json::Error,
    now_ms: i64,
) -> Result<Vec<String>> {
    tracing::error!(job.id = %id, error = %source, "a job cannot be read and fails");
    let message = format!("this version of the server cannot read the job's specification: {source}");
    fail(conn, id, status, &JobError { code: "unreadable_job".into(), message, param: None }, now_ms).await
}

async fn fail(
    conn: &mut SqliteConnection,
    id: JobId,
    status: Status,
    error: &JobError,
    now_ms: i64,
) -> Result<Vec<String>> {
    if !store::job::transition(conn, id, status, Status::Failed, now_ms).await? {
        return Err(Error::AttemptEnded);
    }
    store::job::set_error(conn, id, error).await?;
    store::event::append(conn, id, &NewEvent::failed(&error.message), now_ms).await?;
    Ok(store::checkpoint::delete_unlisted(conn, id).await?)
}

/// The metrics of every step under OpenAI's header; where no validation ran its columns stay empty.
fn result_csv(metrics: &[Metric]) -> String {
    let mut csv = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_owned();
    let cell = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    for metric in metrics {
        let Metric { step, train_loss, train_mean_token_accuracy, valid_loss, valid_mean_token_accuracy, .. } = metric;
        let (loss, accuracy) = (cell(*valid_loss), cell(*valid_mean_token_accuracy));
        writeln!(csv, "{step},{train_loss},{train_mean_token_accuracy},{loss},{accuracy}")
            .expect("a String takes everything");
    }
    csv
}
