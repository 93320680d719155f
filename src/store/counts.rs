//! What `/metrics` tells of the whole database: how many, how long, how much.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::attempt::TaskKind;
use crate::types::job::Status;

/// Number of jobs in each state that some job is in.
///
/// # Errors
/// The database failed.
pub async fn jobs(conn: &mut SqliteConnection) -> Result<Vec<(Status, i64)>> {
    let rows = sqlx::query!(r#"select status as "status: Status", count(*) as count from job group by status"#)
        .fetch_all(conn)
        .await?;
    Ok(rows.into_iter().map(|row| (row.status, row.count)).collect())
}

/// Since when the job waits for a device that has waited longest.
///
/// # Errors
/// The database failed.
pub async fn oldest_queued_at_ms(conn: &mut SqliteConnection) -> Result<Option<i64>> {
    let at_ms = sqlx::query_scalar!(
        r#"select min(coalesce(validated_at_ms, created_at_ms)) as "at_ms: i64" from job where status = 'queued'"#
    )
    .fetch_one(conn)
    .await?;
    Ok(at_ms)
}

/// Number of attempts that have not ended, of each task that some attempt has.
///
/// # Errors
/// The database failed.
pub async fn live_attempts(conn: &mut SqliteConnection) -> Result<Vec<(TaskKind, i64)>> {
    let rows = sqlx::query!(
        r#"select task as "task: TaskKind", count(*) as count from attempt where state <> 'ended' group by task"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.task, row.count)).collect())
}

/// The devices that live attempts hold; a validation holds none.
///
/// # Errors
/// The database failed.
pub async fn held_devices(conn: &mut SqliteConnection) -> Result<Vec<String>> {
    let devices = sqlx::query_scalar!(
        "select distinct device from attempt indexed by attempt_live where state <> 'ended' and task <> 'validate'
          order by device"
    )
    .fetch_all(conn)
    .await?;
    Ok(devices)
}

/// Trained tokens of all jobs, those of running ones up to their last step.
///
/// # Errors
/// The database failed.
pub async fn trained_tokens(conn: &mut SqliteConnection) -> Result<i64> {
    let tokens = sqlx::query_scalar!(
        r#"select coalesce(sum((select trained_tokens from job_metric where job_metric.job_id = job.id
                                 order by step desc limit 1)), 0) as "tokens!: i64"
             from job"#
    )
    .fetch_one(conn)
    .await?;
    Ok(tokens)
}

/// The time that the last step of each job took which trains, by the name of its device.
///
/// # Errors
/// The database failed.
pub async fn last_step_ms(conn: &mut SqliteConnection) -> Result<Vec<(String, i64)>> {
    let rows = sqlx::query!(
        "select attempt.device, step_ms from attempt indexed by attempt_live join job_metric on job_metric.job_id = attempt.job_id
          where state <> 'ended' and task = 'train'
            and step = (select max(last.step) from job_metric as last where last.job_id = attempt.job_id)
          order by attempt.device"
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.device, row.step_ms)).collect())
}

/// Bytes of the objects that rows name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Uploads and result files.
    pub files: i64,
    /// Checkpoints, listed or not.
    pub checkpoints: i64,
    /// Artifacts.
    pub artifacts: i64,
    /// Parts of uploads that are not completed.
    pub upload_parts: i64,
}

/// How much is stored.
///
/// # Errors
/// The database failed.
pub async fn stored_bytes(conn: &mut SqliteConnection) -> Result<Stored> {
    let stored = sqlx::query_as!(
        Stored,
        r#"select (select coalesce(sum(size_bytes), 0) from file) as "files!: i64",
                  (select coalesce(sum(size_bytes), 0) from checkpoint) as "checkpoints!: i64",
                  (select coalesce(sum(size_bytes), 0) from artifact) as "artifacts!: i64",
                  (select coalesce(sum(size_bytes), 0) from upload_part) as "upload_parts!: i64""#
    )
    .fetch_one(conn)
    .await?;
    Ok(stored)
}
