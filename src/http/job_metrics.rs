//! `/v1/fine_tuning/jobs/{id}/metrics`: the figures of every step, as a list, as a table, as a picture.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ErrorBody, Result};
use super::fine_tuning_jobs::find;
use super::list::List;
use super::loss_curve::draw;
use super::request::{NoParams, Params};
use crate::store;
use crate::store::metric::{Dated, Losses};
use crate::types::ids::JobId;
use crate::types::job::Job;
use crate::types::metric::Metric;

/// Lines of the table that are read at once.
const BATCH: i64 = 1000;
/// The table's first line: the columns, in the order of [`line()`].
const HEADER: &str = "step,total_steps,epoch,train_loss,train_mean_token_accuracy,learning_rate,grad_norm,trained_tokens,\
                      step_ms,valid_loss,valid_mean_token_accuracy,created_at\n";
/// The picture needs its own style, and nothing from anywhere.
const PICTURE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// The figures of one step.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobMetric)]
pub(super) struct MetricView {
    /// Always `fine_tuning.job.metric`.
    #[schema(value_type = String, example = "fine_tuning.job.metric")]
    object: &'static str,
    /// The step, from 1.
    step: i64,
    /// Steps of the whole run.
    total_steps: i64,
    /// Passes over the data set so far, with their fraction.
    epoch: f64,
    /// Mean loss of the trained tokens of the step.
    train_loss: f64,
    /// Share of the trained tokens whose likeliest prediction was right.
    train_mean_token_accuracy: f64,
    /// Learning rate of the step.
    learning_rate: f64,
    /// Global norm of the gradient before clipping.
    grad_norm: f64,
    /// Trained tokens since the first step.
    trained_tokens: i64,
    /// Milliseconds that the step took.
    step_ms: i64,
    /// Mean loss of the whole validation file after the step; null where it was not evaluated.
    valid_loss: Option<f64>,
    /// Share of the validation file's trained tokens whose likeliest prediction was right.
    valid_mean_token_accuracy: Option<f64>,
    /// When it was written, in Unix seconds.
    created_at: i64,
}

impl From<Dated> for MetricView {
    fn from(Dated { metric, created_at_ms }: Dated) -> Self {
        Self {
            object: "fine_tuning.job.metric",
            step: metric.step,
            total_steps: metric.total_steps,
            epoch: metric.epoch,
            train_loss: metric.train_loss,
            train_mean_token_accuracy: metric.train_mean_token_accuracy,
            learning_rate: metric.learning_rate,
            grad_norm: metric.grad_norm,
            trained_tokens: metric.trained_tokens,
            step_ms: metric.step_ms,
            valid_loss: metric.valid_loss,
            valid_mean_token_accuracy: metric.valid_mean_token_accuracy,
            created_at: created_at_ms / 1000,
        }
    }
}

/// List the figures of a job's steps, oldest first.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/metrics", operation_id = "listFineTuningMetrics", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job"),
        ("after" = Option<i64>, Query, description = "A step: only newer ones"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 10000, description = "1 to 10000, default 10000")),
    responses((status = 200, description = "Done; `first_id` and `last_id` are steps", body = List<MetricView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    mut params: Params,
) -> Result<Json<List<MetricView>>> {
    let job = find(&app, &owner, &id).await?;
    let limit = params.limit(10_000, 10_000)?;
    let after = params.take::<i64>("after")?.unwrap_or(0);
    params.finish()?;
    let mut conn = app.jobs.store.read().await?;
    let steps = store::metric::newer_than(&mut conn, job.id, after, limit + 1).await?;
    let steps = steps.into_iter().map(MetricView::from).collect();
    Ok(Json(List::page(steps, limit, |step: &MetricView| step.step.to_string())))
}

/// Download the figures of all steps as a table.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/metrics.csv", operation_id = "downloadFineTuningMetrics", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "A header, then a line a step, oldest first; empty cells where nothing was evaluated", body = String, content_type = "text/csv"),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn csv(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Response> {
    let job = find(&app, &owner, &id).await?;
    let headers = [
        (header::CONTENT_TYPE, "text/csv; charset=utf-8".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}-metrics.csv\"", job.id)),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, Body::from_stream(table(app, job.id))).into_response())
}

/// The table in pieces, each read when the one before it was taken; one that cannot be read breaks the answer off.
fn table(app: App, job: JobId) -> impl Stream<Item = Result<String, store::Error>> {
    let header = stream::iter([Ok(HEADER.to_owned())]);
    let lines = stream::try_unfold((app, 0), move |(app, after)| async move {
        let mut conn = app.jobs.store.read().await?;
        let steps = store::metric::newer_than(&mut conn, job, after, BATCH).await?;
        drop(conn);
        let Some(last) = steps.last().map(|last| last.metric.step) else { return Ok(None) };
        Ok(Some((steps.iter().map(line).collect::<String>(), (app, last))))
    });
    header.chain(lines).inspect_err(|error| tracing::error!(%error, "a table breaks off"))
}

fn line(Dated { metric, created_at_ms }: &Dated) -> String {
    let cell = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let Metric { step, total_steps, epoch, train_loss, train_mean_token_accuracy, learning_rate, .. } = metric;
    let Metric { grad_norm, trained_tokens, step_ms, valid_loss, valid_mean_token_accuracy, .. } = metric;
    let (valid_loss, valid_accuracy) = (cell(*valid_loss), cell(*valid_mean_token_accuracy));
    format!(
        "{step},{total_steps},{epoch},{train_loss},{train_mean_token_accuracy},{learning_rate},{grad_norm},\
         {trained_tokens},{step_ms},{valid_loss},{valid_accuracy},{}\n",
        created_at_ms / 1000
    )
}

/// Draw a job's loss curve.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/metrics.svg", operation_id = "drawFineTuningMetrics", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Training loss, smoothed and as it is, and validation loss, by step", body = String, content_type = "image/svg+xml"),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn svg(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Response> {
    let job = find(&app, &owner, &id).await?;
    let losses = store::metric::losses(&mut *app.jobs.store.read().await?, job.id).await?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CONTENT_SECURITY_POLICY, PICTURE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // It grows while the job trains.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    Ok((headers, draw(&job.id.to_string(), &caption(&job, &losses), &losses)).into_response())
}

fn caption(job: &Job, losses: &[Losses]) -> String {
    let done = losses.last().map_or(0, |last| last.step);
    let steps = match job.total_steps {
        Some(total) => format!("step {done} of {total}"),
        None => "no step yet".to_owned(),
    };
    format!("{} · {} · {steps}", job.spec.model, job.status)
}
