//! The table `attempt`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::attempt::{Attempt, AttemptOutcome, AttemptState, TaskKind};
use crate::types::ids::{AttemptId, JobId};

/// An attempt to be.
#[derive(Debug, Clone)]
pub struct NewAttempt {
    /// Its id.
    pub id: AttemptId,
    /// What it is to do.
    pub task: TaskKind,
    /// The device it holds.
    pub device: String,
    /// Hash of the token that its worker will show, in hexadecimal digits.
    pub token_sha256: String,
    /// Until when silence is no death.
    pub lease_expires_at_ms: i64,
}

/// Adds an attempt, unless the job has one that has not ended.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, job_id: JobId, attempt: &NewAttempt, now_ms: i64) -> Result<bool> {
    let done = sqlx::query!(
        "insert into attempt (id, job_id, task, number, state, device, token_sha256, lease_expires_at_ms, progress_at_ms, created_at_ms)
         values (?1, ?2, ?3, (select coalesce(max(number), 0) + 1 from attempt where job_id = ?2), 'starting', ?4, ?5, ?6, ?7, ?7)
         on conflict (job_id) where state <> 'ended' do nothing",
        attempt.id,
        job_id,
        attempt.task,
        attempt.device,
        attempt.token_sha256,
        attempt.lease_expires_at_ms,
        now_ms,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The attempt.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: AttemptId) -> Result<Option<Attempt>> {
    let attempt = sqlx::query_as!(
        Attempt,
        r#"select id as "id: AttemptId", job_id as "job_id: JobId", task as "task: TaskKind", number,
                  state as "state: AttemptState", device, pid, process_start_time, lease_expires_at_ms, progress_at_ms,
                  outcome as "outcome: AttemptOutcome", created_at_ms, ended_at_ms
             from attempt where id = ?"#,
        id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(attempt)
}

/// The attempt whose token has that hash.
///
/// # Errors
/// The database failed.
pub async fn by_token(conn: &mut SqliteConnection, token_sha256: &str) -> Result<Option<Attempt>> {
    let attempt = sqlx::query_as!(
        Attempt,
        r#"select id as "id: AttemptId", job_id as "job_id: JobId", task as "task: TaskKind", number,
                  state as "state: AttemptState", device, pid, process_start_time, lease_expires_at_ms, progress_at_ms,
                  outcome as "outcome: AttemptOutcome", created_at_ms, ended_at_ms
             from attempt where token_sha256 = ?"#,
        token_sha256,
    )
    .fetch_optional(conn)
    .await?;
    Ok(attempt)
}

/// Every attempt that has not ended, oldest first. By the index that has no others: all that ever were are many.
///
/// # Errors
/// The database failed.
pub async fn live(conn: &mut SqliteConnection) -> Result<Vec<Attempt>> {
    let attempts = sqlx::query_as!(
        Attempt,
        r#"select id as "id: AttemptId", job_id as "job_id: JobId", task as "task: TaskKind", number,
                  state as "state: AttemptState", device, pid, process_start_time, lease_expires_at_ms, progress_at_ms,
                  outcome as "outcome: AttemptOutcome", created_at_ms, ended_at_ms
             from attempt indexed by attempt_live where state <> 'ended' order by id"#,
    )
    .fetch_all(conn)
    .await?;
    Ok(attempts)
}

/// The attempts of a job, first to last.
///
/// # Errors
/// The database failed.
pub async fn of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<Attempt>> {
    let attempts = sqlx::query_as!(
        Attempt,
        r#"select id as "id: AttemptId", job_id as "job_id: JobId", task as "task: TaskKind", number,
                  state as "state: AttemptState", device, pid, process_start_time, lease_expires_at_ms, progress_at_ms,
                  outcome as "outcome: AttemptOutcome", created_at_ms, ended_at_ms
             from attempt where job_id = ? order by number"#,
        job_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(attempts)
}

/// Notes the process of an attempt, by which a later server can find it.
///
/// # Errors
/// The database failed.
pub async fn set_process(conn: &mut SqliteConnection, id: AttemptId, pid: i64, process_start_time: i64) -> Result<()> {
    sqlx::query!("update attempt set pid = ?, process_start_time = ? where id = ?", pid, process_start_time, id)
        .execute(conn)
        .await?;
    Ok(())
}

/// The worker has fetched its task.
///
/// # Errors
/// The database failed.
pub async fn set_running(conn: &mut SqliteConnection, id: AttemptId) -> Result<bool> {
    let done = sqlx::query!("update attempt set state = 'running' where id = ? and state = 'starting'", id)
        .execute(conn)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Silence is no death until then; `progress` is the worker's own count of what it got done. `false`: the attempt has ended.
///
/// # Errors
/// The database failed.
pub async fn renew_lease(
    conn: &mut SqliteConnection,
    id: AttemptId,
    lease_expires_at_ms: i64,
    progress: Option<i64>,
    now_ms: i64,
) -> Result<bool> {
    let done = sqlx::query!(
        "update attempt
            set lease_expires_at_ms = ?2,
                progress_at_ms = case when ?3 > progress then ?4 else progress_at_ms end,
                progress = max(progress, coalesce(?3, 0))
          where id = ?1 and state <> 'ended'",
        id,
        lease_expires_at_ms,
        progress,
        now_ms,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Tells the live attempt of a job to stop; `None`: it has none.
///
/// # Errors
/// The database failed.
pub async fn set_stopping(conn: &mut SqliteConnection, job_id: JobId) -> Result<Option<AttemptId>> {
    let id = sqlx::query_scalar!(
        r#"update attempt set state = 'stopping' where job_id = ? and state <> 'ended' returning id as "id!: AttemptId""#,
        job_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(id)
}

/// Tells live attempts to stop, those that train with a checkpoint; of one job, or of all.
///
/// # Errors
/// The database failed.
pub async fn set_pausing(conn: &mut SqliteConnection, job_id: Option<JobId>) -> Result<()> {
    sqlx::query!(
        "update attempt set state = case task when 'train' then 'pausing' else 'stopping' end
          where (?1 is null or job_id = ?1) and state in ('starting', 'running')",
        job_id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Ends an attempt; `false`: it had ended before, and keeps its outcome.
///
/// # Errors
/// The database failed.
pub async fn end(conn: &mut SqliteConnection, id: AttemptId, outcome: AttemptOutcome, now_ms: i64) -> Result<bool> {
    let done = sqlx::query!(
        "update attempt set state = 'ended', outcome = ?, ended_at_ms = ? where id = ? and state <> 'ended'",
        outcome,
        now_ms,
        id,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends every attempt that lives, as one whose server ended.
///
/// # Errors
/// The database failed.
pub async fn end_all(conn: &mut SqliteConnection, now_ms: i64) -> Result<()> {
    sqlx::query!(
        "update attempt set state = 'ended', outcome = 'server_ended', ended_at_ms = ? where state <> 'ended'",
        now_ms
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes the attempts of a job, after everything that names them.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<()> {
    sqlx::query!("delete from attempt where job_id = ?", job_id).execute(conn).await?;
    Ok(())
}
