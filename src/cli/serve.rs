//! `lorad serve`: start everything in order, run, and stop it in the other order.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::future::Future;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::keep_private;
use crate::config::{Config, Flags};
use crate::http::{self, App};
use crate::hub::Hub;
use crate::jobs::devices::training_devices;
use crate::jobs::launcher::Launcher;
use crate::jobs::scheduler::Scheduler;
use crate::jobs::{Jobs, sweep};
use crate::storage::Storage;
use crate::store::Store;

/// Time that requests in flight have to end once the workers are gone.
const DRAIN: Duration = Duration::from_secs(10);

/// Runs the fine-tuning server.
///
/// Every setting has a default, so `lorad serve` alone gives a server on http://127.0.0.1:8080/v1 that keeps its database,
/// files and artifacts in the data folder and answers this machine only. Settings come, the later winning, from: the
/// defaults; the file given by --config, or lorad.toml in the current folder; variables named LORAD__SECTION__KEY; these flags.
/// A setting that does not exist is an error.
///
/// Trainings run in worker processes, one on each GPU, or on the CPU where there is none (`lorad devices` lists them). A server that is killed goes on where it was when it is started again;
/// Ctrl-C or SIGTERM lets a training end its step and save, stops the workers, and the training goes on at the next start. The log of
/// each worker stands in logs of the data folder until 30 days after its end.
#[derive(Debug, Clone, clap::Args)]
#[command(after_long_help = SETTINGS)]
pub struct Options {
    /// Configuration file in TOML [default: lorad.toml in the current folder, where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for the database, objects, logs and the workers' socket [default: ~/.local/share/lorad]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address of the API; port 0 takes a free one, which the log names [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Folder of the base models that jobs name `local:FILE.gguf` [default: models in the data folder]
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,
}

const SETTINGS: &str = "\
Settings, as in lorad.toml (`listen` of [server] is LORAD__SERVER__LISTEN in the environment):
  [server]
  listen = \"127.0.0.1:8080\"      address of the API; another than loopback needs a key
  data_dir = \"DIR\"               folder for everything that is kept
  max_upload_bytes = 8589934592  largest file that may be uploaded
  idle_seconds = 60              how long a client may take for a request's headers, or keep silent within its body
  [database]
  path = \"FILE\"                  SQLite file; default lorad.db in the data folder
  [storage]
  url = \"file:DIR\"               where files, checkpoints and artifacts are kept: file:DIR, memory:, s3://BUCKET/PREFIX,
                                 gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; no two servers may share it
  endpoint = \"URL\"              of an S3-compatible service, a gateway or an emulator; default that of AWS, Google, Azure
  region = \"us-east-1\"          s3: region of the bucket
  access_key_id = \"ID\"          s3: the key, with
  secret_access_key = \"SECRET\"  its secret
  account = \"NAME\"              az: the storage account, with
  account_key = \"SECRET\"        its key
  credentials_file = \"FILE\"     gs: key file of a service account
  allow_http = false             whether an endpoint on another machine may be plain http:
  timeout_seconds = 30           longest silence of the service, and how long a request that fails is tried again
  presign = false                whether downloads are redirected to the service, by URLs signed for five minutes
  [retention]                    days that things are kept; without a number for ever
  files_days = 90                files, from their upload; those that unfinished jobs need stay
  checkpoints_days = 30          listed checkpoints, from the end of their job
  artifacts_days = 365           artifacts, from the end of their job, or from their making after it
  [auth]
  bootstrap_key = \"KEY\"          an API key of the owner `default`, beside those of `lorad keys create`; without any key
                                 anybody on this machine may call
  [workers]
  devices = \"auto\"               what to train on: auto (every GPU, the CPU only where there is none), cpu, or GPUs
                                 by their numbers: cuda:0, cuda:0,1
  listen = \"ADDR\"                TCP address for workers instead of a Unix socket in the data folder
  lease_seconds = 30             how long a silent worker counts as alive
  stall_seconds = 3600           how long a worker may make no progress
  checkpoint_seconds = 60        longest time between two checkpoints to resume from
  pause_seconds = 60             how long a training may take to end its step and save, when paused or the server stops
  memory_bytes = 0               memory of this machine that a training on the CPU may have; 0: all that there is
  threads = 0                    threads of a worker's arithmetic; 0: one per processor
  executable = \"FILE\"            program that is started as a worker; default: this one
  [models]
  dir = \"DIR\"                    folder of local: base models; default models in the data folder
  cache_dir = \"DIR\"              folder of downloaded base models; default ~/.cache/lorad
  [limits]
  validations = 2                data sets validated at once, beside a training
  inspections = 2                reports, previews and estimates answered at once
  inspection_seconds = 300       how long one of them may take

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE say how a model hub is reached, RUST_LOG what is logged, LORAD_LOG_FORMAT (text or json) how.
CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER say which GPUs there are and how they are counted, LD_LIBRARY_PATH where CUDA's libraries are.
What [storage] does not say of a service, AWS_*, GOOGLE_* and AZURE_* variables may: docs/STORAGE.md has a recipe for each.";

/// Serves until Ctrl-C or SIGTERM.
///
/// # Errors
/// A configuration that cannot be used, a data folder that is in use, an address that is taken, a task that failed.
pub fn run(options: Options) -> anyhow::Result<()> {
    let Options { config, data_dir, listen, models_dir } = options;
    let config = Config::load(&Flags { config, data_dir, listen, models_dir })?;
    keep_private();
    let runtime = tokio::runtime::Runtime::new().context("cannot start the async runtime")?;
    runtime.block_on(serve(&config))
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    let data_dir = private_folder(&config.server.data_dir)?;
    let _lock = lock(&data_dir)?;
    let devices = training_devices(config).await?;
    let store = Store::open(&config.database_path()).await.context("cannot open the database")?;
    let storage = Storage::from_config(config)?;
    storage.probe(config).await?;
    let half_written = storage.remove_half_written().await?;
    if half_written > 0 {
        tracing::info!(count = half_written, "removed objects that an earlier server left half-written");
    }
    let jobs = Jobs::new(store.clone(), storage.clone());
    let shutdown = CancellationToken::new();
    let app = App::new(config, jobs.clone(), Hub::from_config(config), &devices, shutdown.clone()).await?;

    // Workers are stopped before the listener that they call, so that none dies of the shutdown.
    let workers_gone = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let server = listen_to_workers(config, &data_dir, &app, &workers_gone, &mut tasks).await?;
    let launcher = Launcher::new(config, server);
    let listener = TcpListener::bind(config.server.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", config.server.listen))?;
    let address = listener.local_addr().context("the listener has no address")?;
    let served = http::serve(listener, http::public_router(app), config.patience(), shutdown.clone());
    tasks.spawn(async move {
        served.await;
        Ok(())
    });
    tasks.spawn(named(
        "the sweep",
        sweep::run(jobs.clone(), launcher.clone(), config.retention.clone(), shutdown.clone()),
    ));
    let scheduler = Scheduler::new(config, jobs, launcher, devices);
    let scheduled = scheduler.run(shutdown.clone());
    let gone = workers_gone.clone();
    tasks.spawn(named("the scheduler", async move {
        // Also where the scheduler panics: the workers' API must end for the server to end.
        let _gone = gone.drop_guard();
        scheduled.await
    }));
    tracing::info!(%address, data_dir = %data_dir.display(), "listening on http://{address}/v1");

    let result = supervise(tasks, (&shutdown, &workers_gone), DRAIN).await;
    if tokio::time::timeout(DRAIN, storage.close()).await.is_err() {
        tracing::warn!("uploads that were broken off may have left parts in the object storage");
    }
    store.close().await;
    result
}

/// Waits for a signal, or for a task to end that should not; then lets all tasks end: the workers, which the scheduler bounds,
/// and from then on what is in flight, for the time `drain`.
async fn supervise(
    mut tasks: JoinSet<anyhow::Result<()>>,
    (shutdown, workers_gone): (&CancellationToken, &CancellationToken),
    drain: Duration,
) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut result = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        Some(ended) = tasks.join_next() => flatten(ended).and_then(|()| bail!("a task of the server ended")),
    };
    match &result {
        Ok(()) => tracing::info!("stopping"),
        // At once: the drain below takes its time.
        Err(error) => tracing::error!("stopping: {error:#}"),
    }
    shutdown.cancel();
    let drained = async {
        while let Some(ended) = tasks.join_next().await {
            let ended = flatten(ended);
            if result.is_ok() {
                result = ended;
            }
        }
    };
    tokio::select! {
        () = drained => (),
        () = async { workers_gone.cancelled().await; tokio::time::sleep(drain).await } => {
            tracing::warn!("requests are still in flight after {} s, ending them", drain.as_secs());
        }
        _ = interrupt.recv() => bail!("stopped at once by a second signal"),
        _ = terminate.recv() => bail!("stopped at once by a second signal"),
    }
    result
}

/// A task that panicked is an error as well.
fn flatten(ended: Result<anyhow::Result<()>, tokio::task::JoinError>) -> anyhow::Result<()> {
    ended.context("a task of the server panicked")?
}

async fn named<E>(name: &'static str, task: impl Future<Output = Result<(), E>>) -> anyhow::Result<()>
where
    E: std::error::Error + Send + Sync + 'static,
{
    task.await.with_context(|| format!("{name} failed"))
}

/// Opens the workers' listener and returns the address that a worker is told.
async fn listen_to_workers(
    config: &Config,
    data_dir: &Path,
    app: &App,
    shutdown: &CancellationToken,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<String> {
    let router: Router = http::worker_router(app.clone());
    let shutdown = shutdown.clone().cancelled_owned();
    if let Some(address) = config.workers.listen {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("cannot listen on {address} for workers"))?;
        let address = listener.local_addr().context("the workers' listener has no address")?;
        let served = axum::serve(listener, router).with_graceful_shutdown(shutdown);
        tasks.spawn(named("the workers' API", served.into_future()));
        return Ok(format!("http://{address}"));
    }
    let socket = data_dir.join("worker.sock");
    // This server holds the lock of the data folder: a socket that is there belongs to none.
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", socket.display()));
        }
        _ => (),
    }
    let listener = UnixListener::bind(&socket).with_context(|| {
        format!("cannot make the socket {} (its path may have 107 bytes; or set workers.listen)", socket.display())
    })?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", socket.display()))?;
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown);
    tasks.spawn(named("the workers' API", served.into_future()));
    Ok(format!("unix:{}", socket.display()))
}

/// Makes the data folder and returns its absolute path.
pub(super) fn private_folder(path: &Path) -> anyhow::Result<PathBuf> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| path.canonicalize())
        .with_context(|| format!("cannot make the data folder {}", path.display()))
}

/// Two servers on one data folder would take each other's workers for dead.
pub(super) fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("lorad.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another server uses the data folder {}", data_dir.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_error_of_a_task_outlives_requests_in_flight() {
        let mut tasks = JoinSet::new();
        tasks.spawn(std::future::pending());
        tasks.spawn(async { panic!("out of order") });
        let workers_gone = CancellationToken::new();
        workers_gone.cancel();
        let ended = supervise(tasks, (&CancellationToken::new(), &workers_gone), Duration::ZERO).await;
        let error = ended.expect_err("a task that panicked");
        assert_eq!(error.to_string(), "a task of the server panicked");
    }
}
