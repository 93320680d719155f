//! The table `export`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::artifact::{ArtifactRequest, ArtifactType, Quantization};
use crate::types::export::{Export, ExportStatus};
use crate::types::ids::{ArtifactId, AttemptId, JobId};

/// Adds an export that waits.
///
/// # Errors
/// The database failed.
pub async fn insert(
    conn: &mut SqliteConnection,
    id: ArtifactId,
    job_id: JobId,
    request: &ArtifactRequest,
    now_ms: i64,
) -> Result<()> {
    sqlx::query!(
        "insert into export (id, job_id, type, quantization, status, created_at_ms) values (?, ?, ?, ?, 'queued', ?)",
        id,
        job_id,
        request.kind,
        request.quantization,
        now_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The export, if this owner has it.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: ArtifactId, owner: &str) -> Result<Option<Export>> {
    let export = sqlx::query_as!(
        Export,
        r#"select export.id as "id: ArtifactId", job_id as "job_id: JobId", type as "kind: ArtifactType",
                  quantization as "quantization: Quantization", export.status as "status: ExportStatus",
                  crashes, export.error_code, export.error_message,
                  export.created_at_ms
             from export join job on job.id = export.job_id where export.id = ? and job.owner = ?"#,
        id,
        owner,
    )
    .fetch_optional(conn)
    .await?;
    Ok(export)
}

/// The exports of a job that are not made, oldest first.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<Export>> {
    let exports = sqlx::query_as!(
        Export,
        r#"select id as "id: ArtifactId", job_id as "job_id: JobId", type as "kind: ArtifactType",
                  quantization as "quantization: Quantization", status as "status: ExportStatus",
                  crashes, error_code, error_message, created_at_ms
             from export where job_id = ? order by id"#,
        job_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(exports)
}

/// The next export to make whose job no attempt works for: one that was interrupted before one that waits, then the oldest.
///
/// # Errors
/// The database failed.
pub async fn next(conn: &mut SqliteConnection) -> Result<Option<Export>> {
    let export = sqlx::query_as!(
        Export,
        r#"select id as "id: ArtifactId", job_id as "job_id: JobId", type as "kind: ArtifactType",
                  quantization as "quantization: Quantization", status as "status: ExportStatus",
                  crashes, error_code, error_message, created_at_ms
             from export
            where status in ('running', 'queued')
              and not exists (select 1 from attempt where attempt.job_id = export.job_id and attempt.state <> 'ended')
            order by status desc, id limit 1"#,
    )
    .fetch_optional(conn)
    .await?;
    Ok(export)
}

/// The export that an attempt makes.
///
/// # Errors
/// The database failed.
pub async fn of_attempt(conn: &mut SqliteConnection, attempt_id: AttemptId) -> Result<Option<Export>> {
    let export = sqlx::query_as!(
        Export,
        r#"select id as "id: ArtifactId", job_id as "job_id: JobId", type as "kind: ArtifactType",
                  quantization as "quantization: Quantization", status as "status: ExportStatus",
                  crashes, error_code, error_message, created_at_ms
             from export where attempt_id = ? and status = 'running'"#,
        attempt_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(export)
}

/// An attempt makes it from now on.
///
/// # Errors
/// The database failed.
pub async fn set_running(conn: &mut SqliteConnection, id: ArtifactId, attempt_id: AttemptId) -> Result<()> {
    sqlx::query!("update export set status = 'running', attempt_id = ? where id = ?", attempt_id, id)
        .execute(conn)
        .await?;
    Ok(())
}

/// It waits, for the first time after it failed or once more after an attempt that did not make it.
///
/// # Errors
/// The database failed.
pub async fn set_queued(conn: &mut SqliteConnection, id: ArtifactId, crashes: i64) -> Result<()> {
    sqlx::query!(
        "update export set status = 'queued', crashes = ?, error_code = null, error_message = null where id = ?",
        crashes,
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// It cannot be made.
///
/// # Errors
/// The database failed.
pub async fn set_failed(conn: &mut SqliteConnection, id: ArtifactId, code: &str, message: &str) -> Result<()> {
    sqlx::query!(
        "update export set status = 'failed', error_code = ?, error_message = ? where id = ?",
        code,
        message,
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes an export: its artifact takes its place.
///
/// # Errors
/// The database failed.
pub async fn delete(conn: &mut SqliteConnection, id: ArtifactId) -> Result<()> {
    sqlx::query!("delete from export where id = ?", id).execute(conn).await?;
    Ok(())
}

/// Removes the exports of a job.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<()> {
    sqlx::query!("delete from export where job_id = ?", job_id).execute(conn).await?;
    Ok(())
}
