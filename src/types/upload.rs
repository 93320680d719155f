//! An upload: a file that comes in parts, and its parts.

use super::file::Purpose;
use super::ids::{FileId, PartId, UploadId};
use super::text::text_enum;

text_enum! {
    /// How far an upload is.
    pub enum UploadStatus {
        /// It takes parts.
        Pending = "pending",
        /// Its file is there.
        Completed = "completed",
        /// The caller did not want it any more.
        Cancelled = "cancelled",
        /// Its time was over before it was completed.
        Expired = "expired",
    }
}

/// A row of the table `upload`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Its id.
    pub id: UploadId,
    /// Whose it is.
    pub owner: String,
    /// The name of the file to be.
    pub filename: String,
    /// What the file is for.
    pub purpose: Purpose,
    /// Number of bytes that the file is to have.
    pub size_bytes: i64,
    /// How far it is; ask [`Upload::status_at`].
    pub status: UploadStatus,
    /// How long the file is kept after it was made.
    pub file_expires_after_seconds: Option<i64>,
    /// The file, once it is completed.
    pub file_id: Option<FileId>,
    /// When it was made.
    pub created_at_ms: i64,
    /// Until when parts are taken.
    pub expires_at_ms: i64,
}

impl Upload {
    /// How far it is: one whose time is over has expired, also before a sweep has said so.
    pub fn status_at(&self, now_ms: i64) -> UploadStatus {
        match self.status {
            UploadStatus::Pending if self.expires_at_ms <= now_ms => UploadStatus::Expired,
            status => status,
        }
    }
}

/// A row of the table `upload_part`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadPart {
    /// Its id.
    pub id: PartId,
    /// The upload it is for.
    pub upload_id: UploadId,
    /// Number of bytes.
    pub size_bytes: i64,
    /// Where storage has the bytes.
    pub object_key: String,
    /// When it was made.
    pub created_at_ms: i64,
}
