//! Questions about a data set or a training to be, each answered by a process of its own (`lorad inspect`): the server never reads
//! what strangers wrote. Nothing of it is kept; a caller who goes away takes the process with it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use futures::TryStreamExt;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::ChildStderr;
use tokio::sync::Semaphore;

use super::launcher::{Launcher, describe};
use super::{Error, Jobs, Result};
use crate::config::Config;
use crate::storage::Expected;
use crate::types::file::File;
use crate::types::inspection::{Answer, Inspection, Question, Subject};

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

/// The folder of an inspection's files, which goes with it; removing gigabytes takes a thread that may wait.
struct Scratch(Option<TempDir>);

impl Drop for Scratch {
    fn drop(&mut self) {
        let folder = self.0.take();
        // At the very end of the server there is no runtime: then nobody is kept waiting either.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(folder));
        }
    }
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
        let folder = tokio::task::spawn_blocking(move || launcher.inspection_folder()).await?;
        let folder = folder.map_err(Error::Inspector)?;
        let path = folder.path().to_owned();
        let _scratch = Scratch(Some(folder));
        let training_file = path.join("training_file");
        fetch(jobs, subject.training_file, &training_file).await?;
        let validation_file = match subject.validation_file {
            None => None,
            Some(file) => {
                let path = path.join("validation_file");
                fetch(jobs, file, &path).await?;
                Some(path)
            }
        };
        let (model, spec, seconds) = (subject.model.to_owned(), subject.spec.clone(), self.time.as_secs());
        let inspection = Inspection { question, model, spec, training_file, validation_file, seconds };
        self.run(&inspection, &path).await
    }

    async fn run(&self, inspection: &Inspection, scratch: &Path) -> Result<Answer> {
        let mut command = self.launcher.command("inspect", scratch);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("no process can be started").map_err(Error::Inspector)?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(mut stdin), Some(mut stdout), Some(stderr)) = pipes else {
            return Err(Error::Inspector(anyhow!("a process has no pipes")));
        };
        let question = serde_json::to_vec(inspection).context("a question is JSON").map_err(Error::Inspector)?;
        let ask = async move {
            // A process that ended says why in its log.
            let _ = stdin.write_all(&question).await;
        };
        let listen = async move {
            let mut answer = Vec::new();
            let read = (&mut stdout).take(MAX_ANSWER_BYTES + 1).read_to_end(&mut answer).await;
            // One that says too much would wait for ever to be heard.
            drop(stdout);
            read.map(|_| answer)
        };
        let ((), answer, log, status) = tokio::join!(ask, listen, last_of(stderr), child.wait());
        let answer = answer.context("a process's answer cannot be read").map_err(Error::Inspector)?;
        if answer.len() as u64 > MAX_ANSWER_BYTES {
            return Err(Error::Inspection(format!("the answer is longer than {MAX_ANSWER_BYTES} bytes, ask for less")));
        }
        let status = status.context("a process ended in an unknown way").map_err(Error::Inspector)?;
        if !status.success() {
            tracing::warn!(log, "an inspection's process ended with {}", describe(status));
            return Err(Error::Inspection(format!("the process that read it ended with {}", describe(status))));
        }
        let answer = tokio::task::spawn_blocking(move || serde_json::from_slice(&answer)).await?;
        answer.context("a process's answer is not understood").map_err(Error::Inspector)
    }
}

/// The last of what a process writes into its log.
async fn last_of(mut stderr: ChildStderr) -> String {
    let (mut log, mut chunk) = (Vec::new(), [0; 1024]);
    while let Ok(length @ 1..) = stderr.read(&mut chunk).await {
        log.extend_from_slice(&chunk[..length]);
        log.drain(..log.len().saturating_sub(MAX_LOG_BYTES));
    }
    String::from_utf8_lossy(&log).trim().to_owned()
}

/// Copies a file of the storage, which checks that it is what was uploaded.
async fn fetch(jobs: &Jobs, file: &File, target: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::Inspector(anyhow!(error).context(format!("cannot copy {}", file.id)));
    let expected =
        Expected { key: &file.object_key, size_bytes: file.size_bytes.unsigned_abs(), sha256: Some(&file.sha256) };
    let mut body = jobs.storage.get(expected).await?;
    let mut out = tokio::fs::File::create(target).await.map_err(failed)?;
    while let Some(chunk) = body.try_next().await? {
        out.write_all(&chunk).await.map_err(failed)?;
    }
    out.flush().await.map_err(failed)
}
