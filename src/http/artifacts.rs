//! Artifacts: a job's list, one of them, its bytes.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::download::{Download, ObjectBytes, serve};
use super::error::{ApiError, ErrorBody, Result};
use super::fine_tuning_jobs::find as find_job;
use super::list::List;
use super::request::{JsonBytes, NoParams};
use crate::jobs::exports::{self, Exported};
use crate::store;
use crate::types::artifact::{Artifact, ArtifactRequest, ArtifactType, Parity, Quantization};
use crate::types::export::{Export, ExportStatus};

/// An artifact.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Artifact)]
pub(super) struct ArtifactView {
    /// Its id, `artifact-…`.
    id: String,
    /// Always `artifact`.
    #[schema(value_type = String, example = "artifact")]
    object: &'static str,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// Id of the job that made it.
    fine_tuning_job_id: String,
    /// Its kind.
    #[serde(rename = "type")]
    kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    quantization: Option<Quantization>,
    /// How far it is.
    status: ArtifactStatus,
    /// Why it failed.
    error: Option<ArtifactError>,
    /// The name to save it under; null until it is made.
    filename: Option<String>,
    /// Number of bytes; null until it is made.
    bytes: Option<i64>,
    /// Hash of the bytes, in hexadecimal digits; null until it is made.
    sha256: Option<String>,
    /// How close it is to what was trained; null until it is made, and for artifacts of older versions.
    parity: Option<Parity>,
}

/// How far an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ArtifactStatus {
    /// It was asked for after the job, and waits until the CPU has no other export and no training.
    Queued,
    /// A worker makes it.
    Running,
    /// It is there.
    Succeeded,
    /// It could not be made; asking again tries again.
    Failed,
}

/// Why an artifact could not be made.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ArtifactError {
    /// A word that programs can tell failures apart by.
    code: String,
    /// A sentence.
    message: String,
}

impl From<Artifact> for ArtifactView {
    fn from(artifact: Artifact) -> Self {
        Self {
            id: artifact.id.to_string(),
            object: "artifact",
            created_at: artifact.created_at_ms / 1000,
            fine_tuning_job_id: artifact.job_id.to_string(),
            kind: artifact.kind,
            quantization: artifact.quantization,
            status: ArtifactStatus::Succeeded,
            error: None,
            filename: Some(artifact.filename),
            bytes: Some(artifact.size_bytes),
            sha256: Some(artifact.sha256),
            parity: artifact.parity,
        }
    }
}

impl From<Export> for ArtifactView {
    fn from(export: Export) -> Self {
        let status = match export.status {
            ExportStatus::Queued => ArtifactStatus::Queued,
            ExportStatus::Running => ArtifactStatus::Running,
            ExportStatus::Failed => ArtifactStatus::Failed,
        };
        let error = export.error_code.zip(export.error_message);
        Self {
            id: export.id.to_string(),
            object: "artifact",
            created_at: export.created_at_ms / 1000,
            fine_tuning_job_id: export.job_id.to_string(),
            kind: export.kind,
            quantization: export.quantization,
            status,
            error: error.map(|(code, message)| ArtifactError { code, message }),
            filename: None,
            bytes: None,
            sha256: None,
            parity: None,
        }
    }
}

impl From<Exported> for ArtifactView {
    fn from(exported: Exported) -> Self {
        match exported {
            Exported::Made(artifact) => (*artifact).into(),
            Exported::Waiting(export) => export.into(),
        }
    }
}

async fn find(app: &App, owner: &str, id: &str) -> Result<Exported> {
    let no_such_artifact = || ApiError::no_such_artifact(id);
    let artifact_id = id.parse().map_err(|_| no_such_artifact())?;
    let mut conn = app.jobs.store.read().await?;
    // The export first: it may become the artifact between the two.
    if let Some(export) = store::export::find(&mut conn, artifact_id, owner).await? {
        return Ok(Exported::Waiting(export));
    }
    let artifact = store::artifact::find(&mut conn, artifact_id, owner).await?;
    artifact.map(|artifact| Exported::Made(Box::new(artifact))).ok_or_else(no_such_artifact)
}

/// List a job's artifacts, all in one page: those that it made, then those that are to be made.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/artifacts", operation_id = "listArtifacts", tag = "Artifacts",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = List<ArtifactView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<List<ArtifactView>>> {
    let job = find_job(&app, &owner, &id).await?;
    let mut conn = app.jobs.store.read().await?;
    let exports = store::export::list(&mut conn, job.id).await?;
    let artifacts = store::artifact::list(&mut conn, job.id).await?;
    // One that was made between the two looks is an artifact.
    let waiting = exports.into_iter().filter(|export| !artifacts.iter().any(|artifact| artifact.id == export.id));
    let waiting: Vec<ArtifactView> = waiting.map(ArtifactView::from).collect();
    let artifacts = artifacts.into_iter().map(ArtifactView::from).chain(waiting).collect();
    Ok(Json(List::all(artifacts, |artifact: &ArtifactView| artifact.id.clone())))
}

/// Ask for one more artifact of a job that has succeeded.
///
/// A worker makes it of the job's adapter once the CPU has no other export and no training; the answer's id is the artifact's. One that is there or was asked
/// for already is given as it is; one that failed is tried again.
#[utoipa::path(post, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/artifacts", operation_id = "createArtifact", tag = "Artifacts",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")), request_body = ArtifactRequest,
    responses((status = 200, description = "Done", body = ArtifactView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn create(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    body: JsonBytes,
) -> Result<Json<ArtifactView>> {
    let job_id = id.parse().map_err(|_| ApiError::no_such_job(&id))?;
    let request = ArtifactRequest::parse(&body.0)?;
    Ok(Json(exports::export(&app.jobs, &owner, job_id, request).await?.into()))
}

/// Retrieve an artifact.
#[utoipa::path(get, path = "/v1/artifacts/{artifact_id}", operation_id = "retrieveArtifact", tag = "Artifacts",
    params(("artifact_id" = String, Path, description = "Id of the artifact")),
    responses((status = 200, description = "Done", body = ArtifactView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn retrieve(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<ArtifactView>> {
    Ok(Json(find(&app, &owner, &id).await?.into()))
}

/// Download an artifact's bytes.
///
/// Understands `Range`, `If-Range` and `If-None-Match`; tells the SHA-256 in `ETag` and `Repr-Digest`.
#[utoipa::path(get, path = "/v1/artifacts/{artifact_id}/content", operation_id = "downloadArtifact", tag = "Artifacts",
    params(("artifact_id" = String, Path, description = "Id of the artifact"),
        ("Range" = Option<String>, Header, description = "`bytes=` and one range"),
        ("If-Range" = Option<String>, Header, description = "The ETag that the range belongs to"),
        ("If-None-Match" = Option<String>, Header, description = "ETags of what the client has")),
    responses((status = 200, description = "The bytes", body = ObjectBytes, content_type = "application/octet-stream"),
        (status = 206, description = "The bytes of the range", body = ObjectBytes, content_type = "application/octet-stream"),
        (status = 307, description = "Where the bytes are, for five minutes; only where storage.presign is on"),
        (status = 304, description = "The client has these bytes"),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn content(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    method: Method,
    headers: HeaderMap,
) -> Result<Response> {
    let Exported::Made(artifact) = find(&app, &owner, &id).await? else {
        return Err(ApiError::bad_request(
            "id",
            format!("artifact `{id}` is not made yet: its status says how far it is"),
        ));
    };
    let download = Download {
        object_key: &artifact.object_key,
        filename: &artifact.filename,
        size_bytes: artifact.size_bytes.unsigned_abs(),
        sha256: &artifact.sha256,
    };
    serve(&app.jobs.storage, &download, (&method, &headers)).await
}
