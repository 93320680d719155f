//! Everything that a server keeps as one `.tar`, and back.
//!
//! The archive has the objects (`objects/KEY`), then the database (`lorad.db`), then `manifest.json`: whoever reads a manifest has read
//! everything before it. The database is a snapshot of one moment, taken first; a server may run and change things meanwhile, so an object
//! that is gone by the time it is copied is forgotten in the snapshot, if the server has forgotten it too.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tar::{Archive, Builder, Entry, Header};

use crate::hub::sha256_of_file;
use crate::storage::{self, Expected, Storage, Stored, is_key};
use crate::store::object::Named;
use crate::store::{self, Store};
use crate::types::now_ms;

/// The format that this build writes and reads.
const FORMAT: u32 = 1;
const DATABASE: &str = "lorad.db";
const MANIFEST: &str = "manifest.json";
const OBJECTS: &str = "objects/";
/// Bytes of a block of a `.tar`.
const BLOCK: u64 = 512;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// The last entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The archive's format.
    format: u32,
    /// The version of lorad that wrote it.
    version: String,
    /// When the snapshot was taken, in Unix seconds.
    created_at: i64,
    /// Hash of the database, in hexadecimal digits.
    database_sha256: String,
    /// Objects in the archive.
    pub(super) objects: u64,
    /// Bytes of all objects.
    pub(super) object_bytes: u64,
    /// Objects of the snapshot that the server had removed before they could be copied: checkpoints that a newer one replaced, or
    /// what its owner deleted.
    pub(super) forgotten: u64,
}

/// Writes everything into a new file; `scratch` is a folder for the snapshot.
///
/// # Errors
/// An object that is missing or damaged, a file that cannot be written, a database or storage that failed.
pub(super) async fn back_up(
    store: &Store,
    storage: &Storage,
    target: &Path,
    scratch: &Path,
) -> anyhow::Result<Manifest> {
    let created_at = now_ms() / 1000;
    let path = scratch.join(DATABASE);
    store.snapshot(&path).await.context("cannot take a snapshot of the database")?;
    let snapshot = Store::open(&path).await.context("cannot open the snapshot")?;
    let objects = store::object::all(&mut *snapshot.read().await?).await?;
    let file = File::create_new(target).with_context(|| format!("cannot make {}", target.display()))?;
    let mut archive = Builder::new(BufWriter::new(file));
    let (mut count, mut bytes, mut gone) = (0, 0, Vec::new());
    for object in &objects {
        match append_object(&mut archive, storage, object).await {
            Ok(()) => {
                count += 1;
                bytes += object.size_bytes.unsigned_abs();
            }
            Err(error) if is_missing(&error) => gone.push(&object.key),
            Err(error) => return Err(error.context(format!("cannot copy object {}", object.key))),
        }
    }
    let forgotten = gone.len() as u64;
    for key in gone {
        let still_named = store::object::all(&mut *store.read().await?).await?.iter().any(|object| &object.key == key);
        ensure!(!still_named, "object {key} is missing in the storage, though the database names it");
        let mut tx = snapshot.begin_write().await?;
        store::object::forget(&mut tx, key).await?;
        tx.commit().await.context("cannot write the snapshot")?;
    }
    snapshot.close().await;
    let database_sha256 = sha256_of_file(&path).with_context(|| format!("cannot read {}", path.display()))?;
    archive.append_path_with_name(&path, DATABASE).context("cannot write the archive")?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let manifest = Manifest {
        format: FORMAT,
        version,
        created_at,
        database_sha256,
        objects: count,
        object_bytes: bytes,
        forgotten,
    };
    let json = serde_json::to_vec_pretty(&manifest)?;
    archive
        .append_data(&mut header(json.len() as u64), MANIFEST, json.as_slice())
        .context("cannot write the archive")?;
    let file = archive.into_inner().context("cannot write the archive")?;
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error).context("cannot write the archive")?;
    file.sync_all().context("cannot write the archive")?;
    Ok(manifest)
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<storage::Error>(), Some(storage::Error::NotFound(_)))
}

fn header(size_bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_size(size_bytes);
    header.set_mode(0o600);
    header.set_mtime(u64::try_from(now_ms() / 1000).unwrap_or(0));
    header
}

/// Streams an object into the archive: nothing is written before the storage has found it.
async fn append_object(archive: &mut Builder<impl Write>, storage: &Storage, object: &Named) -> anyhow::Result<()> {
    let size_bytes = object.size_bytes.unsigned_abs();
    let expected = Expected { key: &object.key, size_bytes, sha256: object.sha256.as_deref() };
    let mut body = storage.get(expected).await?;
    // The header alone: what follows it comes from the storage.
    archive.append_data(&mut header(size_bytes), format!("{OBJECTS}{}", object.key), std::io::empty())?;
    while let Some(chunk) = body.try_next().await? {
        archive.get_mut().write_all(&chunk)?;
    }
    let padding = (BLOCK - size_bytes % BLOCK) % BLOCK;
    archive.get_mut().write_all(&vec![0; usize::try_from(padding)?])?;
    Ok(())
}

/// Brings everything of an archive into an empty storage and makes the database, which is what makes it count: an error before leaves
/// no database, and takes the objects back.
///
/// # Errors
/// An archive that is not whole or not what it says, a storage that has objects, a database that is there, a disk that is full.
pub(super) async fn restore(
    archive: &Path,
    database: &Path,
    storage: &Storage,
    scratch: &Path,
) -> anyhow::Result<Manifest> {
    // A write-ahead log that another database left would be played back over this one.
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        let path = Path::new(&path);
        ensure!(!path.exists(), "there is a database already, or what is left of one: {}", path.display());
    }
    for folder in storage::FOLDERS {
        let found = storage.keys_older_than(folder, std::time::Duration::ZERO).await?;
        if let Some(key) = found.iter().find(|key| is_key(key)) {
            bail!(
                "the storage is not empty, it has the object {key} for one; if it is of a restore that was broken off, remove the \
                 folders {} of the storage",
                storage::FOLDERS.join(", ")
            );
        }
    }
    let mut put = HashMap::new();
    let restored = read_archive(archive, database, storage, scratch, &mut put).await;
    if restored.is_err() {
        for key in put.keys() {
            if let Err(error) = storage.delete(key).await {
                tracing::warn!(key, %error, "an object stays behind");
            }
        }
    }
    restored
}

async fn read_archive(
    archive: &Path,
    database: &Path,
    storage: &Storage,
    scratch: &Path,
    put: &mut HashMap<String, Stored>,
) -> anyhow::Result<Manifest> {
    let file = File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
    let mut archive = Archive::new(file);
    let snapshot = scratch.join(DATABASE);
    let mut manifest: Option<Manifest> = None;
    for entry in archive.entries().context("cannot read the archive")? {
        let mut entry = entry.context("cannot read the archive")?;
        let name = entry.path().context("cannot read the archive")?.to_string_lossy().into_owned();
        match name.strip_prefix(OBJECTS) {
            Some(key) if is_key(key) => {
                let stored = put_object(storage, key, &mut entry).await.with_context(|| format!("object {key}"))?;
                put.insert(key.to_owned(), stored);
            }
            None if name == DATABASE => {
                let mut target =
                    File::create(&snapshot).with_context(|| format!("cannot make {}", snapshot.display()))?;
                std::io::copy(&mut entry, &mut target).context("cannot copy the database")?;
                target.sync_all().context("cannot copy the database")?;
            }
            None if name == MANIFEST => {
                manifest = Some(serde_json::from_reader(&mut entry).context("the archive's manifest cannot be read")?);
            }
            _ => bail!("the archive has `{name}`, which no backup has"),
        }
    }
    let manifest = manifest.context("the archive is not whole: it has no manifest")?;
    ensure!(manifest.format == FORMAT, "the archive has format {}, this version reads {FORMAT}", manifest.format);
    let sha256 = sha256_of_file(&snapshot).context("the archive has no database")?;
    ensure!(sha256 == manifest.database_sha256, "the archive's database is damaged");
    check_and_settle(&snapshot, put).await?;
    let copy = database.with_extension("restoring");
    std::fs::copy(&snapshot, &copy).context("cannot copy the database")?;
    File::open(&copy).and_then(|file| file.sync_all()).context("cannot copy the database")?;
    settle(&copy, database)?;
    Ok(manifest)
}

/// Gives a file that is whole its name, for good.
///
/// # Errors
/// A name that the operating system refuses.
pub(super) fn settle(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::rename(from, to).with_context(|| format!("cannot make {}", to.display()))?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).with_context(|| format!("cannot sync {}", folder.display()))
}

async fn put_object(storage: &Storage, key: &str, entry: &mut Entry<'_, File>) -> anyhow::Result<Stored> {
    let size_bytes = entry.size();
    // The command does nothing else: that reading the archive blocks keeps nobody waiting.
    let chunks = futures::stream::iter(std::iter::from_fn(move || {
        let mut chunk = vec![0; CHUNK];
        match entry.read(&mut chunk) {
            Ok(0) => None,
            Ok(length) => {
                chunk.truncate(length);
                Some(Ok(Bytes::from(chunk)))
            }
            Err(error) => Some(Err(error)),
        }
    }));
    let stored = storage.put(key, chunks.boxed_local(), None).await?;
    if stored.size_bytes != size_bytes {
        storage.delete(key).await?;
        bail!("the archive ends after {} of its {size_bytes} bytes", stored.size_bytes);
    }
    Ok(stored)
}

/// Compares the objects with what the database says of them, and ends the attempts that lived when the backup was made: their processes
/// are not here.
async fn check_and_settle(snapshot: &Path, put: &HashMap<String, Stored>) -> anyhow::Result<()> {
    let store = Store::open(snapshot).await.context("the archive's database cannot be opened")?;
    let objects = store::object::all(&mut *store.read().await?).await?;
    for Named { key, size_bytes, sha256 } in &objects {
        let stored = put.get(key).with_context(|| format!("the archive lacks object {key}"))?;
        let same =
            stored.size_bytes == size_bytes.unsigned_abs() && sha256.as_ref().is_none_or(|hash| *hash == stored.sha256);
        ensure!(same, "object {key} of the archive is damaged");
    }
    ensure!(objects.len() == put.len(), "the archive has objects that its database does not name");
    let mut tx = store.begin_write().await?;
    store::attempt::end_all(&mut tx, now_ms()).await?;
    tx.commit().await?;
    store.close().await;
    Ok(())
}
