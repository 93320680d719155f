//! The HTTP API: the route table, what every request goes through, and the routes.

mod access;
mod artifacts;
mod checkpoints;
mod connections;
mod download;
mod error;
mod files;
mod fine_tuning_jobs;
mod health;
mod inspections;
mod job_deletion;
mod job_events;
mod job_logs;
mod job_metrics;
mod job_rerun;
mod list;
mod loss_curve;
mod models;
pub mod openapi;
mod request;
mod server_metrics;
mod uploads;
mod worker_api;

use std::any::Any;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::TimeoutLayer;
use tracing::Instrument;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use access::{Access, Error as AccessError};
pub use connections::serve;
pub use error::{ErrorBody, ErrorObject};
use server_metrics::ServerMetrics;

use crate::config::Config;
use crate::hub::Hub;
use crate::jobs::Jobs;
use crate::jobs::give_task::WorkerSettings;
use crate::jobs::inspector::Inspector;
use crate::types::device::Device;

/// Longest time that a request may take which is no upload, download or stream.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What the routes work with; clones share it.
#[derive(Debug, Clone)]
pub struct App {
    jobs: Jobs,
    hub: Hub,
    access: Access,
    inspector: Inspector,
    max_upload_bytes: u64,
    /// How long a client may keep the server waiting within a request.
    patience: Duration,
    lease: Duration,
    workers: WorkerSettings,
    /// Where the logs of workers are.
    logs_dir: PathBuf,
    metrics: ServerMetrics,
    shutdown: CancellationToken,
}

impl App {
    /// The routes' state; trainings run on those devices, those with most memory first. Once `shutdown` is cancelled, streams end and `/readyz` says no.
    ///
    /// # Errors
    /// A configuration that would let anybody in, a database that failed.
    pub async fn new(
        config: &Config,
        jobs: Jobs,
        hub: Hub,
        devices: &[Device],
        shutdown: CancellationToken,
    ) -> Result<Self, AccessError> {
        Ok(Self {
            access: Access::new(config, jobs.store.clone()).await?,
            jobs,
            hub,
            max_upload_bytes: config.server.max_upload_bytes,
            inspector: Inspector::new(config),
            patience: config.patience(),
            lease: config.workers.lease(),
            workers: WorkerSettings::new(config, devices),
            logs_dir: config.logs_dir(),
            metrics: ServerMetrics::new(devices),
            shutdown,
        })
    }
}

/// Every route that `openapi.yaml` describes.
fn described() -> OpenApiRouter<App> {
    // Uploads, downloads and streams take as long as they take; everything else is quick.
    let unhurried = OpenApiRouter::new()
        .routes(routes!(files::upload))
        .routes(routes!(files::content))
        .routes(routes!(uploads::add_part))
        .routes(routes!(uploads::complete))
        .routes(routes!(artifacts::content))
        .routes(routes!(job_events::list))
        .routes(routes!(job_logs::read))
        .routes(routes!(job_metrics::csv))
        .routes(routes!(inspections::report))
        .routes(routes!(inspections::preview))
        .routes(routes!(inspections::estimate))
        .layer(DefaultBodyLimit::disable());
    let quick = OpenApiRouter::new()
        .routes(routes!(files::list))
        .routes(routes!(uploads::create))
        .routes(routes!(uploads::cancel))
        .routes(routes!(files::retrieve, files::delete))
        .routes(routes!(fine_tuning_jobs::list, fine_tuning_jobs::create))
        .routes(routes!(fine_tuning_jobs::retrieve, job_deletion::delete))
        .routes(routes!(fine_tuning_jobs::cancel))
        .routes(routes!(fine_tuning_jobs::pause))
        .routes(routes!(fine_tuning_jobs::resume))
        .routes(routes!(job_rerun::rerun))
        .routes(routes!(checkpoints::list))
        .routes(routes!(job_metrics::list))
        .routes(routes!(job_metrics::svg))
        .routes(routes!(artifacts::list, artifacts::create))
        .routes(routes!(artifacts::retrieve))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve, models::delete))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(server_metrics::metrics))
        .routes(routes!(openapi::json))
        .routes(routes!(openapi::yaml))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, REQUEST_TIMEOUT));
    unhurried.merge(quick)
}

/// The public API.
pub fn public_router(app: App) -> Router {
    let (router, _) = described().split_for_parts();
    let (access, metrics) = (app.access.clone(), app.metrics.clone());
    let watch_body = middleware::from_fn_with_state(app.patience, connections::watch_body);
    let guard = middleware::from_fn_with_state(access, access::guard);
    around(router.with_state(app).layer(watch_body).layer(guard), metrics)
}

/// The API of the workers, for the listener that is theirs alone.
pub fn worker_router(app: App) -> Router {
    let metrics = app.metrics.clone();
    around(worker_api::router(app), metrics)
}

/// What every request goes through, outermost last.
fn around(router: Router, metrics: ServerMetrics) -> Router {
    router
        .layer(middleware::from_fn(envelope))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(metrics, observe))
}

/// Puts errors that are not ours (the router's, an extractor's, a timeout's) into the envelope.
async fn envelope(request: Request, next: Next) -> Response {
    let target = format!("{} {}", request.method(), request.uri().path());
    let response = next.run(request).await;
    let status = response.status();
    let is_json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (parts, body) = response.into_parts();
    // What an extractor of the framework says is for the caller; it is short.
    let said = to_bytes(body, 4096).await.unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let message = match status {
        StatusCode::NOT_FOUND => format!("Unknown request URL: {target}"),
        StatusCode::METHOD_NOT_ALLOWED => format!("Not allowed method for this URL: {target}"),
        StatusCode::SERVICE_UNAVAILABLE => format!("{target} took too long, try again later"),
        _ if said.is_empty() => format!("{target}: {}", status.canonical_reason().unwrap_or("the request failed")),
        _ => format!("{target}: {said}"),
    };
    let mut enveloped = error::ApiError::of_status(status, &message).into_response();
    if let Some(allow) = parts.headers.get(header::ALLOW) {
        enveloped.headers_mut().insert(header::ALLOW, allow.clone());
    }
    enveloped
}

/// A bug of ours: told to the log with its text, to the client without.
fn panicked(panic: Box<dyn Any + Send>) -> Response<Body> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = text.unwrap_or("of unknown kind"), "a request panicked");
    let message = "The server had an error while processing your request; its log has more under this x-request-id";
    error::ApiError::of_status(StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
}

/// Gives each request an id, in its answer and in the log, and counts it.
async fn observe(State(metrics): State<ServerMetrics>, request: Request, next: Next) -> Response {
    const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
    let id = format!("req_{}", uuid::Uuid::new_v4().as_simple());
    let path = request.uri().path();
    let span = tracing::info_span!("request", id, method = %request.method(), path, owner = tracing::field::Empty);
    // What is no route has none: whoever asks for it could make up as many names as there is memory.
    let route = request.extensions().get::<MatchedPath>().map_or("none".into(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    let began = std::time::Instant::now();
    async move {
        let mut response = next.run(request).await;
        let elapsed = began.elapsed();
        metrics.answered(&route, &method, response.status(), elapsed);
        tracing::debug!(status = response.status().as_u16(), elapsed_ms = elapsed.as_millis(), "answered");
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(X_REQUEST_ID, value);
        }
        response
    }
    .instrument(span)
    .await
}
