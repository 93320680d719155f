//! What a job leaves to take away: which files a caller may ask for, and those that are there.

use serde::{Deserialize, Serialize};

use super::ids::{ArtifactId, AttemptId, JobId};
use super::text::text_enum;

text_enum! {
    /// The kind of an artifact.
    pub enum ArtifactType {
        /// The LoRA as a folder that PEFT loads, in one `.tar`.
        Adapter = "adapter",
        /// Base model and LoRA merged, as one GGUF file.
        Gguf = "gguf",
    }
}

text_enum! {
    /// How a GGUF file stores its matrices.
    pub enum Quantization {
        /// 16-bit floats.
        F16 = "f16",
        /// 8-bit integers in blocks of 32.
        Q8_0 = "q8_0",
    }
}

/// An artifact that a job is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ArtifactRequest {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices; absent for the other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub quantization: Option<Quantization>,
}

/// A row of the table `artifact`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Its id.
    pub id: ArtifactId,
    /// The job that made it.
    pub job_id: JobId,
    /// The attempt that made it.
    pub attempt_id: AttemptId,
    /// Its kind.
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    pub quantization: Option<Quantization>,
    /// The name to save it under.
    pub filename: String,
    /// Where storage has the bytes.
    pub object_key: String,
    /// Number of bytes.
    pub size_bytes: i64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// When it was made.
    pub created_at_ms: i64,
}
