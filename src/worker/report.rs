//! What a worker reports while it works, sent to the server in the order in which it happened.
//!
//! The engine's thread puts reports into a bounded channel and works on; here they become requests. Steps are sent many at
//! once where they came faster than the server answers, and before a checkpoint or an artifact is sent everything that
//! happened before it has been. When the server is away the channel fills and the engine waits.

use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::sync::mpsc::Receiver;

use super::Pause;
use super::client::{Client, Error};
use crate::hub;
use crate::types::artifact::{ArtifactRequest, Parity};
use crate::types::metric::Metric;
use crate::types::worker_protocol::{
    ARTIFACTS_PATH, ArtifactQuery, CHECKPOINTS_PATH, CheckpointQuery, EVENTS_PATH, Events, Reply,
};

/// Reports that may wait.
pub(super) const CAPACITY: usize = 64;

/// One thing that happened.
#[derive(Debug)]
pub(super) enum Report {
    /// A step was trained.
    Step(Metric),
    /// A checkpoint was written.
    Checkpoint {
        /// The file, removed once it is sent.
        path: PathBuf,
        /// The step after which it was taken.
        step: u32,
        /// Whether the API shows it.
        listed: bool,
    },
    /// An artifact was written.
    Artifact {
        /// The file, removed once it is sent.
        path: PathBuf,
        /// What it is.
        request: ArtifactRequest,
        /// The name to save it under.
        filename: String,
        /// How close it is to what was trained.
        parity: Parity,
    },
}

/// Sends everything that comes until the engine's side is dropped, and takes note of it if the server wants a pause.
pub(super) async fn forward(client: Client, mut inbox: Receiver<Report>, pause: Pause) -> Result<(), Error> {
    let mut waiting = Vec::with_capacity(CAPACITY);
    while inbox.recv_many(&mut waiting, CAPACITY).await > 0 {
        let mut steps = Events::default();
        for report in waiting.drain(..) {
            match report {
                Report::Step(metric) => steps.metrics.push(metric),
                Report::Checkpoint { path, step, listed } => {
                    send(&client, &mut steps, &pause).await?;
                    let query = CheckpointQuery { step, listed, sha256: hash(&path).await? };
                    client.upload(CHECKPOINTS_PATH, &query, &path).await?;
                    remove(&path)?;
                }
                Report::Artifact { path, request, filename, parity } => {
                    send(&client, &mut steps, &pause).await?;
                    let ArtifactRequest { kind, quantization } = request;
                    let (sha256, parity) = (hash(&path).await?, Some(parity.to_string()));
                    let query = ArtifactQuery { kind, quantization, filename, sha256, parity };
                    client.upload(ARTIFACTS_PATH, &query, &path).await?;
                    remove(&path)?;
                }
            }
        }
        send(&client, &mut steps, &pause).await?;
    }
    Ok(())
}

async fn send(client: &Client, events: &mut Events, pause: &Pause) -> Result<(), Error> {
    let events = std::mem::take(events);
    if !events.metrics.is_empty() {
        let reply: Reply = client.post(EVENTS_PATH, &events).await?;
        pause.told(reply.action);
    }
    Ok(())
}

async fn hash(path: &Path) -> Result<String, Error> {
    let path = path.to_owned();
    let hash = tokio::task::spawn_blocking(move || {
        hub::sha256_of_file(&path).with_context(|| format!("cannot read {}", path.display()))
    });
    Ok(hash.await.context("hashing a file panicked")??)
}

fn remove(path: &Path) -> Result<(), Error> {
    Ok(std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?)
}
