//! The tasks: validate a data set, train on it, and (`export.rs`) export what was trained.
//!
//! The first two read the base model and the data set in the same way, so that what validation let pass is what training sees.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use lorad_engine::data::{self, Dataset};
use lorad_engine::device::Device;
use lorad_engine::export::TrainingFacts;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::{Llama, untrained_tokens};
use lorad_engine::spec::TrainSpec;
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train::{self, Best, Checkpoint, Outcome, Start, StepMetrics, TrainEvent};
use tokio::sync::{mpsc, oneshot};

use super::artifacts::{self, Made, Trained};
use super::client::{Client, Error};
use super::export::export;
use super::failure::{self, Fault, Ours};
use super::report::{self, Report};
use super::{Pause, Progress};
use crate::hub::{self, BaseModel, Hub};
use crate::memory::Bound;
use crate::types::attempt::TaskKind;
use crate::types::event::{EventType, Level};
use crate::types::metric::Metric;
use crate::types::worker_protocol::{
    CHECKPOINT_PATH, DataFile, Finish, INIT_FROM_PATH, TRAINING_FILE_PATH, Task, VALIDATION_FILE_PATH, WorkerEvent,
};

/// How long a download that fails is tried again before the job fails.
const DOWNLOAD_PATIENCE: Duration = Duration::from_secs(180);
/// Wait before the first time that it is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest wait before it is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Does the task and returns what to say at its end.
pub(super) async fn perform(
    client: &Client,
    task: &Task,
    hub: Hub,
    scratch: &Path,
    (progress, pause): (Progress, Pause),
) -> Result<Finish, Error> {
    let base = match fetch_base(hub, &task.base_model.name, FIRST_PAUSE, &progress).await? {
        Ok(base) => base.path,
        Err(error) => return Ok(failure::of_hub(error)?),
    };
    progress.made();
    let training_file = fetch(client, TRAINING_FILE_PATH, scratch, task.training_file.as_ref().map(sha256)).await?;
    let validation_file =
        fetch(client, VALIDATION_FILE_PATH, scratch, task.validation_file.as_ref().map(sha256)).await?;
    progress.made();
    let scratch = scratch.to_owned();
    let inputs = Inputs { base, training_file, validation_file, init_from: None, scratch, task: task.clone() };
    match task.kind {
        TaskKind::Validate => validate(inputs, progress).await,
        TaskKind::Train => train(client, inputs, (progress, pause)).await,
        TaskKind::Export => export(client, inputs, progress).await,
    }
}

/// Finds the base model, and tries again for a while where a download failed for reasons that may pass.
async fn fetch_base(
    hub: Hub,
    name: &str,
    first_pause: Duration,
    progress: &Progress,
) -> anyhow::Result<Result<BaseModel, hub::Error>> {
    let begin = Instant::now();
    let mut pause = first_pause;
    loop {
        let (hub, wanted) = (hub.clone(), name.to_owned());
        let found = tokio::task::spawn_blocking(move || hub.fetch(&wanted));
        let error = match found.await.context("finding the base model panicked")? {
            Err(error) if error.may_pass() && begin.elapsed() + pause < DOWNLOAD_PATIENCE => error,
            found => return Ok(found),
        };
        tracing::warn!(error = &error as &dyn std::error::Error, "trying again in {pause:?}");
        progress.made();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn sha256(file: &DataFile) -> &str {
    &file.sha256
}

/// Downloads what the task has, under the last part of its path.
pub(super) async fn fetch(
    client: &Client,
    path: &'static str,
    scratch: &Path,
    sha256: Option<&str>,
) -> Result<Option<PathBuf>, Error> {
    let Some(sha256) = sha256 else { return Ok(None) };
    let target = scratch.join(path.rsplit('/').next().unwrap_or(path));
    client.download(path, &target, sha256).await?;
    Ok(Some(target))
}

/// What the engine's thread works on.
pub(super) struct Inputs {
    base: PathBuf,
    training_file: Option<PathBuf>,
    validation_file: Option<PathBuf>,
    /// The archive of the adapter to begin with, or to export.
    pub(super) init_from: Option<PathBuf>,
    pub(super) scratch: PathBuf,
    pub(super) task: Task,
}

impl Inputs {
    pub(super) fn ours(&self) -> Ours {
        let (base, scratch) = (self.base.clone(), self.scratch.clone());
        Ours { base, base_name: self.task.base_model.name.clone(), scratch }
    }

    pub(super) fn load_model(&self, progress: &Progress) -> lorad_engine::Result<(GgufFile, Llama, Tokenizer)> {
        let base = GgufFile::open(&self.base)?;
        let llama = Llama::load(&base)?;
        let tokenizer = Tokenizer::from_gguf(&base)?;
        progress.made();
        Ok((base, llama, tokenizer))
    }

    /// The training data set, and the one that evaluations take.
    fn read_data(
        &self,
        tokenizer: &Tokenizer,
        context_length: usize,
        progress: &Progress,
    ) -> Result<(Dataset, Option<Dataset>), Fault> {
        let (spec, scratch) = (&self.task.spec, &self.scratch);
        let _bound = Bound::begin();
        let mut on_progress = || progress.made();
        let mut read = |path: &Path| data::prepare(path, spec, tokenizer, context_length, scratch, &mut on_progress);
        let training = read(self.training_file()?)?;
        let validation = self.validation_file.as_deref().map(read).transpose().map_err(Fault::OfValidationFile)?;
        progress.made();
        Ok((training, validation))
    }

    fn training_file(&self) -> lorad_engine::Result<&Path> {
        let missing = || lorad_engine::Error::Training { step: 0, message: "the task has no training file".to_owned() };
        self.training_file.as_deref().ok_or_else(missing)
    }
}

async fn validate(inputs: Inputs, progress: Progress) -> Result<Finish, Error> {
    let ours = inputs.ours();
    let reports = on_engine_thread(move || {
        let (base, llama, tokenizer) = inputs.load_model(&progress)?;
        artifacts::check(&inputs.task, &base, &tokenizer)?;
        let (training, validation) = inputs.read_data(&tokenizer, llama.config().context_length, &progress)?;
        let (memory_bytes, device) = (inputs.task.memory_bytes, inputs.task.device);
        let fit = train::fit(&inputs.task.spec, &llama, &training, validation.as_ref(), memory_bytes, device)?;
        if !fit.fits {
            return Err(Fault::DoesNotFit(fit));
        }
        let (training, validation) = (training.report, validation.map(|dataset| dataset.report));
        let untrained = untrained_tokens(&base, &training.control_tokens)?.into_iter();
        let untrained = untrained.filter_map(|id| tokenizer.token_text(id)).map(str::to_owned).collect::<Vec<_>>();
        Ok((training, untrained, validation))
    });
    Ok(match reports.await? {
        Ok((training, untrained, validation)) => {
            let events = failure::findings((&training, &untrained), validation.as_ref());
            Finish::Succeeded { trained_tokens: None, events }
        }
        Err(fault) => failure::of_engine(fault, &ours)?,
    })
}

async fn train(client: &Client, mut inputs: Inputs, (progress, pause): (Progress, Pause)) -> Result<Finish, Error> {
    let checkpoint = match &inputs.task.resume {
        None => None,
        Some(resume) => {
            let path = inputs.scratch.join("resume");
            client.download(CHECKPOINT_PATH, &path, &resume.sha256).await?;
            Some(path)
        }
    };
    let adapter = inputs.task.init_from.as_ref().filter(|_| checkpoint.is_none());
    let adapter = adapter.map(|adapter| adapter.sha256.as_str());
    inputs.init_from = fetch(client, INIT_FROM_PATH, &inputs.scratch, adapter).await?;
    let ours = inputs.ours();
    let (outbox, inbox) = mpsc::channel(report::CAPACITY);
    let asked = pause.clone();
    let engine = async {
        Ok(on_engine_thread(move || train_and_export(&inputs, checkpoint.as_deref(), &outbox, (&progress, &asked)))
            .await?)
    };
    let (trained, ()) = tokio::try_join!(engine, report::forward(client.clone(), inbox, pause))?;
    Ok(match trained {
        Ok(None) => Finish::Stopped,
        Ok(Some((trained_tokens, events))) => Finish::Succeeded { trained_tokens: Some(trained_tokens), events },
        Err(fault) => failure::of_engine(fault, &ours)?,
    })
}

/// Everything of a training that happens on the engine's thread; returns the tokens that had a loss, and what the owner should
/// know at the end. `None`: it was broken off after a step, with a checkpoint.
fn train_and_export(
    inputs: &Inputs,
    checkpoint: Option<&Path>,
    outbox: &mpsc::Sender<Report>,
    (progress, pause): (&Progress, &Pause),
) -> Result<Option<(i64, Vec<WorkerEvent>)>, Fault> {
    let task = &inputs.task;
    let (base, llama, tokenizer) = inputs.load_model(progress)?;
    let (dataset, validation) = inputs.read_data(&tokenizer, llama.config().context_length, progress)?;
    let resume = checkpoint.map(Checkpoint::load).transpose()?;
    let init_from =
        inputs.init_from.as_deref().map(|archive| artifacts::unpack_adapter(archive, &inputs.scratch)).transpose()?;
    let mut saved = Ok(());
    let mut train_loss = task.resume.as_ref().and_then(|resume| resume.train_loss);
    let mut on_event = |event: TrainEvent<'_>| {
        progress.made();
        let report = match event {
            TrainEvent::Started { total_steps, resumed_from, .. } => {
                tracing::info!(total_steps, resumed_from, "training");
                pause.set_training(true);
                return ControlFlow::Continue(());
            }
            TrainEvent::Evaluating { .. } => return ControlFlow::Continue(()),
            TrainEvent::Step(step) => {
                train_loss = Some(step.loss);
                Report::Step(metric(&step))
            }
            TrainEvent::Checkpoint { checkpoint, listed } => {
                let step = checkpoint.step();
                let path = inputs.scratch.join(format!("checkpoint-{step}-{listed}"));
                saved = checkpoint.save(&path);
                if saved.is_err() {
                    return ControlFlow::Break(());
                }
                Report::Checkpoint { path, step, listed }
            }
        };
        let sent = send(outbox, report);
        if pause.is_wanted() { ControlFlow::Break(()) } else { sent }
    };
    let checkpoint_interval = Some(Duration::from_secs(task.checkpoint_seconds));
    let memory_budget_bytes = task.memory_bytes.map(|bytes| train::left_of(bytes, &llama)).transpose()?;
    let (validation, device) = (validation.as_ref(), task.device);
    let start = Start { resume, init_from, validation, memory_budget_bytes, checkpoint_interval, device };
    let outcome = train::train(&task.spec, &llama, &dataset, start, &mut on_event);
    let outcome = outcome.map_err(|error| of_training(error, (&task.spec, &llama), (&dataset, validation), device))?;
    saved?;
    pause.set_training(false);
    if !outcome.completed {
        tracing::info!(step = outcome.step, "paused");
        return Ok(None);
    }
    let (base, model, tokenizer, report) = (&base, &llama, &tokenizer, &dataset.report);
    let facts = TrainingFacts {
        spec: &task.spec,
        report,
        steps: outcome.step,
        trained_tokens: outcome.trained_tokens,
        train_loss,
        best: outcome.best,
    };
    let trained = Trained { base, model, tokenizer, lora: &outcome.lora, facts: Some(facts) };
    for Made { request, path, parity } in trained.make_artifacts(task, &inputs.scratch, progress)? {
        let filename = artifacts::filename(&task.model_name, &request);
        if send(outbox, Report::Artifact { path, request, filename, parity }).is_break() {
            break;
        }
    }
    let events = outcome.best.map(|best| best_of(&outcome, best)).into_iter().collect();
    Ok(Some((outcome.trained_tokens.cast_signed(), events)))
}

/// What broke a training off. Where a GPU had too little memory, what is free once the training has given its own back tells whether others
/// were in its way, and which settings fit beside them.
fn of_training(
    error: lorad_engine::Error,
    (spec, llama): (&TrainSpec, &Llama),
    (dataset, validation): (&Dataset, Option<&Dataset>),
    device: Device,
) -> Fault {
    let (lorad_engine::Error::DeviceMemory { .. }, Device::Cuda(ordinal)) = (&error, device) else {
        return Fault::Other(error);
    };
    tracing::warn!(%device, %error, "the training found too little memory");
    match train::fit_now(spec, llama, dataset, validation, ordinal) {
        Ok(fit) if !fit.fits => Fault::DoesNotFit(fit),
        Ok(_) | Err(lorad_engine::Error::DeviceMemory { .. }) => Fault::MemoryOfOthers(error),
        Err(unknown) => {
            tracing::warn!(%device, %unknown, "what is free there cannot be told");
            Fault::Other(error)
        }
    }
}

/// Tells which evaluation's adapter is the result of a training with early stopping.
fn best_of(outcome: &Outcome, best: Best) -> WorkerEvent {
    let stopped =
        if outcome.stopped_early { format!("Stopped early at step {}: ", outcome.step) } else { String::new() };
    let Best { step, loss, .. } = best;
    WorkerEvent {
        worker_seq: 1,
        level: Level::Info,
        kind: EventType::Message,
        message: format!(
            "{stopped}the best full validation loss, {loss:.4}, is that of step {step}, whose adapter is the result"
        ),
        data: None,
    }
}

/// Breaks once nobody listens any more: the process is about to end.
pub(super) fn send(outbox: &mpsc::Sender<Report>, report: Report) -> ControlFlow<()> {
    match outbox.blocking_send(report) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

fn metric(step: &StepMetrics) -> Metric {
    Metric {
        step: step.step.into(),
        total_steps: step.total_steps.into(),
        epoch: step.epoch,
        train_loss: step.loss,
        train_mean_token_accuracy: step.token_accuracy,
        learning_rate: step.learning_rate,
        grad_norm: step.grad_norm,
        trained_tokens: step.trained_tokens.cast_signed(),
        step_ms: step.step_ms.cast_signed(),
        valid_loss: step.evaluation.map(|evaluation| evaluation.loss),
        valid_mean_token_accuracy: step.evaluation.map(|evaluation| evaluation.token_accuracy),
    }
}

/// Runs `work` on a thread of its own; one that panics ends the attempt.
pub(super) async fn on_engine_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<T> {
    let (sender, receiver) = oneshot::channel();
    let run = move || {
        // Nobody receives it where the process is about to end.
        let _ = sender.send(work());
    };
    std::thread::Builder::new().name("engine".to_owned()).spawn(run).context("cannot start the engine's thread")?;
    receiver.await.context("the engine panicked")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use axum::http::StatusCode;
    use axum::routing::any;

    use super::*;

    /// A hub that first answers with `failure` that many times and then has a file; and the requests that came.
    async fn fetch_from(failure: StatusCode, times: u32) -> (Result<BaseModel, hub::Error>, u32) {
        let requests = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&requests);
        let answer = async move || {
            let headers = [("x-repo-commit", "0123456789012345678901234567890123456789"), ("etag", "\"aaaa\"")];
            let fails = counter.fetch_add(1, Ordering::Relaxed) < times;
            (if fails { failure } else { StatusCode::OK }, headers, "GGUF")
        };
        let routes = axum::Router::new().route("/org/repo/resolve/main/model.gguf", any(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = Some(format!("http://{}", listener.local_addr().expect("a bound socket")));
        let _server = tokio::spawn(async { axum::serve(listener, routes).await });
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (models_dir, cache_dir) = (folder.path().join("models"), folder.path().join("cache"));
        let hub = Hub::new(hub::Options { models_dir, cache_dir, endpoint, offline: false });
        let pause = Duration::from_millis(1);
        let fetched = fetch_base(hub, "hf:org/repo/model.gguf", pause, &Progress::default()).await;
        (fetched.expect("no panic"), requests.load(Ordering::Relaxed))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_download_that_fails_is_tried_again_unless_the_hub_said_no() {
        // A status that the hub's client itself does not try again.
        let (found, requests) = fetch_from(StatusCode::INSUFFICIENT_STORAGE, 3).await;
        assert_eq!(found.expect("it passes").size_bytes, 4);
        assert!(requests > 3, "{requests}");
        for (status, may_be_missing) in
            [(StatusCode::NOT_FOUND, true), (StatusCode::UNAUTHORIZED, true), (StatusCode::GONE, false)]
        {
            let (refused, requests) = fetch_from(status, u32::MAX).await;
            let error = refused.expect_err("refused");
            assert_eq!(matches!(error, hub::Error::NotFound { .. }), may_be_missing, "{status}: {error}");
            assert!(requests <= 2, "{status}: {requests} requests");
        }
    }
}
