//! `/v1/uploads`: create, add a part, complete, cancel.

use axum::Json;
use axum::extract::{Multipart, Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::files::{FileView, broken_form, check_filename, check_purpose, expires_after};
use super::request::{JsonBytes, NoParams};
use crate::jobs::uploads;
use crate::types::file::Purpose;
use crate::types::ids::{PartId, UploadId};
use crate::types::now_ms;
use crate::types::upload::{Upload, UploadPart, UploadStatus};

/// How long an upload takes parts, in milliseconds.
const LIFE_MS: i64 = 3_600_000;
/// Longest media type.
const MAX_MIME_TYPE_BYTES: usize = 255;

/// A file to come.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UploadRequest {
    /// Number of bytes that the parts will have together, from 1 to `server.max_upload_bytes`.
    #[schema(minimum = 1)]
    bytes: u64,
    /// Name of the file.
    #[schema(min_length = 1, max_length = 255)]
    filename: String,
    /// Its media type; any is taken.
    #[schema(min_length = 1, max_length = 255)]
    mime_type: String,
    /// What the file is for: `fine-tune` for training rows.
    #[schema(value_type = Purpose)]
    purpose: String,
    /// When the file may be removed.
    expires_after: Option<ExpiresAfter>,
}

/// When a file may be removed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ExpiresAfter {
    /// Must be `created_at`.
    #[schema(pattern = "^created_at$")]
    anchor: String,
    /// Seconds from then on, 3600 to 2592000.
    #[schema(minimum = 3600, maximum = 2592000)]
    seconds: i64,
}

/// Which parts the file consists of.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CompleteRequest {
    /// Ids of the parts, in the order of their bytes.
    part_ids: Vec<String>,
    /// MD5 of the whole file in hexadecimal digits, to be checked.
    #[schema(pattern = "^[0-9a-fA-F]{32}$")]
    md5: Option<String>,
}

/// The form of a part.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "it describes the form, which is read field by field")]
pub(super) struct PartForm {
    /// The bytes, at most 64 MiB.
    #[schema(value_type = String, format = Binary)]
    data: Vec<u8>,
}

/// An upload, as OpenAI shows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Upload)]
pub(super) struct UploadView {
    /// Its id, `upload_…`.
    id: String,
    /// Always `upload`.
    #[schema(value_type = String, example = "upload")]
    object: &'static str,
    /// Number of bytes that the file is to have.
    bytes: i64,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// Until when it takes parts, in Unix seconds.
    expires_at: i64,
    /// Name of the file.
    filename: String,
    /// What the file is for.
    purpose: Purpose,
    /// How far it is.
    status: UploadStatus,
    /// The file, once it is completed.
    file: Option<FileView>,
}

impl UploadView {
    fn of(upload: Upload, file: Option<FileView>) -> Self {
        let status = upload.status_at(now_ms());
        Self {
            id: upload.id.to_string(),
            object: "upload",
            bytes: upload.size_bytes,
            created_at: upload.created_at_ms / 1000,
            expires_at: upload.expires_at_ms / 1000,
            filename: upload.filename,
            purpose: upload.purpose,
            status,
            file,
        }
    }
}

/// A part of an upload.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UploadPart)]
pub(super) struct PartView {
    /// Its id, `part_…`.
    id: String,
    /// Always `upload.part`.
    #[schema(value_type = String, example = "upload.part")]
    object: &'static str,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// The upload it is for.
    upload_id: String,
}

impl From<UploadPart> for PartView {
    fn from(part: UploadPart) -> Self {
        Self {
            id: part.id.to_string(),
            object: "upload.part",
            created_at: part.created_at_ms / 1000,
            upload_id: part.upload_id.to_string(),
        }
    }
}

/// Begin the upload of a file in parts.
///
/// Parts are taken for an hour.
#[utoipa::path(post, path = "/v1/uploads", operation_id = "createUpload", tag = "Uploads", request_body = UploadRequest,
    responses((status = 200, description = "Done", body = UploadView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn create(
    State(app): State<App>,
    Owner(owner): Owner,
    _: NoParams,
    body: JsonBytes,
) -> Result<Json<UploadView>> {
    let UploadRequest { bytes, filename, mime_type, purpose, expires_after: expiry } = body.read()?;
    if !(1..=app.max_upload_bytes).contains(&bytes) {
        let message = format!("bytes must be from 1 to {}, got `{bytes}`", app.max_upload_bytes);
        return Err(ApiError::bad_request("bytes", message));
    }
    if !(1..=MAX_MIME_TYPE_BYTES).contains(&mime_type.len()) {
        let message = format!("mime_type must have 1 to {MAX_MIME_TYPE_BYTES} bytes, got `{}`", mime_type.len());
        return Err(ApiError::bad_request("mime_type", message));
    }
    let filename = check_filename("filename", &filename)?;
    let seconds = expiry.as_ref().map(|expiry| expiry.seconds.to_string());
    let anchor = expiry.as_ref().map(|expiry| expiry.anchor.as_str());
    let names = ("expires_after.anchor", "expires_after.seconds");
    let created_at_ms = now_ms();
    let upload = Upload {
        id: UploadId::new(),
        owner: owner.clone(),
        filename,
        purpose: check_purpose(&purpose)?,
        size_bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
        status: UploadStatus::Pending,
        file_expires_after_seconds: expires_after(names, anchor, seconds.as_deref())?,
        file_id: None,
        created_at_ms,
        expires_at_ms: created_at_ms + LIFE_MS,
    };
    uploads::create(&app.jobs, &upload).await?;
    Ok(Json(UploadView::of(upload, None)))
}

fn upload_id(id: &str) -> Result<UploadId> {
    id.parse().map_err(|_| ApiError::no_such_upload(id))
}

/// Add a part to an upload.
///
/// Parts may come at once and in any order; completing the upload says which is where.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/parts", operation_id = "addUploadPart", tag = "Uploads",
    params(("upload_id" = String, Path, description = "Id of the upload")),
    request_body(content = PartForm, content_type = "multipart/form-data"),
    responses((status = 200, description = "Done", body = PartView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn add_part(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    mut multipart: Multipart,
) -> Result<Json<PartView>> {
    let id = upload_id(&id)?;
    let field = multipart.next_field().await.map_err(broken_form)?;
    let field = field.ok_or_else(|| ApiError::bad_request("data", "the form has no field `data`"))?;
    if field.name() != Some("data") {
        let name = field.name().unwrap_or_default().to_owned();
        return Err(ApiError::bad_request(name.clone(), format!("unknown form field `{name}`, it must be data")));
    }
    let part = uploads::add_part(&app.jobs, &owner, id, field).await?;
    Ok(Json(part.into()))
}

/// Complete an upload.
///
/// The parts become a file. Their bytes must be as many as were announced; completing again gives the same file.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/complete", operation_id = "completeUpload", tag = "Uploads",
    params(("upload_id" = String, Path, description = "Id of the upload")), request_body = CompleteRequest,
    responses((status = 200, description = "Done", body = UploadView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn complete(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    body: JsonBytes,
) -> Result<Json<UploadView>> {
    let id = upload_id(&id)?;
    let CompleteRequest { part_ids, md5 } = body.read()?;
    let part_ids: Vec<PartId> = part_ids
        .iter()
        .map(|id| id.parse().map_err(|right| ApiError::bad_request("part_ids", format!("part_ids: an id {right}"))))
        .collect::<Result<_>>()?;
    let (upload, file) = uploads::complete(&app.jobs, &owner, id, &part_ids, md5.as_deref()).await?;
    Ok(Json(UploadView::of(upload, Some(file.into()))))
}

/// Cancel an upload.
///
/// Its parts are removed. The body must be empty, or is ignored.
#[utoipa::path(post, path = "/v1/uploads/{upload_id}/cancel", operation_id = "cancelUpload", tag = "Uploads",
    params(("upload_id" = String, Path, description = "Id of the upload")),
    responses((status = 200, description = "Done", body = UploadView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn cancel(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<UploadView>> {
    let upload = uploads::cancel(&app.jobs, &owner, upload_id(&id)?).await?;
    Ok(Json(UploadView::of(upload, None)))
}
