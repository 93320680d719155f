//! The one place where a status code is made: every error becomes OpenAI's envelope here.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::types::inspection::Refusal;
use crate::types::job_spec::Invalid;
use crate::types::worker_protocol::{ATTEMPT_ENDED, OBJECT_DAMAGED};
use crate::{hub, jobs, storage, store};

/// OpenAI's error envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorObject {
    /// A sentence that names the thing and the value.
    pub message: String,
    /// OpenAI's kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field or parameter that is to blame.
    #[schema(required)]
    pub param: Option<String>,
    /// A word that programs can tell errors apart by.
    #[schema(required)]
    pub code: Option<String>,
}

/// An answer that is an error.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<Cow<'static, str>>,
    retry: Option<Retry>,
}

/// What a client that repeats requests on its own is told.
#[derive(Debug, Clone, Copy)]
enum Retry {
    After { seconds: u64 },
    Never,
}

pub(super) type Result<T, E = ApiError> = std::result::Result<T, E>;

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry: None }
    }

    fn code(self, code: impl Into<Cow<'static, str>>) -> Self {
        Self { code: Some(code.into()), ..self }
    }

    fn retry(self, retry: Retry) -> Self {
        Self { retry: Some(retry), ..self }
    }

    fn param(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// Bad input, with the parameter or field that is to blame.
    pub(super) fn bad_request(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message).param(param)
    }

    /// A request that is wrong as a whole.
    pub(super) fn bad_body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// No key, or a wrong one.
    pub(super) fn unauthorized() -> Self {
        let message = "Incorrect API key provided: send a valid key as `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key")
    }

    /// A key that may only look.
    pub(super) fn read_only(method: &axum::http::Method) -> Self {
        let message = format!("this API key has the scope `read`, which allows GET and HEAD, not {method}");
        Self::new(StatusCode::FORBIDDEN, message).code("insufficient_permissions")
    }

    /// A token that no attempt has.
    pub(super) fn unknown_token() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "no attempt has this token").code("invalid_token")
    }

    /// A caller that a browser was tricked into being.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// A body that is not JSON by its content type.
    pub(super) fn unsupported_media_type(found: &str) -> Self {
        let message = format!("content-type must be application/json, got `{found}`");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    }

    /// A body above its limit.
    pub(super) fn too_large(limit: u64) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is longer than {limit} bytes"))
    }

    /// An artifact that this owner does not have.
    pub(super) fn no_such_artifact(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("No such artifact: {id}")).param("id")
    }

    /// A file that this owner does not have.
    pub(super) fn no_such_file(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("No such File object: {id}")).param("id")
    }

    /// An upload that this owner does not have.
    pub(super) fn no_such_upload(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("No such Upload object: {id}")).param("upload_id")
    }

    /// A job that this owner does not have.
    pub(super) fn no_such_job(id: &str) -> Self {
        let message = format!("Could not find fine tune: {id}");
        Self::new(StatusCode::NOT_FOUND, message).param("fine_tune_id").code("fine_tune_not_found")
    }

    /// A model that is not there.
    pub(super) fn no_such_model(name: &str) -> Self {
        let message = format!("The model `{name}` does not exist");
        Self::new(StatusCode::NOT_FOUND, message).param("model").code("model_not_found")
    }

    /// A range that begins behind the end.
    pub(super) fn range_not_satisfiable(size_bytes: u64) -> Response {
        let message = format!("the range lies outside of the {size_bytes} bytes that there are");
        let mut response = Self::new(StatusCode::RANGE_NOT_SATISFIABLE, message).into_response();
        if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size_bytes}")) {
            response.headers_mut().insert(header::CONTENT_RANGE, value);
        }
        response
    }

    /// The server is about to end, or not ready yet.
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    /// The object storage does not do what it should: logged here, and only here.
    fn storage_unavailable(error: &storage::Error) -> Self {
        tracing::error!(error = error as &dyn std::error::Error, "object storage failed");
        let message = "the server's object storage does not answer as it should, try again later; the server's log has \
                       more under this x-request-id";
        Self::unavailable(message).code("storage_unavailable")
    }

    /// A fault of the server's own: logged here, and only here.
    pub(super) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error, "request failed");
        let message = "The server had an error while processing your request; its log has more under this x-request-id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// The envelope for a status that something else made: the router, an extractor, a timeout.
    pub(super) fn of_status(status: StatusCode, message: &str) -> Self {
        Self::new(status, message)
    }

    /// The envelope as it goes over the wire; also what an event stream ends in.
    pub(super) fn body(&self) -> ErrorBody {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        ErrorBody {
            error: ErrorObject {
                message: self.message.clone(),
                kind: kind.into(),
                param: self.param.clone(),
                code: self.code.as_deref().map(str::to_owned),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        match self.retry {
            None => (),
            Some(Retry::After { seconds }) => {
                response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            Some(Retry::Never) => {
                response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
            }
        }
        response
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        let error = Self::bad_body(invalid.message);
        Self { param: invalid.param, ..error }
    }
}

impl From<store::Error> for ApiError {
    fn from(error: store::Error) -> Self {
        Self::internal(&error)
    }
}

impl From<storage::Error> for ApiError {
    fn from(error: storage::Error) -> Self {
        match error {
            storage::Error::TooLarge { limit } => Self::too_large(limit),
            storage::Error::Body(_) => Self::bad_body(error.to_string()),
            storage::Error::Backend(_) | storage::Error::Silent(_) => Self::storage_unavailable(&error),
            storage::Error::NotFound(_) | storage::Error::Damaged { .. } => {
                tracing::error!(error = &error as &dyn std::error::Error, "an object is not what was written");
                let message = "the server's object storage does not have these bytes any more as they were written";
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, message).code(OBJECT_DAMAGED)
            }
            storage::Error::Settings(_)
            | storage::Error::Folder { .. }
            | storage::Error::Open(_)
            | storage::Error::Probe { .. }
            | storage::Error::HalfWritten(_) => Self::internal(&error),
        }
    }
}

impl From<hub::Error> for ApiError {
    fn from(error: hub::Error) -> Self {
        match error {
            hub::Error::NotFound { .. } | hub::Error::Unsupported { .. } => {
                Self::new(StatusCode::NOT_FOUND, error.to_string()).param("model").code("model_not_found")
            }
            hub::Error::WrongHash { .. } => Self::bad_request("model", error.to_string()).code("model_damaged"),
            hub::Error::Download { .. } | hub::Error::Io { .. } => Self::internal(&error),
        }
    }
}

impl From<jobs::Error> for ApiError {
    fn from(error: jobs::Error) -> Self {
        let message = error.to_string();
        match error {
            jobs::Error::NoSuchFile(id) => Self::no_such_file(&id),
            jobs::Error::NoSuchUpload(id) => Self::no_such_upload(&id),
            jobs::Error::Upload { param, .. } => Self::bad_request(param, message),
            jobs::Error::NoSuchTrainingFile(_) => Self::bad_request("training_file", message),
            jobs::Error::NoSuchValidationFile(_) => Self::bad_request("validation_file", message),
            jobs::Error::WrongPurpose { field, .. } => Self::bad_request(field, message),
            jobs::Error::NoSuchAdapter(_) => Self::bad_request("lora.init_from", message),
            jobs::Error::NoSuchJob(id) => Self::no_such_job(&id),
            jobs::Error::FileInUse { .. } => Self::bad_request("id", message).code("file_in_use"),
            jobs::Error::JobHasEnded { .. } => Self::bad_request("fine_tune_id", message).code("job_has_ended"),
            jobs::Error::NotDeletable { .. } => Self::bad_request("fine_tune_id", message).code("not_deletable"),
            jobs::Error::NotExportable { .. } => Self::bad_request("fine_tune_id", message).code("not_exportable"),
            jobs::Error::ModelInUse { .. } => Self::bad_request("model", message).code("model_in_use"),
            jobs::Error::IdempotencyKeyReused { .. } => Self::bad_request("Idempotency-Key", message),
            jobs::Error::Model(error) => error.into(),
            jobs::Error::AttemptEnded => Self::new(StatusCode::GONE, message).code(ATTEMPT_ENDED),
            jobs::Error::Worker(_) => Self::bad_body(message),
            jobs::Error::Store(error) => error.into(),
            jobs::Error::Storage(error) => error.into(),
            jobs::Error::TooManyInspections => Self::unavailable(message).retry(Retry::After { seconds: 5 }),
            jobs::Error::InspectionTooLong { .. } => Self::unavailable(message).retry(Retry::Never),
            jobs::Error::Inspection(_) => Self::bad_body(message).code("inspection_failed"),
            jobs::Error::Inspector(error) => Self::internal(error.as_ref()),
            jobs::Error::Refused(Refusal { code, param, .. }) => {
                let status = match code.as_str() {
                    "model_not_found" => StatusCode::NOT_FOUND,
                    "model_download_failed" => StatusCode::SERVICE_UNAVAILABLE,
                    _ => StatusCode::BAD_REQUEST,
                };
                Self { param, ..Self::new(status, message).code(code) }
            }
            jobs::Error::Background(error) => Self::internal(&error),
        }
    }
}
