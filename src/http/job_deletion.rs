//! `DELETE /v1/fine_tuning/jobs/{id}`.

use std::io::ErrorKind;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::request::NoParams;
use crate::jobs;
use crate::jobs::launcher::log_path;

/// A job that is gone.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeletedFineTuningJob)]
pub(super) struct DeletedJob {
    /// Its id.
    id: String,
    /// Always `fine_tuning.job`.
    #[schema(value_type = String, example = "fine_tuning.job")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Delete a finished job.
///
/// Its events, metrics, logs, checkpoints and artifacts go with it, and so does its model; its result file stays.
#[utoipa::path(delete, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}", operation_id = "deleteFineTuningJob", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = DeletedJob), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn delete(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<DeletedJob>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    for attempt in jobs::delete_job::delete_job(&app.jobs, &owner, job_id).await? {
        let log = log_path(&app.logs_dir, attempt);
        match tokio::fs::remove_file(&log).await {
            // The sweep removes it once its time is over.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(log = %log.display(), %error, "the log of a deleted job cannot be removed");
            }
            _ => (),
        }
    }
    Ok(Json(DeletedJob { id, object: "fine_tuning.job", deleted: true }))
}
