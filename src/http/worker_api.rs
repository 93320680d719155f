//! The server's side of the worker protocol (`types/worker_protocol.rs`), on a listener of its own.

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Query, State};
use axum::http::request::Parts;
use axum::response::Response;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::de::DeserializeOwned;

use super::App;
use super::access::bearer;
use super::download::serve_whole;
use super::error::{ApiError, Result};
use super::request::JsonBytes;
use crate::jobs::claim::token_sha256;
use crate::storage::Expected;
use crate::types::artifact::Artifact;
use crate::types::attempt::{Attempt, AttemptState};
use crate::types::file::File;
use crate::types::worker_protocol::{
    ARTIFACTS_PATH, ArtifactQuery, CHECKPOINT_PATH, CHECKPOINTS_PATH, CheckpointQuery, EVENTS_PATH, Events,
    FINISH_PATH, Finish, HEARTBEAT_PATH, Heartbeat, INIT_FROM_PATH, Reply, TASK_PATH, TRAINING_FILE_PATH, Task,
    VALIDATION_FILE_PATH, VERSION, VERSION_HEADER,
};
use crate::{jobs, store};

/// The routes of the worker protocol.
pub(super) fn router(app: App) -> Router {
    Router::new()
        .route(TASK_PATH, get(task))
        .route(TRAINING_FILE_PATH, get(training_file))
        .route(VALIDATION_FILE_PATH, get(validation_file))
        .route(INIT_FROM_PATH, get(init_from))
        .route(CHECKPOINT_PATH, get(checkpoint))
        .route(HEARTBEAT_PATH, post(heartbeat))
        .route(EVENTS_PATH, post(events))
        .route(CHECKPOINTS_PATH, put(put_checkpoint))
        .route(ARTIFACTS_PATH, put(put_artifact))
        .route(FINISH_PATH, post(finish))
        .layer(DefaultBodyLimit::disable())
        .with_state(app)
}

/// The attempt that the caller's token belongs to, not ended yet.
struct Caller(Attempt);

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self> {
        let version = parts.headers.get(VERSION_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("none");
        if version != VERSION {
            let message = format!("this server speaks worker protocol {VERSION}, the worker speaks `{version}`");
            return Err(ApiError::bad_request(VERSION_HEADER, message));
        }
        let token = bearer(&parts.headers).ok_or_else(ApiError::unknown_token)?;
        let mut conn = app.jobs.store.read().await?;
        // Found by its hash: how long the search takes tells nothing of the token.
        let attempt = store::attempt::by_token(&mut conn, &token_sha256(token)).await?;
        let attempt = attempt.ok_or_else(ApiError::unknown_token)?;
        if attempt.state == AttemptState::Ended {
            return Err(jobs::Error::AttemptEnded.into());
        }
        Ok(Self(attempt))
    }
}

/// The query of a `PUT`.
struct PutQuery<T>(T);

impl<T: DeserializeOwned + 'static, S: Send + Sync> FromRequestParts<S> for PutQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        Ok(Self(query.map_err(|error| ApiError::bad_body(error.body_text()))?.0))
    }
}

async fn task(State(app): State<App>, Caller(attempt): Caller) -> Result<Json<Task>> {
    let task = jobs::give_task::give_task(&app.jobs, &attempt, app.workers).await?;
    Ok(Json(task))
}

async fn training_file(State(app): State<App>, Caller(attempt): Caller) -> Result<Response> {
    let file = jobs::give_task::training_file(&app.jobs, &attempt).await?;
    serve_whole(&app.jobs.storage, of_file(&file)).await
}

async fn validation_file(State(app): State<App>, Caller(attempt): Caller) -> Result<Response> {
    let file = jobs::give_task::validation_file(&app.jobs, &attempt).await?;
    serve_whole(&app.jobs.storage, of_file(&file)).await
}

async fn init_from(State(app): State<App>, Caller(attempt): Caller) -> Result<Response> {
    let Artifact { object_key, size_bytes, sha256, .. } = jobs::give_task::init_from(&app.jobs, &attempt).await?;
    serve_whole(&app.jobs.storage, expected(&object_key, size_bytes, &sha256)).await
}

async fn checkpoint(State(app): State<App>, Caller(attempt): Caller) -> Result<Response> {
    let mut conn = app.jobs.store.read().await?;
    let latest = store::checkpoint::latest(&mut conn, attempt.job_id).await?;
    drop(conn);
    let latest = latest.ok_or_else(|| ApiError::bad_body(format!("job {} has no checkpoint", attempt.job_id)))?;
    serve_whole(&app.jobs.storage, expected(&latest.object_key, latest.size_bytes, &latest.sha256)).await
}

fn of_file(file: &File) -> Expected<'_> {
    expected(&file.object_key, file.size_bytes, &file.sha256)
}

fn expected<'a>(key: &'a str, size_bytes: i64, sha256: &'a str) -> Expected<'a> {
    Expected { key, size_bytes: size_bytes.unsigned_abs(), sha256: Some(sha256) }
}

async fn heartbeat(State(app): State<App>, Caller(attempt): Caller, body: JsonBytes) -> Result<Json<Reply>> {
    let body: Heartbeat = body.read()?;
    let action = jobs::heartbeat::heartbeat(&app.jobs, &attempt, &body, app.lease).await?;
    Ok(Json(Reply { action }))
}

async fn events(State(app): State<App>, Caller(attempt): Caller, body: JsonBytes) -> Result<Json<Reply>> {
    let news: Events = body.read()?;
    let action = jobs::append_events::append_events(&app.jobs, &attempt, &news).await?;
    Ok(Json(Reply { action }))
}

async fn put_checkpoint(
    State(app): State<App>,
    Caller(attempt): Caller,
    PutQuery(query): PutQuery<CheckpointQuery>,
    body: Body,
) -> Result<Json<serde_json::Value>> {
    jobs::put_checkpoint::put_checkpoint(&app.jobs, &attempt, &query, body.into_data_stream()).await?;
    Ok(done())
}

async fn put_artifact(
    State(app): State<App>,
    Caller(attempt): Caller,
    PutQuery(query): PutQuery<ArtifactQuery>,
    body: Body,
) -> Result<Json<serde_json::Value>> {
    jobs::put_artifact::put_artifact(&app.jobs, &attempt, query, body.into_data_stream()).await?;
    Ok(done())
}

async fn finish(State(app): State<App>, Caller(attempt): Caller, body: JsonBytes) -> Result<Json<serde_json::Value>> {
    let last_word: Finish = body.read()?;
    jobs::finish_attempt::finish_attempt(&app.jobs, &attempt, last_word).await?;
    Ok(done())
}

fn done() -> Json<serde_json::Value> {
    Json(serde_json::json!({}))
}
