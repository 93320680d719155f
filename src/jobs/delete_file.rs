//! A file goes, unless an unfinished job needs it.

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::ids::FileId;

/// Removes this owner's file: first the row, then the bytes.
///
/// # Errors
/// No such file, a job that needs it.
pub async fn delete_file(jobs: &Jobs, owner: &str, id: FileId) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    let Some(key) = store::file::delete(&mut tx, id, owner).await? else {
        return Err(Error::NoSuchFile(id.to_string()));
    };
    if let Some(job) = store::job::unfinished_with_file(&mut tx, id).await? {
        return Err(Error::FileInUse { file: id, job });
    }
    tx.commit().await?;
    jobs.remove_objects([key]).await;
    Ok(())
}
