//! A file: bytes that were uploaded, or that a job made.

use super::ids::FileId;
use super::text::text_enum;

text_enum! {
    /// What a file is for.
    pub enum Purpose {
        /// For assistants.
        Assistants = "assistants",
        /// Requests of a batch.
        Batch = "batch",
        /// Training rows.
        FineTune = "fine-tune",
        /// Images.
        Vision = "vision",
        /// Anything of the user's.
        UserData = "user_data",
        /// Rows of an evaluation.
        Evals = "evals",
        /// The metrics of a training, made by the server.
        FineTuneResults = "fine-tune-results",
    }
}

impl Purpose {
    /// Whether a caller may upload a file of this purpose.
    pub fn may_be_uploaded(self) -> bool {
        self != Self::FineTuneResults
    }
}

text_enum! {
    /// How far the server is with a file.
    pub enum FileStatus {
        /// The bytes are there.
        Processed = "processed",
    }
}

/// A row of the table `file`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its id.
    pub id: FileId,
    /// Whose it is.
    pub owner: String,
    /// The name it was uploaded under.
    pub filename: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Number of bytes.
    pub size_bytes: i64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// Where storage has the bytes.
    pub object_key: String,
    /// How far the server is with it.
    pub status: FileStatus,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it may be removed.
    pub expires_at_ms: Option<i64>,
}
