//! `lorad worker`: one task of a job in a process of its own: fetch, work, upload.
//!
//! The engine works on a thread of its own and never waits for the network but where its reports pile up; a small async
//! runtime beside it sends heartbeats and reports. The process ends as soon as the task is done, the server wants it no more,
//! or the lease is over, whatever the engine is doing then.

mod artifacts;
mod client;
mod export;
mod failure;
pub mod inspect;
mod report;
mod task;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use secrecy::SecretString;

use crate::hub::{self, Hub};
use crate::types::worker_protocol::{Action, FINISH_PATH, Finish, HEARTBEAT_PATH, Heartbeat, Reply, TASK_PATH, Task};
use client::{Client, Error};

/// What `lorad worker` is told on its command line; the token comes on stdin.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The server to work for: `unix:PATH` or `http://HOST:PORT`.
    #[arg(long)]
    server: String,
    /// Folder for this attempt's files; the caller removes it afterwards.
    #[arg(long)]
    scratch: PathBuf,
    /// Folder of `local:` base models.
    #[arg(long)]
    models_dir: PathBuf,
    /// Folder of downloaded base models.
    #[arg(long)]
    cache_dir: PathBuf,
}

/// Counts whatever gets the work on; heartbeats carry it, so that the server can tell a slow worker from a stuck one.
#[derive(Debug, Clone, Default)]
struct Progress(Arc<AtomicU64>);

impl Progress {
    fn made(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Whether the server wants the training to end after its step, and whether there is one; the engine's thread asks between steps.
#[derive(Debug, Clone, Default)]
struct Pause(Arc<PauseState>);

#[derive(Debug, Default)]
struct PauseState {
    wanted: AtomicBool,
    training: AtomicBool,
}

impl Pause {
    /// Takes note of what the server said; `true`: it wants a pause, and no step is there to be ended.
    fn told(&self, action: Action) -> bool {
        let wanted = action == Action::Pause;
        if wanted {
            self.0.wanted.store(true, Ordering::Relaxed);
        }
        wanted && !self.0.training.load(Ordering::Relaxed)
    }

    fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::Relaxed)
    }

    /// Steps begin, or are over.
    fn set_training(&self, training: bool) {
        self.0.training.store(training, Ordering::Relaxed);
    }
}

/// Works off the task that the token on stdin stands for.
///
/// # Errors
/// Anything that is not the job's own fault; the server then makes another attempt.
pub fn run(options: Options) -> anyhow::Result<()> {
    lorad_engine::allocator::keep_freed_memory();
    let mut token = String::new();
    std::io::stdin().read_line(&mut token).context("cannot read the token from stdin")?;
    let token = token.trim();
    anyhow::ensure!(!token.is_empty(), "no token came on stdin");
    let progress = Progress::default();
    let client = Client::new(&options.server, SecretString::from(token), progress.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let result = runtime.block_on(attempt(client, progress, &options));
    // The engine's thread may still compute; nobody wants what it would find.
    runtime.shutdown_background();
    match result {
        Ok(()) => Ok(()),
        Err(Error::Ended) => {
            tracing::info!("the server has ended this attempt");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

async fn attempt(client: Client, progress: Progress, options: &Options) -> Result<(), Error> {
    let task: Task = client.get(TASK_PATH).await?;
    client.set_lease(Duration::from_secs(task.lease_seconds));
    tracing::info!(attempt = %task.attempt_id, job.id = %task.job_id, task = %task.kind, device = %task.device, "attempt started");
    let downloaded = progress.clone();
    let hub = Hub::new(hub::Options {
        models_dir: options.models_dir.clone(),
        cache_dir: options.cache_dir.clone(),
        endpoint: None,
        offline: hub::offline(),
    })
    .with_progress(move || downloaded.made());
    let pause = Pause::default();
    let finish = tokio::select! {
        finish = task::perform(&client, &task, hub, &options.scratch, (progress.clone(), pause.clone())) => match finish {
            Err(Error::Damaged { path, how }) => failure::of_damaged(path, &how),
            finish => finish?,
        },
        stopped = heartbeats(&client, &task, &progress, &pause) => {
            stopped?;
            Finish::Stopped
        }
    };
    match &finish {
        Finish::Succeeded { .. } => tracing::info!("task done"),
        Finish::Failed { code, .. } => tracing::info!(code, "task cannot be done"),
        Finish::Stopped => tracing::info!("stopped by the server"),
    }
    client.post::<_, serde_json::Value>(FINISH_PATH, &finish).await?;
    Ok(())
}

/// Sends heartbeats until the server says stop, or wants a pause where no step is to be ended.
async fn heartbeats(client: &Client, task: &Task, progress: &Progress, pause: &Pause) -> Result<(), Error> {
    let mut beat = tokio::time::interval(Duration::from_secs(task.heartbeat_seconds.max(1)));
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        let heartbeat = Heartbeat { progress: Some(progress.count()) };
        let reply: Reply = client.renew(HEARTBEAT_PATH, &heartbeat).await?;
        if reply.action == Action::Stop || pause.told(reply.action) {
            return Ok(());
        }
    }
}
