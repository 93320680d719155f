//! Object storage: the backends, and the only place where the names of objects are made.
//!
//! An object is written under a name that was never used before and becomes visible by the database row that names it: there
//! is no half-written object to be seen, and none is ever overwritten.

use std::error::Error as StdError;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::types::ids::{ArtifactId, CheckpointId, FileId, JobId, PartId, UploadId};

/// Bytes of one part of an upload; a smaller object is written in one go.
const PART_BYTES: usize = 8 << 20;

/// What can go wrong with an object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `storage.url` names no backend that there is.
    #[error("storage.url must be `file:PATH` or `memory:`, got `{0}`")]
    Url(String),
    /// The folder of the `file:` backend cannot be made.
    #[error("storage.url: {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// No object has that key.
    #[error("object {0} does not exist")]
    NotFound(String),
    /// The body is longer than it may be.
    #[error("the body is longer than {limit} bytes")]
    TooLarge {
        /// The most that was allowed.
        limit: u64,
    },
    /// The body broke off or is not what its sender promised.
    #[error("the body could not be read: {0}")]
    Body(#[source] Box<dyn StdError + Send + Sync>),
    /// The backend failed.
    #[error("object storage failed: {0}")]
    Backend(#[source] object_store::Error),
    /// What a killed server left half-written cannot be looked for.
    #[error("storage.url: half-written objects cannot be removed: {0}")]
    HalfWritten(#[source] std::io::Error),
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Length of the object.
    pub size_bytes: u64,
    /// SHA-256 of the object, in lower-case hex.
    pub sha256: String,
}

/// The bytes of an object, as they come.
pub type Body = BoxStream<'static, Result<Bytes, Error>>;

/// A handle on the object storage; clones share it.
#[derive(Debug, Clone)]
pub struct Storage {
    backend: Arc<dyn ObjectStore>,
    /// The folder of the `file:` backend.
    folder: Option<PathBuf>,
}

/// The folders that all keys are in.
pub const FOLDERS: [&str; 3] = ["files", "jobs", "uploads"];

/// Key of an uploaded file or result file.
pub fn file_key(file_id: &str) -> String {
    format!("files/{file_id}")
}

/// Key of a part of an upload.
pub fn upload_part_key(upload_id: &str, part_id: &str) -> String {
    format!("uploads/{upload_id}/parts/{part_id}")
}

/// Key of a checkpoint.
pub fn checkpoint_key(job_id: &str, checkpoint_id: &str) -> String {
    format!("jobs/{job_id}/checkpoints/{checkpoint_id}")
}

/// Key of an artifact.
pub fn artifact_key(job_id: &str, artifact_id: &str) -> String {
    format!("jobs/{job_id}/artifacts/{artifact_id}")
}

/// Whether a key is one that the functions above make; every other object of the storage is somebody else's.
pub fn is_key(key: &str) -> bool {
    let parts: Vec<&str> = key.split('/').collect();
    match parts[..] {
        ["files", file] => file.parse::<FileId>().is_ok(),
        ["uploads", upload, "parts", part] => upload.parse::<UploadId>().is_ok() && part.parse::<PartId>().is_ok(),
        ["jobs", job, "checkpoints", checkpoint] => {
            job.parse::<JobId>().is_ok() && checkpoint.parse::<CheckpointId>().is_ok()
        }
        ["jobs", job, "artifacts", artifact] => job.parse::<JobId>().is_ok() && artifact.parse::<ArtifactId>().is_ok(),
        _ => false,
    }
}

impl Storage {
    /// Opens the backend that `url` names, and makes its folder where it has one.
    ///
    /// # Errors
    /// A URL of no known kind, a folder that cannot be made.
    pub fn open(url: &str) -> Result<Self, Error> {
        if url == "memory:" {
            return Ok(Self { backend: Arc::new(InMemory::new()), folder: None });
        }
        let path = match url.strip_prefix("file:") {
            Some("") | None => return Err(Error::Url(url.to_owned())),
            // `file:///a` and `file:/a` are the same folder, `file:a` is one of the current folder.
            Some(path) => PathBuf::from(path.strip_prefix("//").unwrap_or(path)),
        };
        std::fs::create_dir_all(&path).map_err(|source| Error::Folder { path: path.clone(), source })?;
        let backend = LocalFileSystem::new_with_prefix(&path)
            .map_err(Error::Backend)?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        Ok(Self { backend: Arc::new(backend), folder: Some(path) })
    }

    /// Streams `body` into a new object; what was written when it fails is removed.
    ///
    /// # Errors
    /// A body longer than `limit`, a body that breaks off, a backend that fails.
    pub async fn put<S, E>(&self, key: &str, mut body: S, limit: Option<u64>) -> Result<Stored, Error>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let mut writer = BufWriter::with_capacity(self.backend.clone(), Path::from(key), PART_BYTES);
        let mut hash = Sha256::new();
        let mut size_bytes = 0;
        let result = loop {
            let chunk = match body.next().await {
                None => break Ok(()),
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => break Err(Error::Body(error.into())),
            };
            size_bytes += chunk.len() as u64;
            if let Some(limit) = limit.filter(|limit| size_bytes > *limit) {
                break Err(Error::TooLarge { limit });
            }
            hash.update(&chunk);
            if let Err(error) = writer.put(chunk).await {
                break Err(Error::Backend(error));
            }
        };
        match result {
            Ok(()) => writer.shutdown().await.map_err(|error| Error::Backend(backend_error(error)))?,
            Err(error) => {
                // The first error is the one to tell; parts that stay behind are not visible as an object.
                if let Err(abort) = writer.abort().await {
                    tracing::warn!(key, error = %abort, "a broken upload could not be cleaned up");
                }
                return Err(error);
            }
        }
        Ok(Stored { size_bytes, sha256: hex::encode(hash.finalize()) })
    }

    /// Writes bytes that are already in memory.
    ///
    /// # Errors
    /// A backend that fails.
    pub async fn put_bytes(&self, key: &str, bytes: Bytes) -> Result<Stored, Error> {
        let body = futures::stream::iter([Ok::<_, Error>(bytes)]);
        self.put(key, body, None).await
    }

    /// Streams an object.
    ///
    /// # Errors
    /// No such object, a backend that fails.
    pub async fn get(&self, key: &str) -> Result<Body, Error> {
        self.open_object(key, None).await
    }

    /// Streams the bytes `range` of an object; the range must lie inside it and not be empty.
    ///
    /// # Errors
    /// No such object, a backend that fails.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Body, Error> {
        self.open_object(key, Some(GetRange::Bounded(range))).await
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// A backend that fails.
    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        match self.backend.delete(&Path::from(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(Error::Backend(error)),
        }
    }

    /// All keys that begin with the folder `prefix` and are older than `age`.
    ///
    /// # Errors
    /// A backend that fails.
    pub async fn keys_older_than(&self, prefix: &str, age: std::time::Duration) -> Result<Vec<String>, Error> {
        let now = std::time::SystemTime::now();
        let mut objects = self.backend.list(Some(&Path::from(prefix)));
        let mut keys = Vec::new();
        while let Some(object) = objects.try_next().await.map_err(Error::Backend)? {
            let modified = std::time::SystemTime::from(object.last_modified);
            if now.duration_since(modified).is_ok_and(|elapsed| elapsed > age) {
                keys.push(object.location.to_string());
            }
        }
        Ok(keys)
    }

    /// Removes what uploads left half-written when the server was killed, and counts it. For the start: it would take away
    /// an upload that is under way.
    ///
    /// # Errors
    /// A folder that cannot be read, a file that cannot be removed.
    pub async fn remove_half_written(&self) -> Result<usize, Error> {
        let Some(folder) = self.folder.clone() else { return Ok(0) };
        let removed = tokio::task::spawn_blocking(move || remove_half_written(&folder)).await;
        removed.map_err(std::io::Error::other).flatten().map_err(Error::HalfWritten)
    }

    async fn open_object(&self, key: &str, range: Option<GetRange>) -> Result<Body, Error> {
        let options = GetOptions { range, ..GetOptions::default() };
        let object = self.backend.get_opts(&Path::from(key), options).await.map_err(|error| match error {
            object_store::Error::NotFound { .. } => Error::NotFound(key.to_owned()),
            error => Error::Backend(error),
        })?;
        Ok(object.into_stream().map_err(Error::Backend).boxed())
    }
}

/// The `file:` backend writes an object as `KEY#NUMBER` beside its later place, and hides such names when it lists.
fn remove_half_written(folder: &FilePath) -> std::io::Result<usize> {
    let mut folders = vec!["files".to_owned()];
    for job in names(&folder.join("jobs"))?.iter().filter(|name| name.parse::<JobId>().is_ok()) {
        folders.extend([format!("jobs/{job}/checkpoints"), format!("jobs/{job}/artifacts")]);
    }
    let mut count = 0;
    for parent in folders {
        for name in names(&folder.join(&parent))? {
            let Some((object, number)) = name.split_once('#') else { continue };
            let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            if is_number && is_key(&format!("{parent}/{object}")) {
                std::fs::remove_file(folder.join(&parent).join(&name))?;
                count += 1;
            }
        }
    }
    Ok(count)
}

/// The names in a folder; one that is not there has none, and names that are not UTF-8 are not ours.
fn names(folder: &FilePath) -> std::io::Result<Vec<String>> {
    match std::fs::read_dir(folder) {
        Ok(items) => {
            items.filter_map(|item| item.map(|item| item.file_name().into_string().ok()).transpose()).collect()
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The backend's error inside an I/O error, or the I/O error as one of the backend's.
fn backend_error(error: std::io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "storage", source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(body: Body) -> Vec<u8> {
        body.try_fold(Vec::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        })
        .await
        .expect("a whole object")
    }

    fn chunks(sizes: &[usize]) -> Vec<Result<Bytes, std::io::Error>> {
        sizes.iter().enumerate().map(|(index, size)| Ok(Bytes::from(vec![index as u8; *size]))).collect()
    }

    fn backends(folder: &std::path::Path) -> [Storage; 2] {
        let url = format!("file:{}", folder.join("deep/objects").display());
        [Storage::open(&url).expect("a folder"), Storage::open("memory:").expect("memory")]
    }

    #[tokio::test]
    async fn what_goes_in_comes_out() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for storage in backends(folder.path()) {
            for sizes in [&[][..], &[3, 5], &[PART_BYTES - 1, 2, PART_BYTES]] {
                let body = chunks(sizes);
                let expected: Vec<u8> = body.iter().flatten().flatten().copied().collect();
                let stored = storage.put("files/a", futures::stream::iter(body), None).await.expect("a put");
                assert_eq!(stored.size_bytes, expected.len() as u64);
                assert_eq!(stored.sha256, hex::encode(Sha256::digest(&expected)));
                assert!(read(storage.get("files/a").await.expect("a get")).await == expected);
                if expected.len() > 4 {
                    let part = storage.get_range("files/a", 1..4).await.expect("a range");
                    assert_eq!(read(part).await, expected[1..4]);
                }
            }
            storage.delete("files/a").await.expect("a delete");
            storage.delete("files/a").await.expect("a second delete");
            assert!(matches!(storage.get("files/a").await, Err(Error::NotFound(key)) if key == "files/a"));
        }
    }

    #[tokio::test]
    async fn a_broken_or_too_long_body_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for storage in backends(folder.path()) {
            for start in [4, PART_BYTES + 1] {
                let mut body = chunks(&[start, 4]);
                let long = storage.put("files/a", futures::stream::iter(chunks(&[start, 4])), Some(start as u64)).await;
                assert!(matches!(long, Err(Error::TooLarge { limit }) if limit == start as u64));
                body.push(Err(std::io::Error::other("gone")));
                let broken = storage.put("files/a", futures::stream::iter(body), None).await;
                assert!(matches!(broken, Err(Error::Body(_))));
                assert!(matches!(storage.get("files/a").await, Err(Error::NotFound(_))));
                let left = storage.keys_older_than("files", std::time::Duration::ZERO).await.expect("a list");
                assert_eq!(left, Vec::<String>::new());
            }
        }
    }

    #[tokio::test]
    async fn half_written_objects_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [storage, _] = backends(folder.path());
        let root = folder.path().join("deep/objects");
        let (file, job) = (FileId::new(), JobId::new());
        let whole = [file_key(&file.to_string()), checkpoint_key(&job.to_string(), &CheckpointId::new().to_string())];
        for key in &whole {
            storage.put_bytes(key, Bytes::from("whole")).await.expect("a put");
            std::fs::write(root.join(format!("{key}#12")), "half").expect("a file");
        }
        // An upload that ends with the process, as the backend itself leaves it.
        let artifact = artifact_key(&job.to_string(), &ArtifactId::new().to_string());
        let mut upload = storage.backend.put_multipart(&Path::from(artifact)).await.expect("an upload");
        upload.put_part(Bytes::from("half").into()).await.expect("a part");
        std::mem::forget(upload);
        let foreign = [format!("files/{file}#"), format!("files/{file}#1x"), "files/notes#1".into(), "jobs/a#1".into()];
        for path in &foreign {
            std::fs::write(root.join(path), "foreign").expect("a file");
        }

        assert_eq!(storage.remove_half_written().await.expect("a clean-up"), 3);
        assert_eq!(storage.remove_half_written().await.expect("a clean-up"), 0);
        for path in whole.iter().chain(&foreign) {
            assert!(root.join(path).is_file(), "{path} is still there");
        }
    }

    #[test]
    fn another_url_is_refused() {
        for url in ["", "file:", "s3://bucket", "/objects"] {
            assert!(matches!(Storage::open(url), Err(Error::Url(got)) if got == url));
        }
    }
}
