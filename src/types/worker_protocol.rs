//! What a worker and the server say to each other, version 5.
//!
//! Every request carries `Authorization: Bearer <attempt token>` and [`VERSION_HEADER`]. The task and everything about it
//! hang on the token, so no path names a job. A repeated request changes nothing. Once the attempt has ended, or its job
//! has come to its end, every request but a heartbeat is answered `410` with code [`ATTEMPT_ENDED`]: the worker exits.

use lorad_engine::spec::TrainSpec;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::artifact::{ArtifactRequest, ArtifactType, Quantization};
use super::attempt::{AttemptState, TaskKind};
use super::device::Device;
use super::event::{EventType, Level};
use super::ids::{ArtifactId, AttemptId, FileId, JobId};
use super::metric::Metric;

/// The version that this build speaks.
pub const VERSION: &str = "5";
/// The header that carries it.
pub const VERSION_HEADER: &str = "lorad-worker-protocol";
/// The error code of a request that comes too late.
pub const ATTEMPT_ENDED: &str = "attempt_ended";
/// Error code of a download whose object is gone or is not what was handed in.
pub const OBJECT_DAMAGED: &str = "object_damaged";

/// `GET`: the [`Task`].
pub const TASK_PATH: &str = "/internal/v1/worker/task";
/// `GET`: the bytes of the training file.
pub const TRAINING_FILE_PATH: &str = "/internal/v1/worker/training_file";
/// `GET`: the bytes of the validation file.
pub const VALIDATION_FILE_PATH: &str = "/internal/v1/worker/validation_file";
/// `GET`: the bytes of the adapter to begin with, a `.tar` as artifacts are.
pub const INIT_FROM_PATH: &str = "/internal/v1/worker/init_from";
/// `GET`: the bytes of the checkpoint to resume from.
pub const CHECKPOINT_PATH: &str = "/internal/v1/worker/checkpoint";
/// `POST` [`Heartbeat`]: [`Reply`].
pub const HEARTBEAT_PATH: &str = "/internal/v1/worker/heartbeat";
/// `POST` [`Events`]: [`Reply`].
pub const EVENTS_PATH: &str = "/internal/v1/worker/events";
/// `PUT` the bytes of a checkpoint, with [`CheckpointQuery`].
pub const CHECKPOINTS_PATH: &str = "/internal/v1/worker/checkpoints";
/// `PUT` the bytes of an artifact, with [`ArtifactQuery`].
pub const ARTIFACTS_PATH: &str = "/internal/v1/worker/artifacts";
/// `POST` [`Finish`].
pub const FINISH_PATH: &str = "/internal/v1/worker/finish";

/// What the worker is to do, and all that it needs for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// This try.
    pub attempt_id: AttemptId,
    /// The job it is for.
    pub job_id: JobId,
    /// What to do.
    pub kind: TaskKind,
    /// Every hyperparameter.
    pub spec: TrainSpec,
    /// Files to leave behind.
    pub artifacts: Vec<ArtifactRequest>,
    /// The frozen model.
    pub base_model: BaseModel,
    /// The data set; an export has none.
    pub training_file: Option<DataFile>,
    /// The data set whose loss is watched.
    pub validation_file: Option<DataFile>,
    /// The adapter to begin with, or to export; a training that resumes has no use for it.
    pub init_from: Option<StartAdapter>,
    /// Where to go on from.
    pub resume: Option<Resume>,
    /// Name of the model that the training makes, `ft:…`.
    pub model_name: String,
    /// How long the server bears silence.
    pub lease_seconds: u64,
    /// How often to send a heartbeat.
    pub heartbeat_seconds: u64,
    /// Longest time between two checkpoints.
    pub checkpoint_seconds: u64,
    /// What the training runs on, or will run on; an export, the CPU.
    pub device: Device,
    /// Memory that a training may have, in bytes; all that the machine has where none is given.
    pub memory_bytes: Option<u64>,
}

/// The frozen model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseModel {
    /// As the request named it; the worker finds or fetches it where it runs.
    pub name: String,
}

/// The adapter that a training begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartAdapter {
    /// Its id.
    pub id: ArtifactId,
    /// Number of bytes.
    pub size_bytes: u64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
}

/// A data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Its id.
    pub id: FileId,
    /// The name it was uploaded under.
    pub filename: String,
    /// Number of bytes.
    pub size_bytes: u64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
}

/// The checkpoint to go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resume {
    /// The step after which it was taken.
    pub step: u32,
    /// Number of bytes.
    pub size_bytes: u64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// Loss of that step.
    #[serde(default)]
    pub train_loss: Option<f64>,
}

/// A sign of life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heartbeat {
    /// Grows whenever work gets on; a worker whose number stands still is stalled.
    #[serde(default)]
    pub progress: Option<u64>,
}

/// What the server wants of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Go on.
    Continue,
    /// End the step, hand in a checkpoint, and stop; without a step to end, stop at once.
    Pause,
    /// Stop: nobody wants the result any more.
    Stop,
}

impl Action {
    /// What the worker of an attempt is to do that is so far.
    pub fn of(state: AttemptState) -> Self {
        match state {
            AttemptState::Starting | AttemptState::Running => Self::Continue,
            AttemptState::Pausing => Self::Pause,
            AttemptState::Stopping | AttemptState::Ended => Self::Stop,
        }
    }
}

/// The answer to a [`Heartbeat`], which renews the lease, and to [`Events`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What to do.
    pub action: Action,
}

/// News, in order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// Sentences.
    #[serde(default)]
    pub events: Vec<WorkerEvent>,
    /// Figures of steps.
    #[serde(default)]
    pub metrics: Vec<Metric>,
}

/// A sentence of the worker's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerEvent {
    /// Counts this attempt's events, so that a repeated one is known.
    pub worker_seq: i64,
    /// How serious it is.
    pub level: Level,
    /// What it tells.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// The sentence.
    pub message: String,
    /// Figures.
    #[serde(default)]
    pub data: Option<Value>,
}

/// What comes with a checkpoint's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointQuery {
    /// The step after which it was taken.
    pub step: u32,
    /// Whether the API shows it.
    pub listed: bool,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
}

/// What comes with an artifact's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArtifactQuery {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// The name to save it under.
    pub filename: String,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// JSON of a [`Parity`](super::artifact::Parity): how close it is to what was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parity: Option<String>,
}

/// The last word of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Finish {
    /// The task is done.
    Succeeded {
        /// Tokens that had a loss, over the whole run; a training knows them.
        #[serde(default)]
        trained_tokens: Option<i64>,
        /// What the owner should know; written together with the end, so that a repeated attempt does not say it twice.
        #[serde(default)]
        events: Vec<WorkerEvent>,
    },
    /// The task cannot be done, now or ever.
    Failed {
        /// A word that programs can tell failures apart by.
        code: String,
        /// A sentence for people.
        message: String,
        /// The job request's field that is to blame.
        #[serde(default)]
        param: Option<String>,
        /// What the owner should know, the rows that cannot be used for one; written together with the end.
        #[serde(default)]
        events: Vec<WorkerEvent>,
    },
    /// The worker stopped because it was told to.
    Stopped,
}
