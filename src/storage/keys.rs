//! The names of objects, which are made here and nowhere else.

use crate::types::ids::{ArtifactId, CheckpointId, FileId, JobId, PartId, UploadId};

/// The folders that all keys are in.
pub const FOLDERS: [&str; 3] = ["files", "jobs", "uploads"];

/// Key of an uploaded file or result file.
pub fn file_key(file_id: &str) -> String {
    format!("files/{file_id}")
}

/// Key of a part of an upload.
pub fn upload_part_key(upload_id: &str, part_id: &str) -> String {
    format!("uploads/{upload_id}/parts/{part_id}")
}

/// Key of a checkpoint.
pub fn checkpoint_key(job_id: &str, checkpoint_id: &str) -> String {
    format!("jobs/{job_id}/checkpoints/{checkpoint_id}")
}

/// Key of an artifact.
pub fn artifact_key(job_id: &str, artifact_id: &str) -> String {
    format!("jobs/{job_id}/artifacts/{artifact_id}")
}

/// Whether a key is one that the functions above make; every other object of the storage is somebody else's.
pub fn is_key(key: &str) -> bool {
    let parts: Vec<&str> = key.split('/').collect();
    match parts[..] {
        ["files", file] => file.parse::<FileId>().is_ok(),
        ["uploads", upload, "parts", part] => upload.parse::<UploadId>().is_ok() && part.parse::<PartId>().is_ok(),
        ["jobs", job, "checkpoints", checkpoint] => {
            job.parse::<JobId>().is_ok() && checkpoint.parse::<CheckpointId>().is_ok()
        }
        ["jobs", job, "artifacts", artifact] => job.parse::<JobId>().is_ok() && artifact.parse::<ArtifactId>().is_ok(),
        _ => false,
    }
}
