//! The two tasks: validate a data set, and train on it.
//!
//! Both read the base model and the data set in the same way, so that what validation let pass is what training sees.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use lorad_engine::data;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train::{self, Checkpoint, Start, StepMetrics, TrainEvent};
use tokio::sync::{mpsc, oneshot};

use super::client::{Client, Error};
use super::report::{self, Report};
use super::{Progress, artifacts, failure};
use crate::hub::Hub;
use crate::types::attempt::TaskKind;
use crate::types::metric::Metric;
use crate::types::worker_protocol::{CHECKPOINT_PATH, Finish, TRAINING_FILE_PATH, Task};

/// Does the task and returns what to say at its end.
pub(super) async fn perform(
    client: &Client,
    task: &Task,
    hub: Hub,
    scratch: &Path,
    progress: Progress,
) -> Result<Finish, Error> {
    let name = task.base_model.name.clone();
    let base =
        tokio::task::spawn_blocking(move || hub.fetch(&name)).await.context("finding the base model panicked")?;
    let base = match base {
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

/// What the engine's thread works on.
struct Inputs {
    base: PathBuf,
    training_file: PathBuf,
    scratch: PathBuf,
    task: Task,
}

impl Inputs {
    fn load_model(&self, progress: &Progress) -> lorad_engine::Result<(GgufFile, Llama, Tokenizer)> {
        let base = GgufFile::open(&self.base)?;
        let llama = Llama::load(&base)?;
        let tokenizer = Tokenizer::from_gguf(&base)?;
        progress.made();
        Ok((base, llama, tokenizer))
    }
}

async fn validate(inputs: Inputs, progress: Progress) -> Result<Finish, Error> {
    let report = on_engine_thread(move || {
        let (_, llama, tokenizer) = inputs.load_model(&progress)?;
        data::validate(&inputs.training_file, &inputs.task.spec, &tokenizer, llama.config().context_length)
    });
    Ok(match report.await? {
        Ok(report) => Finish::Succeeded { trained_tokens: None, events: failure::findings(&report) },
        Err(error) => failure::of_engine(error)?,
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
    let (outbox, inbox) = mpsc::channel(report::CAPACITY);
    let engine =
        async { Ok(on_engine_thread(move || train_and_export(&inputs, checkpoint, &outbox, &progress)).await?) };
    let (trained, ()) = tokio::try_join!(engine, report::forward(client.clone(), inbox))?;
    Ok(match trained {
        Ok(trained_tokens) => Finish::Succeeded { trained_tokens: Some(trained_tokens), events: Vec::new() },
        Err(error) => failure::of_engine(error)?,
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
    let dataset = data::prepare(&inputs.training_file, &task.spec, &tokenizer, context_length)?;
    progress.made();
    let resume = resume.map(|path| Checkpoint::load(&path)).transpose()?;
    let mut saved = Ok(());
    let mut on_event = |event: TrainEvent<'_>| {
        progress.made();
        let report = match event {
            TrainEvent::Started { total_steps, resumed_from, .. } => {
                tracing::info!(total_steps, resumed_from, "training");
                return ControlFlow::Continue(());
            }
            TrainEvent::Step(step) => Report::Step(metric(&step)),
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
    let start = Start { resume, init_from: None, checkpoint_interval };
    let outcome = train::train(&task.spec, &llama, &dataset, start, &mut on_event)?;
    saved?;
    if outcome.completed {
        for request in &task.artifacts {
            let path = artifacts::make(request, &base, &outcome.lora, task, &inputs.scratch, progress)?;
            let filename = artifacts::filename(&task.model_name, request);
            if send(outbox, Report::Artifact { path, request: *request, filename }).is_break() {
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
