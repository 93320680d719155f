//! `/v1/files`: upload, list, retrieve, delete, content.

use axum::Json;
use axum::extract::multipart::Field;
use axum::extract::{Multipart, Path, State};
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::download::{Download, ObjectBytes, serve};
use super::error::{ApiError, ErrorBody, Result};
use super::list::List;
use super::request::{NoParams, Params};
use crate::storage::{Stored, file_key};
use crate::types::file::{File, FileStatus, Purpose};
use crate::types::ids::FileId;
use crate::types::now_ms;
use crate::{jobs, store};

/// Longest text field of an upload form.
const MAX_FIELD_BYTES: usize = 4096;
/// Longest file name.
const MAX_FILENAME_BYTES: usize = 255;

/// A file, as OpenAI shows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = File)]
pub(super) struct FileView {
    /// Its id, `file-…`.
    id: String,
    /// Always `file`.
    #[schema(value_type = String, example = "file")]
    object: &'static str,
    /// Number of bytes.
    bytes: i64,
    /// When it was made, in Unix seconds.
    created_at: i64,
    /// When it may be removed, in Unix seconds.
    expires_at: Option<i64>,
    /// The name it was uploaded under.
    filename: String,
    /// What it is for.
    purpose: Purpose,
    /// How far the server is with it.
    status: FileStatus,
    /// Always null.
    status_details: Option<String>,
    /// Hash of the bytes, in hexadecimal digits.
    sha256: String,
}

impl From<File> for FileView {
    fn from(file: File) -> Self {
        Self {
            id: file.id.to_string(),
            object: "file",
            bytes: file.size_bytes,
            created_at: file.created_at_ms / 1000,
            expires_at: file.expires_at_ms.map(|at| at / 1000),
            filename: file.filename,
            purpose: file.purpose,
            status: file.status,
            status_details: None,
            sha256: file.sha256,
        }
    }
}

/// What is left of a deleted file.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedFile {
    /// Its id.
    id: String,
    /// Always `file`.
    #[schema(value_type = String, example = "file")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// The form of an upload; its fields may come in any order.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "it describes the form, which is read field by field")]
pub(super) struct UploadForm {
    /// The bytes, under their name.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// What the file is for: `fine-tune` for training rows.
    #[schema(value_type = Purpose)]
    purpose: String,
    /// Must be `created_at`.
    #[schema(rename = "expires_after[anchor]", pattern = "^created_at$")]
    anchor: Option<String>,
    /// Seconds after which the file may be removed, 3600 to 2592000.
    #[schema(rename = "expires_after[seconds]", minimum = 3600, maximum = 2592000)]
    seconds: Option<i64>,
}

/// What the form has said so far.
#[derive(Debug, Default)]
struct Form {
    file: Option<(FileId, String, Stored)>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

/// Upload a file.
///
/// The body is streamed to storage.
#[utoipa::path(post, path = "/v1/files", operation_id = "createFile", tag = "Files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, description = "Done", body = FileView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn upload(
    State(app): State<App>,
    Owner(owner): Owner,
    _: NoParams,
    multipart: Multipart,
) -> Result<Json<FileView>> {
    let mut form = Form::default();
    let file = match read_form(&app, multipart, &mut form).await {
        Ok(()) => form_to_file(&form, &owner),
        Err(error) => Err(error),
    };
    match file {
        Ok(file) => {
            jobs::add_file::add_file(&app.jobs, &file).await?;
            Ok(Json(file.into()))
        }
        Err(error) => {
            if let Some((id, ..)) = form.file {
                app.jobs.storage.delete(&file_key(&id.to_string())).await?;
            }
            Err(error)
        }
    }
}

async fn read_form(app: &App, mut multipart: Multipart, form: &mut Form) -> Result<()> {
    while let Some(field) = multipart.next_field().await.map_err(broken_form)? {
        let name = field.name().unwrap_or_default().to_owned();
        let text = match name.as_str() {
            "file" => {
                if form.file.is_some() {
                    return Err(ApiError::bad_request("file", "the form has two fields `file`"));
                }
                form.file = Some(store_field(app, field).await?);
                continue;
            }
            "purpose" => &mut form.purpose,
            "expires_after[anchor]" => &mut form.anchor,
            "expires_after[seconds]" => &mut form.seconds,
            _ => return Err(ApiError::bad_request(name.clone(), format!("unknown form field `{name}`"))),
        };
        *text = Some(read_text(&name, field).await?);
    }
    Ok(())
}

async fn store_field(app: &App, field: Field<'_>) -> Result<(FileId, String, Stored)> {
    let filename = check_filename("file", field.file_name().unwrap_or_default())?;
    let id = FileId::new();
    let stored = app.jobs.storage.put(&file_key(&id.to_string()), field, Some(app.max_upload_bytes)).await?;
    Ok((id, filename, stored))
}

/// The name of a file; of a path only the last part, since some clients send the whole.
pub(super) fn check_filename(field: &str, path: &str) -> Result<String> {
    let filename = path.rsplit(['/', '\\']).next().unwrap_or_default();
    let printable = !filename.chars().any(char::is_control);
    if ["", ".", ".."].contains(&filename) || filename.len() > MAX_FILENAME_BYTES || !printable {
        let right = format!("a name of 1 to {MAX_FILENAME_BYTES} printable bytes");
        return Err(ApiError::bad_request(field, format!("{field} must have {right}, got `{filename}`")));
    }
    Ok(filename.to_owned())
}

/// A purpose that a caller may give a file.
pub(super) fn check_purpose(purpose: &str) -> Result<Purpose> {
    let known = purpose.parse::<Purpose>().ok().filter(|purpose| purpose.may_be_uploaded());
    known.ok_or_else(|| {
        let right = Purpose::ALL.iter().filter(|purpose| purpose.may_be_uploaded()).map(|purpose| purpose.as_str());
        let right = right.collect::<Vec<_>>().join(", ");
        ApiError::bad_request("purpose", format!("purpose must be one of {right}, got `{purpose}`"))
    })
}

async fn read_text(name: &str, mut field: Field<'_>) -> Result<String> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(broken_form)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            return Err(ApiError::bad_request(name, format!("{name} is longer than {MAX_FIELD_BYTES} bytes")));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::bad_request(name, format!("{name} is not UTF-8 text")))
}

pub(super) fn broken_form(error: axum::extract::multipart::MultipartError) -> ApiError {
    ApiError::bad_body(format!("the form cannot be read: {}", error.body_text()))
}

fn form_to_file(form: &Form, owner: &str) -> Result<File> {
    let missing = |name: &str| ApiError::bad_request(name, format!("the form has no field `{name}`"));
    let purpose = form.purpose.as_deref().ok_or_else(|| missing("purpose"))?;
    let (id, filename, stored) = form.file.as_ref().ok_or_else(|| missing("file"))?;
    let purpose = check_purpose(purpose)?;
    let created_at_ms = now_ms();
    let names = ("expires_after[anchor]", "expires_after[seconds]");
    let expires_at_ms = expires_after(names, form.anchor.as_deref(), form.seconds.as_deref())?
        .map(|seconds| created_at_ms + seconds * 1000);
    Ok(File {
        id: *id,
        owner: owner.to_owned(),
        filename: filename.clone(),
        purpose,
        size_bytes: i64::try_from(stored.size_bytes).unwrap_or(i64::MAX),
        sha256: stored.sha256.clone(),
        object_key: file_key(&id.to_string()),
        status: FileStatus::Processed,
        created_at_ms,
        expires_at_ms,
    })
}

/// Seconds after which a file may be removed, from the two fields of those names.
pub(super) fn expires_after(
    (anchor_name, seconds_name): (&str, &str),
    anchor: Option<&str>,
    seconds: Option<&str>,
) -> Result<Option<i64>> {
    if let Some(anchor) = anchor.filter(|anchor| *anchor != "created_at") {
        return Err(ApiError::bad_request(anchor_name, format!("{anchor_name} must be created_at, got `{anchor}`")));
    }
    match (anchor, seconds) {
        (None, None) => Ok(None),
        (None, Some(_)) => {
            Err(ApiError::bad_request(anchor_name, format!("{anchor_name} must be given with {seconds_name}")))
        }
        (Some(_), seconds) => {
            let seconds = seconds.unwrap_or_default();
            let number = seconds.parse().ok().filter(|seconds| (3600..=2_592_000).contains(seconds));
            let message = || format!("{seconds_name} must be from 3600 to 2592000, got `{seconds}`");
            number.map(Some).ok_or_else(|| ApiError::bad_request(seconds_name, message()))
        }
    }
}

/// List files.
///
/// Newest first unless `order` is `asc`.
#[utoipa::path(get, path = "/v1/files", operation_id = "listFiles", tag = "Files",
    params(("purpose" = Option<Purpose>, Query, description = "Only files of this purpose"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 10000, description = "1 to 10000, default 10000"),
        ("order" = Option<String>, Query, pattern = "^(asc|desc)$", description = "`asc` or `desc` by age"),
        ("after" = Option<String>, Query, pattern = "^file-[0-9a-f]{32}$", description = "Id of the last file of the page before")),
    responses((status = 200, description = "Done", body = List<FileView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    mut params: Params,
) -> Result<Json<List<FileView>>> {
    let limit = params.limit(10_000, 10_000)?;
    let purpose = params.take("purpose")?;
    let after = params.take("after")?;
    let ascending = match params.take::<String>("order")?.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(order) => {
            return Err(ApiError::bad_request("order", format!("order must be asc or desc, got `{order}`")));
        }
    };
    params.finish()?;
    let filter = store::file::Filter { purpose, after, ascending, limit: limit + 1 };
    let mut conn = app.jobs.store.read().await?;
    let files = store::file::list(&mut conn, &owner, &filter, now_ms()).await?;
    let files = files.into_iter().map(FileView::from).collect();
    Ok(Json(List::page(files, limit, |file: &FileView| file.id.clone())))
}

/// The file of that id, if this owner has it.
pub(super) async fn find(app: &App, owner: &str, id: &str) -> Result<File> {
    let no_such_file = || ApiError::no_such_file(id);
    let file_id = id.parse().map_err(|_| no_such_file())?;
    let mut conn = app.jobs.store.read().await?;
    store::file::find(&mut conn, file_id, owner, now_ms()).await?.ok_or_else(no_such_file)
}

/// Retrieve a file.
#[utoipa::path(get, path = "/v1/files/{file_id}", operation_id = "retrieveFile", tag = "Files",
    params(("file_id" = String, Path, description = "Id of the file")),
    responses((status = 200, description = "Done", body = FileView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn retrieve(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<FileView>> {
    Ok(Json(find(&app, &owner, &id).await?.into()))
}

/// Delete a file.
///
/// Refused while an unfinished job uses it.
#[utoipa::path(delete, path = "/v1/files/{file_id}", operation_id = "deleteFile", tag = "Files",
    params(("file_id" = String, Path, description = "Id of the file")),
    responses((status = 200, description = "Done", body = DeletedFile), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn delete(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
) -> Result<Json<DeletedFile>> {
    let file_id: FileId = id.parse().map_err(|_| ApiError::no_such_file(&id))?;
    jobs::delete_file::delete_file(&app.jobs, &owner, file_id).await?;
    Ok(Json(DeletedFile { id, object: "file", deleted: true }))
}

/// Download a file's bytes.
///
/// Understands `Range`, `If-Range` and `If-None-Match`; tells the SHA-256 in `ETag` and `Repr-Digest`.
#[utoipa::path(get, path = "/v1/files/{file_id}/content", operation_id = "downloadFile", tag = "Files",
    params(("file_id" = String, Path, description = "Id of the file"),
        ("Range" = Option<String>, Header, description = "`bytes=` and one range"),
        ("If-Range" = Option<String>, Header, description = "The ETag that the range belongs to"),
        ("If-None-Match" = Option<String>, Header, description = "ETags of what the client has")),
    responses((status = 200, description = "The bytes", body = ObjectBytes, content_type = "application/octet-stream"),
        (status = 206, description = "The bytes of the range", body = ObjectBytes, content_type = "application/octet-stream"),
        (status = 304, description = "The client has these bytes"),
        (status = 307, description = "Where the bytes are, for five minutes; only where storage.presign is on"),
        (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn content(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    _: NoParams,
    method: Method,
    headers: HeaderMap,
) -> Result<Response> {
    let file = find(&app, &owner, &id).await?;
    let download = Download {
        object_key: &file.object_key,
        filename: &file.filename,
        size_bytes: file.size_bytes.unsigned_abs(),
        sha256: &file.sha256,
    };
    serve(&app.jobs.storage, &download, (&method, &headers)).await
}
