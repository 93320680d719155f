//! An export: an artifact that was asked for after its job had succeeded, until it is made.

use super::artifact::{ArtifactRequest, ArtifactType, Quantization};
use super::ids::{ArtifactId, JobId};
use super::text::text_enum;

text_enum! {
    /// How far an export is; once it is made it is an artifact.
    pub enum ExportStatus {
        /// It waits for the CPU.
        Queued = "queued",
        /// A worker makes it.
        Running = "running",
        /// It could not be made.
        Failed = "failed",
    }
}

/// A row of the table `export`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Its id, and the artifact's.
    pub id: ArtifactId,
    /// The job whose adapter it is made from.
    pub job_id: JobId,
    /// The artifact's kind.
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    pub quantization: Option<Quantization>,
    /// How far it is.
    pub status: ExportStatus,
    /// Attempts that crashed.
    pub crashes: i64,
    /// A word that tells failures apart.
    pub error_code: Option<String>,
    /// Why it failed.
    pub error_message: Option<String>,
    /// When it was asked for.
    pub created_at_ms: i64,
}

impl Export {
    /// What was asked for.
    pub fn request(&self) -> ArtifactRequest {
        ArtifactRequest { kind: self.kind, quantization: self.quantization }
    }
}
