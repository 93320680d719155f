//! A state of a training that it can go on from.

use serde_json::Value;

use super::ids::{AttemptId, CheckpointId, JobId};

/// A row of the table `checkpoint`.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Its id.
    pub id: CheckpointId,
    /// The job it belongs to.
    pub job_id: JobId,
    /// The attempt that made it.
    pub attempt_id: AttemptId,
    /// The step after which it was taken.
    pub step: i64,
    /// Whether the API shows it; the others serve resuming only.
    pub listed: bool,
    /// The name of the model as it was then.
    pub model_name: String,
    /// Where storage has the bytes.
    pub object_key: String,
    /// Number of bytes.
    pub size_bytes: i64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// The step's figures, as the API shows them.
    pub metrics: Value,
    /// When it was made.
    pub created_at_ms: i64,
}
