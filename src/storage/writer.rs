//! Writing one object: a small one in one go, a larger one in parts that are on their way while more bytes come.
//!
//! A writer that is dropped before its end (the client went away, the body broke off) takes its parts back: a service keeps,
//! and charges, the parts of an upload that nobody ended.

use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, Result, WriteMultipart};
use tokio_util::task::TaskTracker;

/// Bytes of one part; a smaller object is written in one go. A service takes 10000 parts, so an object has 78 GiB at most.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Parts that are on their way at once: with the one that fills, so many are in memory.
const PARTS_AT_ONCE: usize = 2;

/// An object that comes.
pub(super) struct Writer {
    backend: Arc<dyn ObjectStore>,
    path: Path,
    tasks: TaskTracker,
    /// What came before there was enough for a part.
    first: Vec<Bytes>,
    first_bytes: usize,
    parts: Option<WriteMultipart>,
}

impl Writer {
    /// Begins an object under `path`; what outlives the writer runs among `tasks`.
    pub(super) fn new(backend: Arc<dyn ObjectStore>, path: Path, tasks: TaskTracker) -> Self {
        Self { backend, path, tasks, first: Vec::new(), first_bytes: 0, parts: None }
    }

    /// Takes more bytes, and waits where the service is slower than they come.
    pub(super) async fn write(&mut self, mut chunk: Bytes) -> Result<()> {
        if self.parts.is_none() {
            if self.first_bytes + chunk.len() < PART_BYTES {
                self.first_bytes += chunk.len();
                self.first.push(chunk);
                return Ok(());
            }
            let upload = self.backend.put_multipart(&self.path).await?;
            self.parts = Some(WriteMultipart::new_with_chunk_size(upload, PART_BYTES));
            for chunk in std::mem::take(&mut self.first) {
                self.put(chunk).await?;
            }
        }
        while !chunk.is_empty() {
            let length = chunk.len().min(PART_BYTES);
            self.put(chunk.split_to(length)).await?;
        }
        Ok(())
    }

    async fn put(&mut self, chunk: Bytes) -> Result<()> {
        if let Some(parts) = &mut self.parts {
            parts.wait_for_capacity(PARTS_AT_ONCE).await?;
            parts.put(chunk);
        }
        Ok(())
    }

    /// Makes the object visible. That happens, or is taken back, also if nobody waits for it any more.
    pub(super) async fn finish(mut self) -> Result<()> {
        let (backend, path) = (self.backend.clone(), self.path.clone());
        let (parts, first) = (self.parts.take(), std::mem::take(&mut self.first));
        let end = self.tasks.spawn(async move {
            match parts {
                // Takes its parts back where it fails.
                Some(parts) => parts.finish().await.map(|_| ()),
                None => backend.put(&path, PutPayload::from_iter(first)).await.map(|_| ()),
            }
        });
        end.await?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let Some(parts) = self.parts.take() else { return };
        let path = self.path.clone();
        self.tasks.spawn(async move {
            if let Err(error) = parts.abort().await {
                tracing::warn!(key = %path, %error, "the parts of a broken upload could not be removed");
            }
        });
    }
}
