//! The tables `upload` and `upload_part`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::file::Purpose;
use crate::types::ids::{FileId, PartId, UploadId};
use crate::types::upload::{Upload, UploadPart, UploadStatus};

/// Adds an upload.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, upload: &Upload) -> Result<()> {
    sqlx::query!(
        "insert into upload (id, owner, filename, purpose, size_bytes, status, file_expires_after_seconds, file_id, created_at_ms,
                             expires_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        upload.id,
        upload.owner,
        upload.filename,
        upload.purpose,
        upload.size_bytes,
        upload.status,
        upload.file_expires_after_seconds,
        upload.file_id,
        upload.created_at_ms,
        upload.expires_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The upload, if this owner has it.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: UploadId, owner: &str) -> Result<Option<Upload>> {
    let upload = sqlx::query_as!(
        Upload,
        r#"select id as "id: UploadId", owner, filename, purpose as "purpose: Purpose", size_bytes,
                  status as "status: UploadStatus", file_expires_after_seconds, file_id as "file_id: FileId", created_at_ms,
                  expires_at_ms
             from upload where id = ? and owner = ?"#,
        id,
        owner,
    )
    .fetch_optional(conn)
    .await?;
    Ok(upload)
}

/// Ends an upload that takes parts; `false`: it did not any more.
///
/// # Errors
/// The database failed.
pub async fn end(
    conn: &mut SqliteConnection,
    id: UploadId,
    status: UploadStatus,
    file_id: Option<FileId>,
) -> Result<bool> {
    let done = sqlx::query!(
        "update upload set status = ?, file_id = ? where id = ? and status = 'pending'",
        status,
        file_id,
        id,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends the uploads whose time is over.
///
/// # Errors
/// The database failed.
pub async fn expire(conn: &mut SqliteConnection, now_ms: i64) -> Result<Vec<UploadId>> {
    let ids = sqlx::query_scalar!(
        r#"update upload set status = 'expired' where status = 'pending' and expires_at_ms <= ?
           returning id as "id!: UploadId""#,
        now_ms,
    )
    .fetch_all(conn)
    .await?;
    Ok(ids)
}

/// Adds a part.
///
/// # Errors
/// The database failed.
pub async fn insert_part(conn: &mut SqliteConnection, part: &UploadPart) -> Result<()> {
    sqlx::query!(
        "insert into upload_part (id, upload_id, size_bytes, object_key, created_at_ms) values (?, ?, ?, ?, ?)",
        part.id,
        part.upload_id,
        part.size_bytes,
        part.object_key,
        part.created_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The parts of an upload.
///
/// # Errors
/// The database failed.
pub async fn parts(conn: &mut SqliteConnection, upload_id: UploadId) -> Result<Vec<UploadPart>> {
    let parts = sqlx::query_as!(
        UploadPart,
        r#"select id as "id: PartId", upload_id as "upload_id: UploadId", size_bytes, object_key, created_at_ms
             from upload_part where upload_id = ? order by id"#,
        upload_id,
    )
    .fetch_all(conn)
    .await?;
    Ok(parts)
}

/// Removes the rows of an upload's parts and tells where their bytes were.
///
/// # Errors
/// The database failed.
pub async fn delete_parts(conn: &mut SqliteConnection, upload_id: UploadId) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!("delete from upload_part where upload_id = ? returning object_key", upload_id)
        .fetch_all(conn)
        .await?;
    Ok(keys)
}
