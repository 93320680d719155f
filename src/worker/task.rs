//! The two tasks: validate a data set, and train on it.
//!
//! Both read the base model and the data set in the same way, so that what validation let pass is what training sees.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use lorad_engine::data;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::{Llama, untrained_tokens};
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train::{self, Checkpoint, Start, StepMetrics, TrainEvent};
use tokio::sync::{mpsc, oneshot};

use super::Progress;
use super::artifacts::{self, Made, Trained};
use super::client::{Client, Error};
use super::failure::{self, Ours};
use super::report::{self, Report};
use crate::hub::{self, BaseModel, Hub};
use crate::types::attempt::TaskKind;
use crate::types::metric::Metric;
use crate::types::worker_protocol::{CHECKPOINT_PATH, Finish, TRAINING_FILE_PATH, Task};

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
    progress: Progress,
) -> Result<Finish, Error> {
    let base = match fetch_base(hub, &task.base_model.name, FIRST_PAUSE, &progress).await? {
        Ok(base) => base.path,
        Err(error) => return Ok(failure::of_hub(error)?),
    };
    progress.made();
    let training_file = scratch.join("training_file");
    client.download(TRAINING_FILE_PATH, &training_file, &task.training_file.sha256).await?;
    progress.made();
    let inputs = Inputs { base, training_file, scratch: scratch.to_owned(), task: task.clone() };
    match task.kind {
        TaskKind::Validate => validate(inputs, progress).await,
        TaskKind::Train => train(client, inputs, progress).await,
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

/// What the engine's thread works on.
struct Inputs {
    base: PathBuf,
    training_file: PathBuf,
    scratch: PathBuf,
    task: Task,
}

impl Inputs {
    fn ours(&self) -> Ours {
        let (base, scratch) = (self.base.clone(), self.scratch.clone());
        Ours { base, base_name: self.task.base_model.name.clone(), scratch }
    }

    fn load_model(&self, progress: &Progress) -> lorad_engine::Result<(GgufFile, Llama, Tokenizer)> {
        let base = GgufFile::open(&self.base)?;
        let llama = Llama::load(&base)?;
        let tokenizer = Tokenizer::from_gguf(&base)?;
        progress.made();
        Ok((base, llama, tokenizer))
    }
}

async fn validate(inputs: Inputs, progress: Progress) -> Result<Finish, Error> {
    let ours = inputs.ours();
    let report = on_engine_thread(move || {
        let (base, llama, tokenizer) = inputs.load_model(&progress)?;
        artifacts::check(&inputs.task, &base, &tokenizer)?;
        let context_length = llama.config().context_length;
        let mut on_progress = || progress.made();
        let report =
            data::validate(&inputs.training_file, &inputs.task.spec, &tokenizer, context_length, &mut on_progress)?;
        let untrained = untrained_tokens(&base, &report.control_tokens)?.into_iter();
        let untrained = untrained.filter_map(|id| tokenizer.token_text(id)).map(str::to_owned).collect::<Vec<_>>();
        Ok((report, untrained))
    });
    Ok(match report.await? {
        Ok((report, untrained)) => {
            Finish::Succeeded { trained_tokens: None, events: failure::findings(&report, &untrained) }
        }
        Err(error) => failure::of_engine(error, &ours)?,
    })
}

async fn train(client: &Client, inputs: Inputs, progress: Progress) -> Result<Finish, Error> {
    let checkpoint = match &inputs.task.resume {
        None => None,
        Some(resume) => {
            let path = inputs.scratch.join("resume");
            client.download(CHECKPOINT_PATH, &path, &resume.sha256).await?;
            Some(path)
        }
    };
    let ours = inputs.ours();
    let (outbox, inbox) = mpsc::channel(report::CAPACITY);
    let engine =
        async { Ok(on_engine_thread(move || train_and_export(&inputs, checkpoint, &outbox, &progress)).await?) };
    let (trained, ()) = tokio::try_join!(engine, report::forward(client.clone(), inbox))?;
    Ok(match trained {
        Ok(trained_tokens) => Finish::Succeeded { trained_tokens: Some(trained_tokens), events: Vec::new() },
        Err(error) => failure::of_engine(error, &ours)?,
    })
}

/// Everything of a training that happens on the engine's thread; returns the tokens that had a loss.
fn train_and_export(
    inputs: &Inputs,
    resume: Option<PathBuf>,
    outbox: &mpsc::Sender<Report>,
    progress: &Progress,
) -> lorad_engine::Result<i64> {
    let task = &inputs.task;
    let (base, llama, tokenizer) = inputs.load_model(progress)?;
    let context_length = llama.config().context_length;
    let dataset =
        data::prepare(&inputs.training_file, &task.spec, &tokenizer, context_length, &inputs.scratch, &mut || {
            progress.made()
        })?;
    progress.made();
    let resume = resume.map(|path| Checkpoint::load(&path)).transpose()?;
    let mut saved = Ok(());
    let mut train_loss = task.resume.as_ref().and_then(|resume| resume.train_loss);
    let mut on_event = |event: TrainEvent<'_>| {
        progress.made();
        let report = match event {
            TrainEvent::Started { total_steps, resumed_from, .. } => {
                tracing::info!(total_steps, resumed_from, "training");
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
        send(outbox, report)
    };
    let checkpoint_interval = Some(Duration::from_secs(task.checkpoint_seconds));
    let start = Start { resume, init_from: None, validation: None, checkpoint_interval };
    let outcome = train::train(&task.spec, &llama, &dataset, start, &mut on_event)?;
    saved?;
    if outcome.completed {
        let (base, model, tokenizer, report) = (&base, &llama, &tokenizer, &dataset.report);
        let trained = Trained { base, model, tokenizer, outcome: &outcome, report, train_loss };
        for Made { request, path, parity } in trained.make_artifacts(task, &inputs.scratch, progress)? {
            let filename = artifacts::filename(&task.model_name, &request);
            if send(outbox, Report::Artifact { path, request, filename, parity }).is_break() {
                break;
            }
        }
    }
    Ok(outcome.trained_tokens.cast_signed())
}

/// Breaks once nobody listens any more: the process is about to end.
fn send(outbox: &mpsc::Sender<Report>, report: Report) -> ControlFlow<()> {
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
    }
}

/// Runs `work` on a thread of its own; one that panics ends the attempt.
async fn on_engine_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
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
