//! Object storage: what all backends do, and how long they may take for it.
//!
//! An object is written under a name that was never used before and becomes visible by the database row that names it: there
//! is no half-written object to be seen, and none is ever overwritten.

mod abandoned;
mod backend;
mod half_written;
mod keys;
mod ranges;
mod reader;
mod writer;

use std::error::Error as StdError;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::Stream;
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use object_store::{ObjectStore, ObjectStoreExt};
use reqwest::Method;
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use tokio_util::task::TaskTracker;

use crate::config::{self, Config};
use abandoned::Abandoned;
use backend::Backend;
pub use keys::{FOLDERS, artifact_key, checkpoint_key, file_key, is_key, upload_part_key};
pub use reader::Expected;
use writer::Writer;

/// How long a signed URL is good for.
const SIGNED_FOR: Duration = Duration::from_secs(300);

/// What can go wrong with an object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings name no backend that there is.
    #[error(transparent)]
    Settings(#[from] config::Error),
    /// The folder of the `file:` backend cannot be made.
    #[error("storage.url: {}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The settings are not enough for this backend.
    #[error("object storage cannot be opened: {0}")]
    Open(#[source] object_store::Error),
    /// The backend does not do what the server needs of it.
    #[error("storage.url `{url}`: cannot {what} a test object: {source}")]
    Probe {
        /// Where objects were to be.
        url: String,
        /// What was tried.
        what: &'static str,
        /// What the backend said.
        source: Box<Error>,
    },
    /// The backend gave no answer.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// No object has that key.
    #[error("object {0} does not exist")]
    NotFound(String),
    /// The object is not what was written.
    #[error("object {key} is damaged: {how}")]
    Damaged {
        /// Its key.
        key: String,
        /// What is wrong with it.
        how: String,
    },
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
    signer: Option<Arc<dyn Signer>>,
    signs_filenames: bool,
    abandoned: Option<Arc<Abandoned>>,
    /// The folder of the `file:` backend.
    folder: Option<PathBuf>,
    /// Ends of uploads that nobody waits for any more.
    tasks: TaskTracker,
}

impl Storage {
    /// Objects in memory, which are lost with the handle.
    pub fn memory() -> Self {
        Self::new(Backend::memory())
    }

    /// Opens the backend that the configuration names, makes its folder where it has one, and nothing else: see [`Self::probe`].
    ///
    /// # Errors
    /// A folder that cannot be made, settings that are not enough for the backend.
    pub fn from_config(config: &Config) -> Result<Self, Error> {
        Ok(Self::new(Backend::open(&config.storage_location()?, &config.storage)?))
    }

    fn new(backend: Backend) -> Self {
        let Backend { objects, signer, abandoned, folder, signs_filenames } = backend;
        let abandoned = abandoned.map(Arc::new);
        Self { backend: objects, signer, signs_filenames, abandoned, folder, tasks: TaskTracker::new() }
    }

    /// Writes, reads, signs (where that is wanted) and removes a test object, so that a wrong key or bucket is found now and not by
    /// a training.
    ///
    /// # Errors
    /// What of it failed, and why; a backend that is silent for longer than it may be.
    pub async fn probe(&self, config: &Config) -> Result<(), Error> {
        // A request that fails until its time is over may begin another one at its very end.
        let limit = config.storage.timeout() * 2;
        let key = format!("probe/{}", uuid::Uuid::new_v4().as_simple());
        let failed = |what: &'static str| {
            let url = config.storage.url.clone().unwrap_or_else(|| "file:".into());
            move |source| Error::Probe { url, what, source: Box::new(source) }
        };
        let stored = within(limit, self.put_bytes(&key, Bytes::from_static(b"lorad"))).await;
        let stored = stored.map_err(failed("write"))?;
        let expected = Expected { key: &key, size_bytes: stored.size_bytes, sha256: Some(&stored.sha256) };
        let read = async { self.get(expected).await?.try_for_each(|_| async { Ok(()) }).await };
        let read = within(limit, read).await.map_err(failed("read"));
        let listed = within(limit, async { self.keys_older_than("probe", Duration::ZERO).await.map(|_| ()) }).await;
        let signed = within(limit, async { self.signed_url(&key, "attachment").await.map(|_| ()) }).await;
        let deleted = within(limit, self.delete(&key)).await;
        read?;
        listed.map_err(failed("list"))?;
        signed.map_err(failed("sign a URL of"))?;
        deleted.map_err(failed("delete"))
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
        let mut writer = Writer::new(self.backend.clone(), Path::from(key), self.tasks.clone());
        let mut hash = Sha256::new();
        let mut size_bytes = 0;
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| Error::Body(error.into()))?;
            size_bytes += chunk.len() as u64;
            if let Some(limit) = limit.filter(|limit| size_bytes > *limit) {
                return Err(Error::TooLarge { limit });
            }
            hash.update(&chunk);
            writer.write(chunk).await.map_err(Error::Backend)?;
        }
        writer.finish().await.map_err(Error::Backend)?;
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

    /// Streams an object. The stream ends well only if all bytes came and have the right hash.
    ///
    /// # Errors
    /// No such object, one of another length, a backend that fails.
    pub async fn get(&self, expected: Expected<'_>) -> Result<Body, Error> {
        reader::whole(self.backend.clone(), expected).await
    }

    /// Streams the bytes `range` of an object; the range must lie inside it and not be empty. The stream ends well only if all of
    /// them came.
    ///
    /// # Errors
    /// No such object, one of another length, a backend that fails.
    pub async fn get_range(&self, expected: Expected<'_>, range: Range<u64>) -> Result<Body, Error> {
        reader::open(self.backend.clone(), expected, range).await
    }

    /// A URL that gives whoever has it the object, for a few minutes; `None`: that is not wanted here. Where the service takes
    /// it, the answer has this `Content-Disposition`.
    ///
    /// # Errors
    /// A backend that cannot sign.
    pub async fn signed_url(&self, key: &str, disposition: &str) -> Result<Option<SecretString>, Error> {
        let Some(signer) = &self.signer else { return Ok(None) };
        let options = match self.signs_filenames {
            true => SignedUrlOptions::new().with_query([("response-content-disposition", disposition)]),
            false => SignedUrlOptions::new(),
        };
        let url = signer.signed_url_opts(Method::GET, &Path::from(key), SIGNED_FOR, &options).await;
        Ok(Some(SecretString::from(url.map_err(Error::Backend)?.to_string())))
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
    pub async fn keys_older_than(&self, prefix: &str, age: Duration) -> Result<Vec<String>, Error> {
        let now = SystemTime::now();
        let mut objects = self.backend.list(Some(&Path::from(prefix)));
        let mut keys = Vec::new();
        while let Some(object) = objects.try_next().await.map_err(Error::Backend)? {
            let modified = SystemTime::from(object.last_modified);
            if now.duration_since(modified).is_ok_and(|elapsed| elapsed > age) {
                keys.push(object.location.to_string());
            }
        }
        Ok(keys)
    }

    /// Takes back uploads that began longer than `age` ago and never came to an end, where the service lists them, and counts them.
    ///
    /// # Errors
    /// A backend that fails.
    pub async fn remove_abandoned(&self, age: Duration) -> Result<usize, Error> {
        match &self.abandoned {
            Some(abandoned) => abandoned.abort_older_than(age).await,
            None => Ok(0),
        }
    }

    /// Removes what uploads left half-written when the server was killed, and counts it. For the start: it would take away
    /// an upload that is under way.
    ///
    /// # Errors
    /// A folder that cannot be read, a file that cannot be removed.
    pub async fn remove_half_written(&self) -> Result<usize, Error> {
        let Some(folder) = self.folder.clone() else { return Ok(0) };
        let removed = tokio::task::spawn_blocking(move || half_written::remove(&folder)).await;
        removed.map_err(std::io::Error::other).flatten().map_err(Error::HalfWritten)
    }

    /// Waits for the ends of uploads that nobody else waits for: their parts are on their way out.
    pub async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(Error::Silent(limit)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ids::{ArtifactId, CheckpointId, FileId, JobId};
    use writer::PART_BYTES;

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
        let mut config = Config::default();
        config.storage.url = Some(format!("file:{}", folder.join("deep/objects").display()));
        [Storage::from_config(&config).expect("a folder"), Storage::memory()]
    }

    fn expected(stored: &Stored) -> Expected<'_> {
        Expected { key: "files/a", size_bytes: stored.size_bytes, sha256: Some(&stored.sha256) }
    }

    async fn keys(storage: &Storage) -> Vec<String> {
        storage.keys_older_than("files", Duration::ZERO).await.expect("a list")
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
                let known = super::tests::expected(&stored);
                assert!(read(storage.get(known).await.expect("a get")).await == expected);
                if expected.len() > 4 {
                    let part = storage.get_range(known, 1..4).await.expect("a range");
                    assert_eq!(read(part).await, expected[1..4]);
                }
            }
            storage.delete("files/a").await.expect("a delete");
            storage.delete("files/a").await.expect("a second delete");
            let gone = Expected { key: "files/a", size_bytes: 1, sha256: None };
            assert!(matches!(storage.get(gone).await, Err(Error::NotFound(key)) if key == "files/a"));
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
                assert_eq!(keys(&storage).await, Vec::<String>::new());
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

    #[tokio::test]
    async fn other_bytes_than_were_written_never_end_well() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for storage in backends(folder.path()) {
            let right = storage.put_bytes("files/a", Bytes::from("0123456789")).await.expect("a put");
            storage.put_bytes("files/a", Bytes::from("0123456780")).await.expect("a put");
            let mut body = storage.get(expected(&right)).await.expect("the right length");
            let first = body.next().await.expect("an item");
            assert!(matches!(&first, Err(Error::Damaged { key, .. }) if key == "files/a"), "{first:?}");
            assert!(body.next().await.is_none());
            for other in ["012345678", "01234567890"] {
                storage.put_bytes("files/a", Bytes::from(other)).await.expect("a put");
                assert!(matches!(storage.get(expected(&right)).await, Err(Error::Damaged { .. })), "{other}");
                assert!(
                    matches!(storage.get_range(expected(&right), 1..4).await, Err(Error::Damaged { .. })),
                    "{other}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_backend_that_works_passes_its_probe_and_keeps_nothing_of_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for storage in backends(folder.path()) {
            storage.probe(&Config::default()).await.expect("it works");
            let left = storage.keys_older_than("probe", Duration::ZERO).await.expect("a list");
            assert_eq!(left, Vec::<String>::new());
        }
    }
}
