//! The table `file`.

use sqlx::SqliteConnection;

use super::Result;
use crate::types::file::{File, FileStatus, Purpose};
use crate::types::ids::FileId;

/// Adds a file.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, file: &File) -> Result<()> {
    sqlx::query!(
        "insert into file (id, owner, filename, purpose, size_bytes, sha256, object_key, status, created_at_ms, expires_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        file.id,
        file.owner,
        file.filename,
        file.purpose,
        file.size_bytes,
        file.sha256,
        file.object_key,
        file.status,
        file.created_at_ms,
        file.expires_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The file, if this owner has it and it has not expired.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: FileId, owner: &str, now_ms: i64) -> Result<Option<File>> {
    let file = sqlx::query_as!(
        File,
        r#"select id as "id: FileId", owner, filename, purpose as "purpose: Purpose", size_bytes, sha256, object_key,
                  status as "status: FileStatus", created_at_ms, expires_at_ms
             from file
            where id = ? and owner = ? and (expires_at_ms is null or expires_at_ms > ?)"#,
        id,
        owner,
        now_ms,
    )
    .fetch_optional(conn)
    .await?;
    Ok(file)
}

/// The file, whosever it is and though its time may be over: a job that was accepted keeps its data set.
///
/// # Errors
/// The database failed.
pub async fn get(conn: &mut SqliteConnection, id: FileId) -> Result<Option<File>> {
    let file = sqlx::query_as!(
        File,
        r#"select id as "id: FileId", owner, filename, purpose as "purpose: Purpose", size_bytes, sha256, object_key,
                  status as "status: FileStatus", created_at_ms, expires_at_ms
             from file where id = ?"#,
        id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(file)
}

/// Which files a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only those of this purpose.
    pub purpose: Option<Purpose>,
    /// Only those that come after this one in the list.
    pub after: Option<FileId>,
    /// Oldest first.
    pub ascending: bool,
    /// At most so many.
    pub limit: i64,
}

/// This owner's files, newest first unless asked otherwise.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, owner: &str, filter: &Filter, now_ms: i64) -> Result<Vec<File>> {
    let Filter { purpose, after, ascending, limit } = filter;
    let files = sqlx::query_as!(
        File,
        r#"select id as "id: FileId", owner, filename, purpose as "purpose: Purpose", size_bytes, sha256, object_key,
                  status as "status: FileStatus", created_at_ms, expires_at_ms
             from file
            where owner = ?1 and (expires_at_ms is null or expires_at_ms > ?2)
              and (?3 is null or purpose = ?3)
              and (?4 is null or case when ?5 then id > ?4 else id < ?4 end)
            order by case when ?5 then id end asc, id desc
            limit ?6"#,
        owner,
        now_ms,
        purpose,
        after,
        ascending,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(files)
}

/// Removes the row and tells where the bytes were; `None`: there was no such file.
///
/// # Errors
/// The database failed.
pub async fn delete(conn: &mut SqliteConnection, id: FileId, owner: &str) -> Result<Option<String>> {
    let key = sqlx::query_scalar!("delete from file where id = ? and owner = ? returning object_key", id, owner)
        .fetch_optional(conn)
        .await?;
    Ok(key)
}

/// Removes the rows of files whose time is over and tells where their bytes were; files in use by an unfinished job stay.
///
/// # Errors
/// The database failed.
pub async fn delete_expired(conn: &mut SqliteConnection, now_ms: i64) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        "delete from file
          where expires_at_ms <= ?
            and not exists (select 1 from job where (job.training_file_id = file.id or job.validation_file_id = file.id)
                             and job.status not in ('succeeded', 'failed', 'cancelled'))
         returning object_key",
        now_ms,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}

/// Removes up to `limit` rows of files made at `before_ms` or earlier and tells where their bytes were; files in use by an
/// unfinished job stay.
///
/// # Errors
/// The database failed.
pub async fn delete_older(conn: &mut SqliteConnection, before_ms: i64, limit: i64) -> Result<Vec<String>> {
    let keys = sqlx::query_scalar!(
        "delete from file where id in (
           select file.id from file
            where file.created_at_ms <= ?
              and not exists (select 1 from job where (job.training_file_id = file.id or job.validation_file_id = file.id)
                               and job.status not in ('succeeded', 'failed', 'cancelled'))
            limit ?)
         returning object_key",
        before_ms,
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(keys)
}
