//! The table `checkpoint`: listed ones stay, and of the others the newest one of a job.

use serde_json::Value;
use sqlx::SqliteConnection;

use super::{Error, Result, from_json, to_json};
use crate::types::checkpoint::Checkpoint;
use crate::types::ids::{AttemptId, CheckpointId, JobId};
use crate::types::job::Status;

struct Row {
    id: CheckpointId,
    job_id: JobId,
    attempt_id: AttemptId,
    step: i64,
    listed: bool,
    model_name: String,
    object_key: String,
    size_bytes: i64,
    sha256: String,
    metrics: String,
    created_at_ms: i64,
}

impl TryFrom<Row> for Checkpoint {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self> {
        let metrics: Value = from_json("checkpoint.metrics", &row.metrics)?;
        let Row {
            id, job_id, attempt_id, step, listed, model_name, object_key, size_bytes, sha256, created_at_ms, ..
        } = row;
        Ok(Self {
            id,
            job_id,
            attempt_id,
            step,
            listed,
            model_name,
            object_key,
            size_bytes,
            sha256,
            metrics,
            created_at_ms,
        })
    }
}

/// Adds a checkpoint; the job has none of that step.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, checkpoint: &Checkpoint) -> Result<()> {
    let metrics = to_json("checkpoint.metrics", &checkpoint.metrics)?;
    sqlx::query!(
        "insert into checkpoint (id, job_id, attempt_id, step, listed, model_name, object_key, size_bytes, sha256, metrics,
                                 created_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        checkpoint.id,
        checkpoint.job_id,
        checkpoint.attempt_id,
        checkpoint.step,
        checkpoint.listed,
        checkpoint.model_name,
        checkpoint.object_key,
        checkpoint.size_bytes,
        checkpoint.sha256,
        metrics,
        checkpoint.created_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The checkpoint of that step.
///
/// # Errors
/// The database failed.
pub async fn of_step(conn: &mut SqliteConnection, job_id: JobId, step: i64) -> Result<Option<Checkpoint>> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: CheckpointId", job_id as "job_id: JobId", attempt_id as "attempt_id: AttemptId", step,
                  listed as "listed: bool", model_name, object_key, size_bytes, sha256, metrics, created_at_ms
             from checkpoint where job_id = ? and step = ?"#,
        job_id,
        step,
    )
    .fetch_optional(conn)
    .await?;
    row.map(Checkpoint::try_from).transpose()
}

/// The checkpoint to resume from: the one of the highest step.
///
/// # Errors
/// The database failed.
pub async fn latest(conn: &mut SqliteConnection, job_id: JobId) -> Result<Option<Checkpoint>> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: CheckpointId", job_id as "job_id: JobId", attempt_id as "attempt_id: AttemptId", step,
                  listed as "listed: bool", model_name, object_key, size_bytes, sha256, metrics, created_at_ms
             from checkpoint where job_id = ? order by step desc limit 1"#,
        job_id,
    )
    .fetch_optional(conn)
    .await?;
    row.map(Checkpoint::try_from).transpose()
}

/// Makes a checkpoint that served resuming one that the API shows.
///
/// # Errors
/// The database failed.
pub async fn set_listed(conn: &mut SqliteConnection, id: CheckpointId, metrics: &Value) -> Result<()> {
    let metrics = to_json("checkpoint.metrics", metrics)?;
    sqlx::query!("update checkpoint set listed = 1, metrics = ? where id = ?", metrics, id).execute(conn).await?;
    Ok(())
}

/// The listed checkpoint of this owner that is a model of that name, with its job and how far that is.
///
/// # Errors
/// The database failed.
pub async fn by_model_name(
    conn: &mut SqliteConnection,
    owner: &str,
    name: &str,
) -> Result<Option<(CheckpointId, JobId, Status)>> {
    let found = sqlx::query!(
        r#"select checkpoint.id as "id: CheckpointId", job_id as "job_id: JobId", job.status as "status: Status"
             from checkpoint join job on job.id = checkpoint.job_id
            where job.owner = ? and checkpoint.model_name = ? and listed = 1"#,
        owner,
        name,
    )
    .fetch_optional(conn)
    .await?;
    Ok(found.map(|found| (found.id, found.job_id, found.status)))
}

/// Removes one checkpoint and tells where its bytes are.
///
/// # Errors
/// The database failed.
pub async fn delete(conn: &mut SqliteConnection, id: CheckpointId) -> Result<Vec<String>> {
    let keys =
        sqlx::query_scalar!("delete from checkpoint where id = ? returning object_key", id).fetch_all(conn).await?;
    Ok(keys)
}

/// Removes the rows of unlisted checkpoints of lower steps, and tells where their bytes are.
///
/// # Errors
/// The database failed.
pub async fn delete_superseded(conn: &mut SqliteConnection, job_id: JobId, step: i64) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        "delete from checkpoint where job_id = ? and step < ? and listed = 0 returning object_key",
        job_id,
        step,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}

/// Removes the rows of all unlisted checkpoints of a job that is done, and tells where their bytes are.
///
/// # Errors
/// The database failed.
pub async fn delete_unlisted(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<String>> {
    let keys =
        sqlx::query_scalar!("delete from checkpoint where job_id = ? and listed = 0 returning object_key", job_id)
            .fetch_all(conn)
            .await?;
    Ok(keys)
}

/// The listed checkpoints before `below_step`, newest first.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, job_id: JobId, below_step: i64, limit: i64) -> Result<Vec<Checkpoint>> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: CheckpointId", job_id as "job_id: JobId", attempt_id as "attempt_id: AttemptId", step,
                  listed as "listed: bool", model_name, object_key, size_bytes, sha256, metrics, created_at_ms
             from checkpoint where job_id = ? and listed = 1 and step < ? order by step desc limit ?"#,
        job_id,
        below_step,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter().map(Checkpoint::try_from).collect()
}

/// The step of a listed checkpoint of this job.
///
/// # Errors
/// The database failed.
pub async fn step_of(conn: &mut SqliteConnection, job_id: JobId, id: CheckpointId) -> Result<Option<i64>> {
    let step =
        sqlx::query_scalar!("select step from checkpoint where job_id = ? and id = ? and listed = 1", job_id, id)
            .fetch_optional(conn)
            .await?;
    Ok(step)
}

/// Whether the attempt left a checkpoint.
///
/// # Errors
/// The database failed.
pub async fn any_of_attempt(conn: &mut SqliteConnection, attempt_id: AttemptId) -> Result<bool> {
    let found = sqlx::query_scalar!(
        r#"select exists (select 1 from checkpoint where attempt_id = ?) as "found: bool""#,
        attempt_id
    )
    .fetch_one(conn)
    .await?;
    Ok(found)
}

/// Removes the rows of all checkpoints of a job, and tells where their bytes are.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!("delete from checkpoint where job_id = ? returning object_key", job_id)
        .fetch_all(conn)
        .await?;
    Ok(keys)
}

/// Removes up to `limit` rows of checkpoints whose job came to its end at `before_ms` or earlier, and tells where their bytes
/// are.
///
/// # Errors
/// The database failed.
pub async fn delete_older(conn: &mut SqliteConnection, before_ms: i64, limit: i64) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        "delete from checkpoint where id in (
           select checkpoint.id from checkpoint join job on job.id = checkpoint.job_id
            where job.status in ('succeeded', 'failed', 'cancelled') and job.finished_at_ms <= ?
            limit ?)
         returning object_key",
        before_ms,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}
