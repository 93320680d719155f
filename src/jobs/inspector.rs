//! Questions about a data set or a training to be, each answered by a process of its own (`lorad inspect`): the server never reads
//! what strangers wrote. Nothing of it is kept; a caller who goes away takes the process with it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::TryStreamExt;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::launcher::{Launcher, describe};
use super::{Error, Jobs, Result};
use crate::config::Config;
use crate::storage::Expected;
use crate::types::file::File;
use crate::types::inspection::{Answer, Inspection, Question};
use lorad_engine::spec::TrainSpec;

/// Longest wait for the process before to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// What is kept of a process's log.
const MAX_LOG_BYTES: usize = 4096;

/// Asks processes of this machine, a bounded number at once; clones share the bound.
#[derive(Debug, Clone)]
pub struct Inspector {
    launcher: Launcher,
    free: Arc<Semaphore>,
    time: Duration,
}

/// What is asked about, in the caller's words.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The base model.
    pub model: &'a str,
    /// Every hyperparameter.
    pub spec: &'a TrainSpec,
    /// The data set.
    pub training_file: &'a File,
    /// The data set whose loss is watched.
    pub validation_file: Option<&'a File>,
}

impl Inspector {
    /// An inspector with the configuration's bounds.
    pub fn new(config: &Config) -> Self {
        Self {
            // Such a process talks to nobody.
            launcher: Launcher::new(config, "none".to_owned()),
            free: Arc::new(Semaphore::new(config.limits.inspections as usize)),
            time: Duration::from_secs(config.limits.inspection_seconds.into()),
        }
    }

    /// Finds the answer.
    ///
    /// # Errors
    /// Others are still being answered, an answer that takes too long, a process that died, a file that cannot be read.
    pub async fn ask(&self, jobs: &Jobs, question: Question, subject: Subject<'_>) -> Result<Answer> {
        let free = tokio::time::timeout(PATIENCE, self.free.acquire()).await;
        let _permit = free.ok().and_then(std::result::Result::ok).ok_or(Error::TooManyInspections)?;
        let answer = tokio::time::timeout(self.time, self.answer(jobs, question, subject)).await;
        answer.map_err(|_| Error::InspectionTooLong { seconds: self.time.as_secs() })?
    }

    async fn answer(&self, jobs: &Jobs, question: Question, subject: Subject<'_>) -> Result<Answer> {
        let launcher = self.launcher.clone();
        let scratch = tokio::task::spawn_blocking(move || launcher.inspection_folder()).await?;
        let scratch = scratch.map_err(|error| Error::Inspection(format!("{error:#}")))?;
        let training_file = scratch.path().join("training_file");
        fetch(jobs, subject.training_file, &training_file).await?;
        let validation_file = match subject.validation_file {
            None => None,
            Some(file) => {
                let path = scratch.path().join("validation_file");
                fetch(jobs, file, &path).await?;
                Some(path)
            }
        };
        let (model, spec) = (subject.model.to_owned(), subject.spec.clone());
        let inspection = Inspection { question, model, spec, training_file, validation_file };
        let answer = self.run(&inspection, &scratch).await;
        answer.map_err(|error| {
            tracing::warn!("an inspection failed: {error:#}");
            Error::Inspection(error.to_string())
        })
    }

    /// Runs the process; an error's first sentence is for the caller.
    async fn run(&self, inspection: &Inspection, scratch: &TempDir) -> anyhow::Result<Answer> {
        let mut command = self.launcher.command("inspect", scratch.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("no process can be started now")?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(stdout), Some(mut stderr)) = pipes else {
            anyhow::bail!("no process can be started now");
        };
        let question = serde_json::to_vec(inspection)?;
        let ask = async move {
            // A process that ended says why in its log.
            let _ = stdin.write_all(&question).await;
        };
        let mut answer = Vec::new();
        let mut stdout = stdout.take(MAX_ANSWER_BYTES + 1);
        let log = async move {
            let (mut log, mut chunk) = (Vec::new(), [0; 1024]);
            while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
                log.extend_from_slice(&chunk[..length]);
                log.drain(..log.len().saturating_sub(MAX_LOG_BYTES));
            }
            String::from_utf8_lossy(&log).trim().to_owned()
        };
        let listen = async {
            let read = stdout.read_to_end(&mut answer).await;
            // One that says too much would wait for ever to be heard.
            drop(stdout);
            read
        };
        let ((), read, log, status) = tokio::join!(ask, listen, log, child.wait());
        let length = read.context("the process does not answer")? as u64;
        anyhow::ensure!(
            length <= MAX_ANSWER_BYTES,
            "the answer is longer than {MAX_ANSWER_BYTES} bytes: ask for fewer rows"
        );
        let status = status.context("the process ended in an unknown way")?;
        if !status.success() {
            return Err(anyhow::anyhow!("its log ends with: {log}"))
                .with_context(|| format!("the process that read the data ended with {}", describe(status)));
        }
        serde_json::from_slice(&answer).context("the process's answer cannot be read")
    }
}

/// Copies a file of the storage, which checks that it is what was uploaded.
async fn fetch(jobs: &Jobs, file: &File, target: &Path) -> Result<()> {
    let broken = |error: std::io::Error| Error::Inspection(format!("{} cannot be copied: {error}", file.id));
    let expected =
        Expected { key: &file.object_key, size_bytes: file.size_bytes.unsigned_abs(), sha256: Some(&file.sha256) };
    let mut body = jobs.storage.get(expected).await?;
    let mut out = tokio::fs::File::create(target).await.map_err(broken)?;
    while let Some(chunk) = body.try_next().await? {
        out.write_all(&chunk).await.map_err(broken)?;
    }
    out.flush().await.map_err(broken)
}
