//! Removes objects that no row names: what an upload or a worker left behind when the server was killed between the two.

use std::collections::HashSet;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Jobs, Result};
use crate::storage::{FOLDERS, is_key};
use crate::store;

/// Time between two sweeps.
const INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Age from which an object without a row gets none any more.
const AGE: Duration = Duration::from_secs(24 * 3600);

/// Sweeps now and then until `shutdown`.
///
/// # Errors
/// None: a sweep that fails is logged, and the next one tries again.
pub async fn run(jobs: Jobs, shutdown: CancellationToken) -> Result<()> {
    while !shutdown.is_cancelled() {
        match sweep(&jobs, AGE).await {
            Ok(0) => (),
            Ok(count) => tracing::info!(count, "removed objects that nothing names"),
            Err(error) => tracing::warn!(%error, "cannot look for objects that nothing names"),
        }
        tokio::select! {
            () = shutdown.cancelled() => (),
            () = tokio::time::sleep(INTERVAL) => (),
        }
    }
    Ok(())
}

/// Removes the objects older than `age` that no row names, and counts them.
async fn sweep(jobs: &Jobs, age: Duration) -> Result<usize> {
    // The objects first: one that gets its row after this look is not in the list, or its row is seen below.
    let mut keys = Vec::new();
    for folder in FOLDERS {
        keys.extend(jobs.storage.keys_older_than(folder, age).await?);
    }
    let named = store::object::named(&mut *jobs.store.read().await?).await?;
    let named: HashSet<String> = named.into_iter().collect();
    keys.retain(|key| is_key(key) && !named.contains(key));
    let count = keys.len();
    jobs.remove_objects(keys).await;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::storage::{Storage, file_key};
    use crate::store::Store;
    use crate::types::file::{File, FileStatus, Purpose};
    use crate::types::ids::FileId;

    #[tokio::test]
    async fn only_what_no_row_names_is_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&folder.path().join("lorad.db")).await.expect("a database");
        let jobs = Jobs::new(store, Storage::open("memory:").expect("memory"));
        let (kept, left) = (FileId::new(), FileId::new());
        for id in [kept, left] {
            jobs.storage.put_bytes(&file_key(&id.to_string()), Bytes::from("rows")).await.expect("a put");
        }
        let file = File {
            id: kept,
            owner: "default".into(),
            filename: "rows.jsonl".into(),
            purpose: Purpose::FineTune,
            size_bytes: 4,
            sha256: String::new(),
            object_key: file_key(&kept.to_string()),
            status: FileStatus::Processed,
            created_at_ms: 0,
            expires_at_ms: None,
        };
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        store::file::insert(&mut tx, &file).await.expect("a row");
        tx.commit().await.expect("a commit");

        let foreign = ["files/notes.txt", "files/2024/file-1", "jobs/letters/artifacts/cv.pdf", "jobs/list"];
        for key in foreign {
            jobs.storage.put_bytes(key, Bytes::from("mine")).await.expect("a put");
        }

        assert_eq!(sweep(&jobs, AGE).await.expect("a sweep"), 0);
        assert_eq!(sweep(&jobs, Duration::ZERO).await.expect("a sweep"), 1);
        assert!(jobs.storage.get(&file.object_key).await.is_ok());
        assert!(jobs.storage.get(&file_key(&left.to_string())).await.is_err());
        for key in foreign {
            assert!(jobs.storage.get(key).await.is_ok(), "{key} is still there");
        }
    }
}
