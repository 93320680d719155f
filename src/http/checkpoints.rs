//! `/v1/fine_tuning/jobs/{id}/checkpoints`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::fine_tuning_jobs::find;
use super::list::List;
use super::request::Params;
use crate::store;
use crate::types::checkpoint::Checkpoint;
use crate::types::ids::CheckpointId;

/// A checkpoint, as OpenAI shows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobCheckpoint)]
pub(super) struct CheckpointView {
    /// Its id, `ftckpt_…`.
    id: String,
    /// Always `fine_tuning.job.checkpoint`.
    #[schema(value_type = String, example = "fine_tuning.job.checkpoint")]
    object: &'static str,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// Name of the model as it was then.
    fine_tuned_model_checkpoint: String,
    /// Id of the job.
    fine_tuning_job_id: String,
    /// The step after which it was taken.
    step_number: i64,
    /// The step's figures.
    #[schema(value_type = Object)]
    metrics: Value,
}

impl From<Checkpoint> for CheckpointView {
    fn from(checkpoint: Checkpoint) -> Self {
        Self {
            id: checkpoint.id.to_string(),
            object: "fine_tuning.job.checkpoint",
            created_at: checkpoint.created_at_ms / 1000,
            fine_tuned_model_checkpoint: checkpoint.model_name,
            fine_tuning_job_id: checkpoint.job_id.to_string(),
            step_number: checkpoint.step,
            metrics: checkpoint.metrics,
        }
    }
}

/// List a job's checkpoints, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", operation_id = "listFineTuningJobCheckpoints", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job"),
        ("after" = Option<String>, Query, pattern = "^ftckpt_[0-9a-f]{32}$", description = "Id of the last checkpoint of the page before"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 1000, description = "1 to 1000, default 10")),
    responses((status = 200, description = "Done", body = List<CheckpointView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    mut params: Params,
) -> Result<Json<List<CheckpointView>>> {
    let job = find(&app, &owner, &id).await?;
    let limit = params.limit(10, 1000)?;
    let after = params.take::<CheckpointId>("after")?;
    params.finish()?;
    let mut conn = app.jobs.store.read().await?;
    let below_step = match after {
        None => i64::MAX,
        Some(after) => store::checkpoint::step_of(&mut conn, job.id, after)
            .await?
            .ok_or_else(|| ApiError::bad_request("after", format!("job {} has no checkpoint {after}", job.id)))?,
    };
    let checkpoints = store::checkpoint::list(&mut conn, job.id, below_step, limit + 1).await?;
    let checkpoints = checkpoints.into_iter().map(CheckpointView::from).collect();
    Ok(Json(List::page(checkpoints, limit, |checkpoint: &CheckpointView| checkpoint.id.clone())))
}
