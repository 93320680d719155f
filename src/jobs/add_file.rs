//! A file becomes visible: its bytes are in storage, now comes the row that names them.

use super::{Jobs, Result};
use crate::store;
use crate::types::file::File;
use crate::types::now_ms;

/// Adds the row of a file whose bytes are stored, and clears away files whose time is over.
///
/// # Errors
/// The database failed; the bytes are removed.
pub async fn add_file(jobs: &Jobs, file: &File) -> Result<()> {
    let expired = match insert(jobs, file).await {
        Ok(expired) => expired,
        Err(error) => {
            jobs.remove_objects([file.object_key.clone()]).await;
            return Err(error);
        }
    };
    jobs.remove_objects(expired).await;
    Ok(())
}

async fn insert(jobs: &Jobs, file: &File) -> Result<Vec<String>> {
    let mut tx = jobs.store.begin_write().await?;
    store::file::insert(&mut tx, file).await?;
    let expired = store::file::delete_expired(&mut tx, now_ms()).await?;
    tx.commit().await?;
    Ok(expired)
}
