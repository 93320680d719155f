//! The table `artifact`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::artifact::{Artifact, ArtifactType, Parity, Quantization};
use crate::types::ids::{ArtifactId, AttemptId, JobId};

/// Adds an artifact in the place of an earlier one of the same kind, and tells where the bytes of that one are.
///
/// # Errors
/// The database failed.
pub async fn replace(conn: &mut SqliteConnection, artifact: &Artifact) -> Result<Option<String>> {
    let replaced = sqlx::query_scalar!(
        "delete from artifact where job_id = ? and type = ? and quantization is ? returning object_key",
        artifact.job_id,
        artifact.kind,
        artifact.quantization,
    )
    .fetch_optional(&mut *conn)
    .await?;
    sqlx::query!(
        "insert into artifact (id, job_id, attempt_id, type, quantization, filename, object_key, size_bytes, sha256, parity,
                               created_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        artifact.id,
        artifact.job_id,
        artifact.attempt_id,
        artifact.kind,
        artifact.quantization,
        artifact.filename,
        artifact.object_key,
        artifact.size_bytes,
        artifact.sha256,
        artifact.parity,
        artifact.created_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(replaced)
}

/// The artifacts of a job, in the order in which they were made.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<Artifact>> {
    let artifacts = sqlx::query_as!(
        Artifact,
        r#"select id as "id: ArtifactId", job_id as "job_id: JobId", attempt_id as "attempt_id: AttemptId",
                  type as "kind: ArtifactType", quantization as "quantization: Quantization", filename, object_key,
                  size_bytes, sha256, parity as "parity: Parity", created_at_ms
             from artifact where job_id = ? order by id"#,
        job_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(artifacts)
}

/// The artifact, if this owner has it.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: ArtifactId, owner: &str) -> Result<Option<Artifact>> {
    let artifact = sqlx::query_as!(
        Artifact,
        r#"select artifact.id as "id: ArtifactId", job_id as "job_id: JobId", attempt_id as "attempt_id: AttemptId",
                  type as "kind: ArtifactType", quantization as "quantization: Quantization", filename, object_key,
                  size_bytes, sha256, parity as "parity: Parity", artifact.created_at_ms
             from artifact join job on job.id = artifact.job_id
            where artifact.id = ? and job.owner = ?"#,
        id,
        owner,
    )
    .fetch_optional(conn)
    .await?;
    Ok(artifact)
}

/// Removes the rows of all artifacts of a job, and tells where their bytes are.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!("delete from artifact where job_id = ? returning object_key", job_id)
        .fetch_all(conn)
        .await?;
    Ok(keys)
}

/// Removes up to `limit` rows of artifacts that were made at `before_ms` or earlier, as was the end of their job, and tells where
/// their bytes are; those that an unfinished job begins with, or an export may be made of, stay.
///
/// # Errors
/// The database failed.
pub async fn delete_older(conn: &mut SqliteConnection, before_ms: i64, limit: i64) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        "delete from artifact where id in (
           select artifact.id from artifact join job on job.id = artifact.job_id
            where job.status in ('succeeded', 'failed', 'cancelled') and max(job.finished_at_ms, artifact.created_at_ms) <= ?
              and not exists (select 1 from export where export.job_id = job.id and export.status in ('queued', 'running'))
              and artifact.id not in (select json_extract(spec, '$.init_from.artifact_id') from job
                                       where status not in ('succeeded', 'failed', 'cancelled')
                                         and json_extract(spec, '$.init_from.artifact_id') is not null)
            limit ?)
         returning object_key",
        before_ms,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}
