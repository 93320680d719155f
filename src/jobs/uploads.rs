//! Files that come in parts: each part is an object of its own until the upload is completed, cancelled or expires.

use std::collections::HashMap;
use std::error::Error as StdError;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use md5::{Digest, Md5};
use sqlx::SqliteConnection;

use super::{Error, Jobs, Result};
use crate::storage::{self, Expected, Stored, file_key, upload_part_key};
use crate::store;
use crate::types::file::{File, FileStatus};
use crate::types::ids::{FileId, PartId, UploadId};
use crate::types::now_ms;
use crate::types::upload::{Upload, UploadPart, UploadStatus};

/// Longest part, in bytes.
pub const MAX_PART_BYTES: u64 = 64 << 20;

/// Adds the row of an upload.
///
/// # Errors
/// The database failed.
pub async fn create(jobs: &Jobs, upload: &Upload) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    store::upload::insert(&mut tx, upload).await?;
    tx.commit().await?;
    Ok(())
}

/// Stores a part of this owner's upload; many may come at once.
///
/// # Errors
/// An upload that takes no parts, a part that is too long, a body that breaks off.
pub async fn add_part<S, E>(jobs: &Jobs, owner: &str, upload_id: UploadId, body: S) -> Result<UploadPart>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    pending(&mut *jobs.store.read().await?, owner, upload_id).await?;
    let id = PartId::new();
    let object_key = upload_part_key(&upload_id.to_string(), &id.to_string());
    let stored = jobs.storage.put(&object_key, body, Some(MAX_PART_BYTES)).await?;
    let size_bytes = i64::try_from(stored.size_bytes).unwrap_or(i64::MAX);
    let part = UploadPart { id, upload_id, size_bytes, object_key, created_at_ms: now_ms() };
    if let Err(error) = insert_part(jobs, owner, &part).await {
        jobs.remove_objects([part.object_key]).await;
        return Err(error);
    }
    Ok(part)
}

async fn insert_part(jobs: &Jobs, owner: &str, part: &UploadPart) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    let upload = pending(&mut tx, owner, part.upload_id).await?;
    // A client that sends a part again leaves the first one behind; more than that is no retry.
    let there: i64 = store::upload::parts(&mut tx, upload.id).await?.iter().map(|part| part.size_bytes).sum();
    let most = upload.size_bytes.saturating_mul(2).saturating_add(MAX_PART_BYTES.cast_signed());
    if there.saturating_add(part.size_bytes) > most {
        let bytes = upload.size_bytes;
        let message = format!("data: the parts of this upload of {bytes} bytes would have more than {most} together");
        return Err(Error::Upload { param: "data", message });
    }
    store::upload::insert_part(&mut tx, part).await?;
    tx.commit().await?;
    Ok(())
}

/// Joins these parts of this owner's upload into a file, in their order. Completing twice gives the same file.
///
/// # Errors
/// An upload that is over, a part that it does not have, a sum of bytes or an MD5 other than was said.
pub async fn complete(
    jobs: &Jobs,
    owner: &str,
    id: UploadId,
    part_ids: &[PartId],
    md5: Option<&str>,
) -> Result<(Upload, File)> {
    match complete_once(jobs, owner, id, part_ids, md5).await {
        Ok(done) => Ok(done),
        // Another request may have completed it, and taken the parts away, while this one was at it.
        Err(error) => completed(&mut *jobs.store.read().await?, owner, id).await?.ok_or(error),
    }
}

async fn complete_once(
    jobs: &Jobs,
    owner: &str,
    id: UploadId,
    part_ids: &[PartId],
    md5: Option<&str>,
) -> Result<(Upload, File)> {
    let mut conn = jobs.store.read().await?;
    if let Some(completed) = completed(&mut conn, owner, id).await? {
        return Ok(completed);
    }
    let upload = pending(&mut conn, owner, id).await?;
    let parts = chosen(&upload, store::upload::parts(&mut conn, id).await?, part_ids)?;
    drop(conn);
    let file_id = FileId::new();
    let object_key = file_key(&file_id.to_string());
    let stored = join(jobs, &object_key, parts, md5).await?;
    let created_at_ms = now_ms();
    let file = File {
        id: file_id,
        owner: owner.to_owned(),
        filename: upload.filename,
        purpose: upload.purpose,
        size_bytes: i64::try_from(stored.size_bytes).unwrap_or(i64::MAX),
        sha256: stored.sha256,
        object_key: object_key.clone(),
        status: FileStatus::Processed,
        created_at_ms,
        expires_at_ms: upload.file_expires_after_seconds.map(|seconds| created_at_ms + seconds * 1000),
    };
    let parts = match publish(jobs, id, &file).await {
        Ok(Some(parts)) => parts,
        // Another request was faster.
        Ok(None) => vec![object_key],
        Err(error) => {
            jobs.remove_objects([object_key]).await;
            return Err(error);
        }
    };
    jobs.remove_objects(parts).await;
    let ended = completed(&mut *jobs.store.read().await?, owner, id).await?;
    match ended {
        Some(completed) => Ok(completed),
        None => Err(not_pending(id, UploadStatus::Cancelled)),
    }
}

/// Writes the row of the file and ends the upload; gives the objects of its parts, `None`: it had ended before.
async fn publish(jobs: &Jobs, id: UploadId, file: &File) -> Result<Option<Vec<String>>> {
    let mut tx = jobs.store.begin_write().await?;
    if !store::upload::end(&mut tx, id, UploadStatus::Completed, Some(file.id)).await? {
        return Ok(None);
    }
    store::file::insert(&mut tx, file).await?;
    let parts = store::upload::delete_parts(&mut tx, id).await?;
    tx.commit().await?;
    tracing::info!(upload = %id, file = %file.id, size_bytes = file.size_bytes, "upload completed");
    Ok(Some(parts))
}

/// Cancels this owner's upload and removes its parts. Cancelling twice is fine.
///
/// # Errors
/// No such upload, one that has come to another end.
pub async fn cancel(jobs: &Jobs, owner: &str, id: UploadId) -> Result<Upload> {
    let mut tx = jobs.store.begin_write().await?;
    let found = store::upload::find(&mut tx, id, owner).await?;
    let mut upload = found.ok_or_else(|| Error::NoSuchUpload(id.to_string()))?;
    match upload.status_at(now_ms()) {
        UploadStatus::Cancelled => return Ok(upload),
        UploadStatus::Pending => {}
        status @ (UploadStatus::Completed | UploadStatus::Expired) => return Err(not_pending(id, status)),
    }
    store::upload::end(&mut tx, id, UploadStatus::Cancelled, None).await?;
    let keys = store::upload::delete_parts(&mut tx, id).await?;
    tx.commit().await?;
    jobs.remove_objects(keys).await;
    upload.status = UploadStatus::Cancelled;
    Ok(upload)
}

/// Ends the uploads whose time is over, removes their parts, and counts them.
///
/// # Errors
/// The database failed.
pub async fn expire(jobs: &Jobs, now_ms: i64) -> Result<usize> {
    let mut tx = jobs.store.begin_write().await?;
    let expired = store::upload::expire(&mut tx, now_ms).await?;
    let mut keys = Vec::new();
    for id in &expired {
        keys.extend(store::upload::delete_parts(&mut tx, *id).await?);
    }
    tx.commit().await?;
    jobs.remove_objects(keys).await;
    Ok(expired.len())
}

/// This owner's upload, which takes parts.
async fn pending(conn: &mut SqliteConnection, owner: &str, id: UploadId) -> Result<Upload> {
    let found = store::upload::find(conn, id, owner).await?;
    let upload = found.ok_or_else(|| Error::NoSuchUpload(id.to_string()))?;
    match upload.status_at(now_ms()) {
        UploadStatus::Pending => Ok(upload),
        status => Err(not_pending(id, status)),
    }
}

fn not_pending(id: UploadId, status: UploadStatus) -> Error {
    Error::Upload { param: "upload_id", message: format!("upload {id} takes nothing any more: its status is {status}") }
}

/// This owner's upload and its file, where it was completed.
async fn completed(conn: &mut SqliteConnection, owner: &str, id: UploadId) -> Result<Option<(Upload, File)>> {
    let Some(upload) = store::upload::find(conn, id, owner).await? else { return Ok(None) };
    let Some(file_id) = upload.file_id else { return Ok(None) };
    let file = store::file::find(conn, file_id, owner, now_ms()).await?;
    Ok(Some((upload, file.ok_or_else(|| Error::NoSuchFile(file_id.to_string()))?)))
}

/// These parts, which must be the upload's own, each once, and as many bytes as were announced.
fn chosen(upload: &Upload, parts: Vec<UploadPart>, part_ids: &[PartId]) -> Result<Vec<UploadPart>> {
    let mut there: HashMap<PartId, UploadPart> = parts.into_iter().map(|part| (part.id, part)).collect();
    let (mut chosen, mut sum) = (Vec::with_capacity(part_ids.len()), 0i64);
    for id in part_ids {
        let part = there.remove(id).ok_or_else(|| Error::Upload {
            param: "part_ids",
            message: format!("part_ids: upload {} has no part `{id}`, or it is named twice", upload.id),
        })?;
        sum = sum.saturating_add(part.size_bytes);
        chosen.push(part);
    }
    if sum != upload.size_bytes {
        let message = format!("part_ids: the parts have {sum} bytes, announced were `{}`", upload.size_bytes);
        return Err(Error::Upload { param: "part_ids", message });
    }
    Ok(chosen)
}

/// Streams these objects one after the other into a new one.
async fn join(jobs: &Jobs, key: &str, parts: Vec<UploadPart>, md5: Option<&str>) -> Result<Stored> {
    let (mut hash, storage) = (Md5::new(), jobs.storage.clone());
    let open = move |part: UploadPart| {
        let storage = storage.clone();
        let (key, size_bytes) = (part.object_key, part.size_bytes.unsigned_abs());
        // The hash of a part is not kept: the client checks the whole by its MD5.
        async move { storage.get(Expected { key: &key, size_bytes, sha256: None }).await }
    };
    let bytes: storage::Body = stream::iter(parts).then(open).try_flatten().boxed();
    let bytes = bytes.inspect_ok(|chunk| hash.update(chunk));
    let stored = jobs.storage.put(key, bytes, None).await.map_err(|error| match error {
        // It is our own storage that broke off, not the caller.
        storage::Error::Body(source) => match source.downcast::<storage::Error>() {
            Ok(ours) => *ours,
            Err(source) => storage::Error::Body(source),
        },
        error => error,
    })?;
    let found = hex::encode(hash.finalize());
    if let Some(md5) = md5.filter(|md5| !md5.eq_ignore_ascii_case(&found)) {
        jobs.remove_objects([key.to_owned()]).await;
        return Err(Error::Upload { param: "md5", message: format!("md5: the bytes have `{found}`, got `{md5}`") });
    }
    Ok(stored)
}
