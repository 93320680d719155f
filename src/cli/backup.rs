//! `lorad backup` and `lorad restore`: everything that a server keeps, as one file.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use super::serve::{lock, private_folder};
use super::{archive, keep_private};
use crate::config::{Config, Flags, Location};
use crate::storage::Storage;
use crate::store::Store;

/// Writes database, files, checkpoints and artifacts of a server into one `.tar`; the server may run.
///
/// The archive is what the database held at one moment; a checkpoint that a running training replaced before it was copied is left out,
/// and told. It has API keys as hashes and everybody's data: keep it as you keep the data folder.
/// Base models, logs and the configuration are not in it.
#[derive(Debug, Args)]
pub struct BackupArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The archive to make
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
}

/// Brings a backup into an empty data folder and an empty storage, of whatever kind; no server may run.
///
/// Everything is compared with its hash before the server has it. Trainings that ran when the backup was made go on from the newest
/// checkpoint that it has of them, or begin again. A restore that was killed leaves objects that must be removed by hand: the folders files,
/// jobs and uploads of the storage.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The archive to read
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
}

#[derive(Debug, Args)]
struct ServerArgs {
    /// Configuration file in TOML [default: lorad.toml in the current folder, where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The server's data folder [default: ~/.local/share/lorad]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl ServerArgs {
    fn load(self) -> anyhow::Result<Config> {
        let Self { config, data_dir } = self;
        let config = Config::load(&Flags { config, data_dir, ..Flags::default() })?;
        if config.storage_location()? == Location::Memory {
            bail!("storage.url is `memory:`: such objects live in the server's process alone");
        }
        keep_private();
        Ok(config)
    }
}

/// Runs `lorad backup`.
///
/// # Errors
/// A server whose database or objects cannot be read, a file that cannot be written.
pub fn back_up(args: BackupArgs) -> anyhow::Result<()> {
    let BackupArgs { server, to } = args;
    let config = server.load()?;
    let database = config.database_path();
    if !database.exists() {
        bail!("there is no database {}: name the server's --data-dir or --config", database.display());
    }
    if to.exists() {
        bail!("{} is there already", to.display());
    }
    let scratch = scratch_beside(&to)?;
    let part = scratch.path().join("archive");
    let manifest = run(async {
        let (store, storage) = (Store::open_as_it_is(&database).await?, Storage::from_config(&config)?);
        let manifest = archive::back_up(&store, &storage, &part, scratch.path()).await;
        store.close().await;
        manifest
    })?;
    archive::settle(&part, &to)?;
    eprintln!("{}: the database and {} objects of {} bytes", to.display(), manifest.objects, manifest.object_bytes);
    if manifest.forgotten > 0 {
        eprintln!(
            "{} objects were removed or replaced while the others were copied, and are left out",
            manifest.forgotten
        );
    }
    Ok(())
}

/// Runs `lorad restore`.
///
/// # Errors
/// A data folder or a storage that is not empty, an archive that is not whole, a server that runs.
pub fn restore(args: RestoreArgs) -> anyhow::Result<()> {
    let RestoreArgs { server, from } = args;
    let config = server.load()?;
    let data_dir = private_folder(&config.server.data_dir)?;
    let _lock = lock(&data_dir)?;
    let scratch = scratch_beside(&data_dir.join("restore"))?;
    let manifest = run(async {
        let storage = Storage::from_config(&config)?;
        let restored = archive::restore(&from, &config.database_path(), &storage, scratch.path()).await;
        storage.close().await;
        restored
    })
    .with_context(|| format!("cannot restore {}", from.display()))?;
    eprintln!("restored the database and {} objects of {} bytes", manifest.objects, manifest.object_bytes);
    Ok(())
}

/// A folder on the disk of `path`, which goes with its handle.
fn scratch_beside(path: &Path) -> anyhow::Result<tempfile::TempDir> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = tempfile::Builder::new().prefix(".lorad-backup-").tempdir_in(parent);
    folder.with_context(|| format!("cannot make a folder in {}", parent.display()))
}

fn run<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(work)
}
