//! The table `job_metric`: one row a step, whoever trained it how often.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::ids::JobId;
use crate::types::metric::Metric;

/// Adds a step's figures, unless they are there already.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, job_id: JobId, metric: &Metric, now_ms: i64) -> Result<bool> {
    let done = sqlx::query!(
        "insert into job_metric (job_id, step, total_steps, epoch, train_loss, train_mean_token_accuracy, learning_rate,
                                 grad_norm, trained_tokens, step_ms, valid_loss, valid_mean_token_accuracy, created_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
         on conflict (job_id, step) do nothing",
        job_id,
        metric.step,
        metric.total_steps,
        metric.epoch,
        metric.train_loss,
        metric.train_mean_token_accuracy,
        metric.learning_rate,
        metric.grad_norm,
        metric.trained_tokens,
        metric.step_ms,
        metric.valid_loss,
        metric.valid_mean_token_accuracy,
        now_ms,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The figures of one step.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, job_id: JobId, step: i64) -> Result<Option<Metric>> {
    let metric = sqlx::query_as!(
        Metric,
        "select step, total_steps, epoch, train_loss, train_mean_token_accuracy, learning_rate, grad_norm, trained_tokens, step_ms,
                valid_loss, valid_mean_token_accuracy
           from job_metric where job_id = ? and step = ?",
        job_id,
        step,
    )
    .fetch_optional(conn)
    .await?;
    Ok(metric)
}

/// The figures of a step, and when they were written.
#[derive(Debug, Clone, PartialEq)]
pub struct Dated {
    /// The figures.
    pub metric: Metric,
    /// When they were written.
    pub created_at_ms: i64,
}

/// The steps after `step`, in order.
///
/// # Errors
/// The database failed.
pub async fn newer_than(conn: &mut SqliteConnection, job_id: JobId, step: i64, limit: i64) -> Result<Vec<Dated>> {
    let rows = sqlx::query!(
        "select step, total_steps, epoch, train_loss, train_mean_token_accuracy, learning_rate, grad_norm, trained_tokens, step_ms,
                valid_loss, valid_mean_token_accuracy, created_at_ms
           from job_metric where job_id = ? and step > ? order by step limit ?",
        job_id,
        step,
        limit,
    )
    .fetch_all(conn)
    .await?;
    let dated = rows.into_iter().map(|row| Dated {
        metric: Metric {
            step: row.step,
            total_steps: row.total_steps,
            epoch: row.epoch,
            train_loss: row.train_loss,
            train_mean_token_accuracy: row.train_mean_token_accuracy,
            learning_rate: row.learning_rate,
            grad_norm: row.grad_norm,
            trained_tokens: row.trained_tokens,
            step_ms: row.step_ms,
            valid_loss: row.valid_loss,
            valid_mean_token_accuracy: row.valid_mean_token_accuracy,
        },
        created_at_ms: row.created_at_ms,
    });
    Ok(dated.collect())
}

/// A step's losses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// The step.
    pub step: i64,
    /// Mean loss of its trained tokens.
    pub train_loss: f64,
    /// Mean loss of the whole validation file, where it was evaluated.
    pub valid_loss: Option<f64>,
}

/// The losses of every step, in order.
///
/// # Errors
/// The database failed.
pub async fn losses(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<Losses>> {
    let losses = sqlx::query_as!(
        Losses,
        "select step, train_loss, valid_loss from job_metric where job_id = ? order by step",
        job_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(losses)
}

/// The figures of every step, in order.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<Metric>> {
    let metrics = sqlx::query_as!(
        Metric,
        "select step, total_steps, epoch, train_loss, train_mean_token_accuracy, learning_rate, grad_norm, trained_tokens, step_ms,
                valid_loss, valid_mean_token_accuracy
           from job_metric where job_id = ? order by step",
        job_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(metrics)
}

/// When a training will have done all its steps, in milliseconds since 1970, if they go on as fast as the last ones from now or from
/// the last one, whichever is later; `None`: no step is done yet.
///
/// # Errors
/// The database failed.
pub async fn expected_end_ms(conn: &mut SqliteConnection, job_id: JobId, now_ms: i64) -> Result<Option<i64>> {
    let end = sqlx::query_scalar!(
        r#"select cast(max(max(created_at_ms), ?2 - cast(avg(step_ms) as integer))
                      + (max(total_steps) - max(step)) * avg(step_ms) as integer) as "end?: i64"
             from (select step, total_steps, step_ms, created_at_ms from job_metric where job_id = ?1
                    order by step desc limit 20)"#,
        job_id,
        now_ms,
    )
    .fetch_one(conn)
    .await?;
    Ok(end)
}

/// Removes the figures of a job.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<()> {
    sqlx::query!("delete from job_metric where job_id = ?", job_id).execute(conn).await?;
    Ok(())
}
