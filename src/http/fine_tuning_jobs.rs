//! `/v1/fine_tuning/jobs`: create, list, retrieve, cancel, pause, resume.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::list::List;
use super::request::{JsonBytes, NoParams, Params};
use crate::store::job::Request;
use crate::types::artifact::ArtifactRequest;
use crate::types::ids::JobId;
use crate::types::job::{Job, JobError, Metadata, Status};
use crate::types::job_request::{
    DatasetFields, HyperparametersRequest, JobRequest, LoraFields, MethodRequest, SupervisedRequest, TrainingFields,
};
use crate::types::job_spec::JobSpec;
use crate::types::{ORGANIZATION, now_ms};
use crate::{jobs, store};

/// A fine-tuning job: OpenAI's fields, then lorad's.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJob)]
pub(super) struct JobView {
    /// Its id, `ftjob-…`.
    id: String,
    /// Always `fine_tuning.job`.
    #[schema(value_type = String, example = "fine_tuning.job")]
    object: &'static str,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// When it came to its end, in Unix seconds.
    finished_at: Option<i64>,
    /// When its steps will be done, in Unix seconds, if they go on as fast as the last ones; null unless it is running and has done one.
    estimated_finish: Option<i64>,
    /// The base model.
    model: String,
    /// Name of the model that it made.
    fine_tuned_model: Option<String>,
    /// Always `lorad`.
    #[schema(value_type = String, example = "lorad")]
    organization_id: &'static str,
    /// How far it is.
    status: Status,
    /// `auto` until the training file was validated, then numbers.
    hyperparameters: HyperparametersRequest,
    /// How it trains.
    method: MethodRequest,
    /// Id of the training file.
    training_file: String,
    /// Id of the validation file.
    validation_file: Option<String>,
    /// Ids of the files with the metrics of every step.
    result_files: Vec<String>,
    /// Tokens that had a loss, over the whole run.
    trained_tokens: Option<i64>,
    /// Seed of LoRA initialisation and shuffling.
    seed: u64,
    /// Always empty: integrations are not supported yet.
    #[schema(value_type = Vec<Object>)]
    integrations: [(); 0],
    /// The caller's labels.
    metadata: Option<Metadata>,
    /// Why it failed.
    error: Option<JobError>,
    /// Part of the model's name.
    user_provided_suffix: Option<String>,
    /// Steps of the whole run, once the first is done.
    total_steps: Option<i64>,
    /// The LoRA.
    lora: LoraFields,
    /// Always `auto`.
    #[schema(value_type = String, example = "auto")]
    quantization: &'static str,
    /// The data set.
    dataset: DatasetFields,
    /// Higher ones are trained first, then older ones.
    priority: i64,
    /// The training loop.
    training: TrainingFields,
    /// Files that it leaves behind.
    artifacts: Vec<ArtifactRequest>,
}

impl From<Job> for JobView {
    fn from(job: Job) -> Self {
        let train = &job.spec.train;
        let resolved = HyperparametersRequest::resolved(train);
        let hyperparameters = if job.validated_at_ms.is_some() { resolved } else { job.spec.hyperparameters };
        Self {
            id: job.id.to_string(),
            object: "fine_tuning.job",
            created_at: job.created_at_ms / 1000,
            finished_at: job.finished_at_ms.map(|at| at / 1000),
            estimated_finish: None,
            fine_tuned_model: (job.status == Status::Succeeded).then_some(job.model_name),
            organization_id: ORGANIZATION,
            status: job.status,
            hyperparameters,
            method: MethodRequest {
                kind: "supervised".into(),
                supervised: Some(SupervisedRequest { hyperparameters: Some(hyperparameters) }),
                dpo: None,
                reinforcement: None,
            },
            training_file: job.spec.training_file.to_string(),
            validation_file: job.spec.validation_file.map(|id| id.to_string()),
            result_files: job.result_file_id.iter().map(ToString::to_string).collect(),
            trained_tokens: job.trained_tokens,
            seed: train.seed,
            integrations: [],
            error: job.error,
            total_steps: job.total_steps,
            lora: LoraFields::resolved(train, job.spec.init_from.map(|adapter| adapter.name)),
            quantization: "auto",
            dataset: train.into(),
            priority: job.spec.priority,
            training: train.into(),
            model: job.spec.model,
            metadata: job.spec.metadata,
            user_provided_suffix: job.spec.suffix,
            artifacts: job.spec.artifacts,
        }
    }
}

/// The job as it is shown, with when its training will end if its steps go on as fast as the last ones.
async fn view(app: &App, job: Job) -> Result<JobView> {
    let estimated_finish = match job.status {
        Status::Running => {
            let end = store::metric::expected_end_ms(&mut *app.jobs.store.read().await?, job.id, now_ms()).await?;
            end.map(|at| at / 1000)
        }
        Status::ValidatingFiles
        | Status::Queued
        | Status::Paused
        | Status::Succeeded
        | Status::Failed
        | Status::Cancelled => None,
    };
    Ok(JobView { estimated_finish, ..job.into() })
}

/// The job of that id, if this owner has it.
pub(super) async fn find(app: &App, owner: &str, id: &str) -> Result<Job> {
    let no_such_job = || ApiError::no_such_job(id);
    let job_id = id.parse().map_err(|_| no_such_job())?;
    let mut conn = app.jobs.store.read().await?;
    store::job::find(&mut conn, job_id, owner).await?.ok_or_else(no_such_job)
}

/// Create a fine-tuning job.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs", operation_id = "createFineTuningJob", tag = "Fine-tuning", request_body = JobRequest,
    params(("Idempotency-Key" = Option<String>, Header,
        description = "1 to 255 characters: the same key and body give the same job; the same key with another body is refused")),
    responses((status = 200, description = "Done", body = JobView), (status = 404, description = "The base model does not exist", body = ErrorBody),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn create(
    State(app): State<App>,
    Owner(owner): Owner,
    _: NoParams,
    headers: HeaderMap,
    body: JsonBytes,
) -> Result<Json<JobView>> {
    let init_from = match JobSpec::adapter_named_in(&body.0)? {
        None => None,
        Some(name) => Some(jobs::find_adapter::find_adapter(&app.jobs, &owner, name).await?),
    };
    let spec = JobSpec::parse(&body.0, init_from)?;
    let text = String::from_utf8_lossy(&body.0);
    let request = Request { body: &text, idempotency_key: idempotency_key(&headers)?, is_retry: is_retry(&headers) };
    let job = jobs::create::create(&app.jobs, &app.hub, &owner, spec, request).await?;
    Ok(Json(job.into()))
}

/// What the header `Idempotency-Key` says.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>> {
    const NAME: &str = "Idempotency-Key";
    let Some(value) = headers.get(NAME) else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=255).contains(&key.len()));
    let message = || format!("{NAME} must be 1 to 255 visible characters, got `{}`", value.as_bytes().escape_ascii());
    key.map(Some).ok_or_else(|| ApiError::bad_request(NAME, message()))
}

/// Whether the client says that it sent this request before, as OpenAI's does.
pub(super) fn is_retry(headers: &HeaderMap) -> bool {
    let count = headers.get("x-stainless-retry-count").and_then(|count| count.to_str().ok()?.parse::<u32>().ok());
    count.is_some_and(|count| count > 0)
}

/// List fine-tuning jobs, newest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs", operation_id = "listFineTuningJobs", tag = "Fine-tuning",
    params(("after" = Option<String>, Query, pattern = "^ftjob-[0-9a-f]{32}$", description = "Id of the last job of the page before"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 1000, description = "1 to 1000, default 20"),
        ("metadata" = Option<BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "`metadata[key]=value`: only jobs with this label; the literal `metadata=null`: only jobs without labels")),
    responses((status = 200, description = "Done", body = List<JobView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    mut params: Params,
) -> Result<Json<List<JobView>>> {
    let limit = params.limit(20, 1000)?;
    let after = params.take::<JobId>("after")?;
    let metadata = params.map("metadata").into_iter().collect();
    let without_metadata = match params.take::<String>("metadata")?.as_deref() {
        None => false,
        Some("null") => true,
        Some(other) => {
            let message = format!("metadata must be `null` or of the form metadata[key]=value, got `{other}`");
            return Err(ApiError::bad_request("metadata", message));
        }
    };
    params.finish()?;
    let filter = store::job::Filter { after, metadata, without_metadata, limit: limit + 1 };
    let jobs = store::job::list(&mut *app.jobs.store.read().await?, &owner, &filter).await?;
    let mut views = Vec::with_capacity(jobs.len());
    for job in jobs {
        views.push(view(&app, job).await?);
    }
    Ok(Json(List::page(views, limit, |job: &JobView| job.id.clone())))
}

/// Retrieve a fine-tuning job.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}", operation_id = "retrieveFineTuningJob", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = JobView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn retrieve(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<JobView>> {
    let job = find(&app, &owner, &id).await?;
    Ok(Json(view(&app, job).await?))
}

/// Cancel a fine-tuning job.
///
/// Its status changes at once, its worker ends within seconds. The body must be empty, or is ignored.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", operation_id = "cancelFineTuningJob", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = JobView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn cancel(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<JobView>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    let job = jobs::cancel::cancel(&app.jobs, &owner, job_id).await?;
    Ok(Json(job.into()))
}

/// Pause a fine-tuning job.
///
/// Its status changes at once; a worker that trains ends its step and saves before it ends. The body must be empty, or is ignored.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", operation_id = "pauseFineTuningJob", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = JobView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn pause(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<JobView>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    let job = jobs::pause::pause(&app.jobs, &owner, job_id).await?;
    Ok(Json(job.into()))
}

/// Resume a fine-tuning job.
///
/// It waits in the queue again and goes on where it was; one that is not paused stays as it is. The body must be empty, or is ignored.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", operation_id = "resumeFineTuningJob", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = JobView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn resume(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<JobView>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    let job = jobs::resume::resume(&app.jobs, &owner, job_id).await?;
    Ok(Json(job.into()))
}
