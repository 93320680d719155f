//! Events: a job's story, line by line, in the words that scripts written for OpenAI match on.

use serde_json::Value;

use super::ids::{EventId, FileId, JobId};
use super::job::Status;
use super::metric::Metric;
use super::text::text_enum;

text_enum! {
    /// How serious an event is.
    pub enum Level {
        /// As it should be.
        Info = "info",
        /// Worth a look.
        Warn = "warn",
        /// The job fails of it.
        Error = "error",
    }
}

text_enum! {
    /// What an event tells.
    pub enum EventType {
        /// A sentence.
        Message = "message",
        /// The figures of a step.
        Metrics = "metrics",
    }
}

/// A row of the table `job_event`.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its id.
    pub id: EventId,
    /// Its place in the job's story, from 1, without gaps.
    pub seq: i64,
    /// How serious it is.
    pub level: Level,
    /// What it tells.
    pub kind: EventType,
    /// The sentence.
    pub message: String,
    /// The figures.
    pub data: Option<Value>,
    /// When it was written.
    pub created_at_ms: i64,
}

/// An event that has no place in the story yet.
#[derive(Debug, Clone, PartialEq)]
pub struct NewEvent {
    /// How serious it is.
    pub level: Level,
    /// What it tells.
    pub kind: EventType,
    /// The sentence.
    pub message: String,
    /// The figures.
    pub data: Option<Value>,
}

impl NewEvent {
    fn message(level: Level, message: String) -> Self {
        Self { level, kind: EventType::Message, message, data: None }
    }

    /// The job exists.
    pub fn created(job: JobId) -> Self {
        Self::message(Level::Info, format!("Created fine-tuning job: {job}"))
    }

    /// The data set is about to be read, and the one to evaluate.
    pub fn validating(training_file: FileId, validation_file: Option<FileId>) -> Self {
        let and = validation_file.map(|id| format!(" and validation file: {id}")).unwrap_or_default();
        Self::message(Level::Info, format!("Validating training file: {training_file}{and}"))
    }

    /// The data set can be trained on.
    pub fn validated() -> Self {
        Self::message(Level::Info, "Files validated, moving job to queued state".into())
    }

    /// A training begins, or goes on after a pause.
    pub fn started() -> Self {
        Self::message(Level::Info, "Fine-tuning job started".into())
    }

    /// A step was trained.
    pub fn step(metric: &Metric) -> Self {
        let Metric { step, total_steps, train_loss, valid_loss, .. } = metric;
        let mut message = format!("Step {step}/{total_steps}: training loss={train_loss:.2}");
        if let Some(loss) = valid_loss {
            message.push_str(&format!(", validation loss={loss:.2}, full validation loss={loss:.2}"));
        }
        let mut data = metric.figures();
        data["total_steps"] = (*total_steps).into();
        Self { level: Level::Info, kind: EventType::Metrics, message, data: Some(data) }
    }

    /// A checkpoint can be listed.
    pub fn checkpoint_created(step: i64, model_name: &str) -> Self {
        Self::message(Level::Info, format!("Checkpoint created at step {step} with Snapshot ID: {model_name}"))
    }

    /// The model has its name.
    pub fn model_created(model_name: &str) -> Self {
        Self::message(Level::Info, format!("New fine-tuned model created: {model_name}"))
    }

    /// The job is done.
    pub fn succeeded() -> Self {
        Self::message(Level::Info, "The job has successfully completed".into())
    }

    /// The job cannot be done.
    pub fn failed(reason: &str) -> Self {
        Self::message(Level::Error, format!("The job failed: {reason}"))
    }

    /// The caller put the job aside.
    pub fn paused() -> Self {
        Self::message(Level::Info, "The job was paused".into())
    }

    /// The caller took the job up again.
    pub fn resumed(status: Status) -> Self {
        Self::message(Level::Info, format!("The job was resumed, moving it to {status} state"))
    }

    /// The caller does not want the job any more.
    pub fn cancelled() -> Self {
        Self::message(Level::Info, "The job was cancelled".into())
    }
}
