//! A file becomes visible: its bytes are in storage, now comes the row that names them.

use super::{Jobs, Result};
use crate::store;
use crate::types::file::File;

/// Adds the row of a file whose bytes are stored.
///
/// # Errors
/// The database failed; the bytes are removed.
pub async fn add_file(jobs: &Jobs, file: &File) -> Result<()> {
    if let Err(error) = insert(jobs, file).await {
        jobs.remove_objects([file.object_key.clone()]).await;
        return Err(error);
    }
    Ok(())
}

async fn insert(jobs: &Jobs, file: &File) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    store::file::insert(&mut tx, file).await?;
    tx.commit().await?;
    Ok(())
}
