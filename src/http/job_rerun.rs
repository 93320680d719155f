//! `POST /v1/fine_tuning/jobs/{id}/rerun`.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::fine_tuning_jobs::{JobView, idempotency_key, is_retry};
use super::request::{NoParams, OptionalJsonBytes};
use crate::jobs;
use crate::types::rerun_request::RerunRequest;

/// Run a fine-tuning job again: a new job with the same settings, files and seed.
///
/// Settings that were left to the server are those that the old job had, not those of today. The body may be empty.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/rerun", operation_id = "rerunFineTuningJob", tag = "Fine-tuning",
    request_body = Option<RerunRequest>,
    params(("fine_tuning_job_id" = String, Path, description = "Id of the old job, in whatever state"),
        ("Idempotency-Key" = Option<String>, Header,
        description = "1 to 255 characters: the same key, old job and body give the same new job; the same key with anything else is refused")),
    responses((status = 200, description = "The new job", body = JobView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn rerun(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    headers: HeaderMap,
    body: OptionalJsonBytes,
) -> Result<Json<JobView>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    let changes = RerunRequest::parse(&body.0)?;
    let repeat = (idempotency_key(&headers)?, is_retry(&headers));
    let job = jobs::rerun::rerun(&app.jobs, &app.hub, &owner, job_id, changes, repeat).await?;
    Ok(Json(job.into()))
}
