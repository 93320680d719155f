//! Looking before training: `GET /v1/files/{id}/report`, `…/preview`, `POST /v1/fine_tuning/jobs/estimate`.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::files;
use super::request::{JsonBytes, NoParams, Params};
use crate::types::file::File;
use crate::types::inspection::{
    Answer, DatasetPreview, DatasetReports, DatasetSettings, Estimate, Question, Refusal, Subject,
};
use crate::types::job_request::JobRequest;
use crate::types::job_spec::JobSpec;
use crate::types::now_ms;
use crate::{jobs, store};

/// Most rows of a preview.
const MOST_ROWS: i64 = 100;

/// What a data set holds, read for a base model.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FileReport)]
pub(super) struct ReportView {
    /// Always `file.report`.
    #[schema(value_type = String, example = "file.report")]
    object: &'static str,
    /// Id of the file.
    file_id: String,
    /// Id of the validation file.
    validation_file: Option<String>,
    /// The base model whose tokens are counted.
    model: String,
    /// The reports.
    #[serde(flatten)]
    reports: Box<DatasetReports>,
}

/// The first rows of a data set, as a base model will see them.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FilePreview)]
pub(super) struct PreviewView {
    /// Always `file.preview`.
    #[schema(value_type = String, example = "file.preview")]
    object: &'static str,
    /// Id of the file.
    file_id: String,
    /// The base model.
    model: String,
    /// The rows.
    #[serde(flatten)]
    preview: DatasetPreview,
}

/// What a training would need.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobEstimate)]
pub(super) struct EstimateView {
    /// Always `fine_tuning.job.estimate`.
    #[schema(value_type = String, example = "fine_tuning.job.estimate")]
    object: &'static str,
    /// The figures.
    #[serde(flatten)]
    estimate: Estimate,
}

/// Report on a file: what a training on it would find.
///
/// A process of its own reads the whole file with the model's tokenizer and template, as a training would.
#[utoipa::path(get, path = "/v1/files/{file_id}/report", operation_id = "reportFile", tag = "Files",
    params(("file_id" = String, Path, description = "Id of the file"),
        ("model" = Option<String>, Query, description = "Base model, as in a job; default: that of the newest job on this file"),
        ("validation_file" = Option<String>, Query, pattern = "^file-[0-9a-f]{32}$", description = "Id of a file to report on too, and to compare with this one"),
        ("format" = Option<String>, Query, pattern = "^(auto|alpaca|sharegpt|chat|completion|text)$", description = "As dataset.format of a job"),
        ("template" = Option<String>, Query, description = "As dataset.template of a job"),
        ("train_on" = Option<String>, Query, pattern = "^(completions|all)$", description = "As dataset.train_on of a job"),
        ("max_seq_length" = Option<u32>, Query, minimum = 2, description = "As training.max_seq_length of a job"),
        ("columns" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "`columns[field]=column`, as dataset.columns of a job")),
    responses((status = 200, description = "Done", body = ReportView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn report(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    mut params: Params,
) -> Result<Json<ReportView>> {
    let (model, settings) = (params.take("model")?, settings(&mut params)?);
    let validation_file: Option<String> = params.take("validation_file")?;
    params.finish()?;
    let file = files::find(&app, &owner, &id).await?;
    let validation = match &validation_file {
        None => None,
        Some(id) => {
            let missing = || ApiError::bad_request("validation_file", format!("validation_file `{id}` does not exist"));
            let file_id = id.parse().map_err(|_| missing())?;
            let found = store::file::find(&mut *app.jobs.store.read().await?, file_id, &owner, now_ms()).await?;
            Some(found.ok_or_else(missing)?)
        }
    };
    let model = model_for(&app, &owner, &file, model).await?;
    let spec = settings.resolve()?;
    let subject = Subject { model: &model, spec: &spec, training_file: &file, validation_file: validation.as_ref() };
    match app.inspector.ask(&app.jobs, Question::Report, subject).await? {
        Answer::Report(reports) => {
            Ok(Json(ReportView { object: "file.report", file_id: id, validation_file, model, reports }))
        }
        other => Err(unexpected(other, "file_id")),
    }
}

/// Preview a file: its first rows token by token, each with whether it has a loss.
#[utoipa::path(get, path = "/v1/files/{file_id}/preview", operation_id = "previewFile", tag = "Files",
    params(("file_id" = String, Path, description = "Id of the file"),
        ("model" = Option<String>, Query, description = "Base model, as in a job; default: that of the newest job on this file"),
        ("n" = Option<i64>, Query, minimum = 1, maximum = 100, description = "Rows, 1 to 100, default 3"),
        ("format" = Option<String>, Query, pattern = "^(auto|alpaca|sharegpt|chat|completion|text)$", description = "As dataset.format of a job"),
        ("template" = Option<String>, Query, description = "As dataset.template of a job"),
        ("train_on" = Option<String>, Query, pattern = "^(completions|all)$", description = "As dataset.train_on of a job"),
        ("max_seq_length" = Option<u32>, Query, minimum = 2, description = "As training.max_seq_length of a job"),
        ("columns" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "`columns[field]=column`, as dataset.columns of a job")),
    responses((status = 200, description = "Done", body = PreviewView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn preview(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    mut params: Params,
) -> Result<Json<PreviewView>> {
    let (model, settings) = (params.take("model")?, settings(&mut params)?);
    let rows: i64 = params.take("n")?.unwrap_or(3);
    params.finish()?;
    if !(1..=MOST_ROWS).contains(&rows) {
        return Err(ApiError::bad_request("n", format!("n must be from 1 to {MOST_ROWS}, got `{rows}`")));
    }
    let file = files::find(&app, &owner, &id).await?;
    let model = model_for(&app, &owner, &file, model).await?;
    let spec = settings.resolve()?;
    let question = Question::Preview { rows: usize::try_from(rows).unwrap_or_default() };
    let subject = Subject { model: &model, spec: &spec, training_file: &file, validation_file: None };
    match app.inspector.ask(&app.jobs, question, subject).await? {
        Answer::Preview(preview) => Ok(Json(PreviewView { object: "file.preview", file_id: id, model, preview })),
        other => Err(unexpected(other, "file_id")),
    }
}

/// Estimate a fine-tuning job: steps, tokens, time, memory and disk. Nothing is queued.
///
/// Says whether the training fits this machine's memory, and what to change where it does not.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/estimate", operation_id = "estimateFineTuningJob", tag = "Fine-tuning", request_body = JobRequest,
    responses((status = 200, description = "Done", body = EstimateView), (status = 404, description = "The base model does not exist", body = ErrorBody), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn estimate(
    State(app): State<App>,
    Owner(owner): Owner,
    _: NoParams,
    body: JsonBytes,
) -> Result<Json<EstimateView>> {
    let init_from = match JobSpec::adapter_named_in(&body.0)? {
        None => None,
        Some(name) => Some(jobs::find_adapter::find_adapter(&app.jobs, &owner, name).await?),
    };
    let spec = JobSpec::parse(&body.0, init_from)?;
    let (training_file, validation_file) = jobs::create::check(&app.jobs, &app.hub, &owner, &spec).await?;
    let (memory_bytes, device) = (app.workers.memory_bytes, app.workers.device);
    let question = Question::Estimate { artifacts: spec.artifacts, memory_bytes, device };
    let subject = Subject {
        model: &spec.model,
        spec: &spec.train,
        training_file: &training_file,
        validation_file: validation_file.as_ref(),
    };
    match app.inspector.ask(&app.jobs, question, subject).await? {
        Answer::Estimate(estimate) => Ok(Json(EstimateView { object: "fine_tuning.job.estimate", estimate })),
        other => Err(unexpected(other, "training_file")),
    }
}

fn settings(params: &mut Params) -> Result<DatasetSettings> {
    Ok(DatasetSettings {
        format: params.take("format")?,
        columns: params.map("columns").into_iter().collect(),
        template: params.take("template")?,
        train_on: params.take("train_on")?,
        max_seq_length: params.take("max_seq_length")?,
    })
}

/// The base model that was named, or that of the newest job on the file. It must be on this machine: who may only look
/// downloads nothing.
async fn model_for(app: &App, owner: &str, file: &File, named: Option<String>) -> Result<String> {
    let model = match named {
        Some(model) => model,
        None => {
            let mut conn = app.jobs.store.read().await?;
            let of_job = store::job::model_of_file(&mut conn, owner, file.id).await?;
            of_job.ok_or_else(|| {
                let message = "model is required: no job has used this file yet, whose base model could be taken";
                ApiError::bad_request("model", message)
            })?
        }
    };
    if !jobs::create::has_model(&app.hub, &model).await? {
        let message = format!("model `{model}` is not on this machine yet: a job, or its estimate, downloads it");
        return Err(ApiError::bad_request("model", message));
    }
    Ok(model)
}

/// A refusal, whose data set is `file` to the caller; any other answer is none to the question.
fn unexpected(answer: Answer, file: &str) -> ApiError {
    match answer {
        Answer::Failed(Refusal { code, message, param }) => {
            let param = param.map(|param| if param == "training_file" { file.to_owned() } else { param });
            jobs::Error::Refused(Refusal { code, message, param }).into()
        }
        Answer::Report(_) | Answer::Preview(_) | Answer::Estimate(_) => {
            jobs::Error::Inspection("the answer is to another question".to_owned()).into()
        }
    }
}
