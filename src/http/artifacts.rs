//! Artifacts: a job's list, one of them, its bytes.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::download::{Download, ObjectBytes, serve};
use super::error::{ApiError, ErrorBody, Result};
use super::fine_tuning_jobs::find as find_job;
use super::list::List;
use super::request::NoParams;
use crate::store;
use crate::types::DEFAULT_OWNER;
use crate::types::artifact::{Artifact, ArtifactType, Parity, Quantization};

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
    /// The name to save it under.
    filename: String,
    /// Number of bytes.
    bytes: i64,
    /// Hash of the bytes, in hexadecimal digits.
    sha256: String,
    /// How close it is to what was trained; null for artifacts of older versions.
    parity: Option<Parity>,
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
            filename: artifact.filename,
            bytes: artifact.size_bytes,
            sha256: artifact.sha256,
            parity: artifact.parity,
        }
    }
}

async fn find(app: &App, id: &str) -> Result<Artifact> {
    let no_such_artifact = || ApiError::no_such_artifact(id);
    let artifact_id = id.parse().map_err(|_| no_such_artifact())?;
    let mut conn = app.jobs.store.read().await?;
    store::artifact::find(&mut conn, artifact_id, DEFAULT_OWNER).await?.ok_or_else(no_such_artifact)
}

/// List a job's artifacts, all in one page.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/artifacts", operation_id = "listArtifacts", tag = "Artifacts",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job")),
    responses((status = 200, description = "Done", body = List<ArtifactView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<List<ArtifactView>>> {
    let job = find_job(&app, &id).await?;
    let mut conn = app.jobs.store.read().await?;
    let artifacts = store::artifact::list(&mut conn, job.id).await?;
    let artifacts = artifacts.into_iter().map(ArtifactView::from).collect();
    Ok(Json(List::all(artifacts, |artifact: &ArtifactView| artifact.id.clone())))
}

/// Retrieve an artifact.
#[utoipa::path(get, path = "/v1/artifacts/{artifact_id}", operation_id = "retrieveArtifact", tag = "Artifacts",
    params(("artifact_id" = String, Path, description = "Id of the artifact")),
    responses((status = 200, description = "Done", body = ArtifactView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn retrieve(
    State(app): State<App>,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<ArtifactView>> {
    Ok(Json(find(&app, &id).await?.into()))
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
        (status = 304, description = "The client has these bytes"),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn content(
    State(app): State<App>,
    Path(id): Path<String>,
    _: NoParams,
    headers: HeaderMap,
) -> Result<Response> {
    let artifact = find(&app, &id).await?;
    let download = Download {
        object_key: &artifact.object_key,
        filename: &artifact.filename,
        size_bytes: artifact.size_bytes.unsigned_abs(),
        sha256: &artifact.sha256,
    };
    serve(&app.jobs.storage, &download, &headers).await
}
