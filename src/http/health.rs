//! `/healthz` and `/readyz`.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::error::{ApiError, ErrorBody, Result};

/// A sign of life.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// Always `ok`.
    #[schema(value_type = String, example = "ok")]
    status: &'static str,
    /// The server's version.
    #[schema(value_type = String)]
    version: &'static str,
}

const OK: Health = Health { status: "ok", version: env!("CARGO_PKG_VERSION") };

/// Whether the server lives.
#[utoipa::path(get, path = "/healthz", operation_id = "healthz", tag = "Server", security(()), responses((status = 200, description = "Done", body = Health)))]
pub(super) async fn healthz() -> Json<Health> {
    Json(OK)
}

/// Whether the server takes requests: its database answers, and it is not about to end.
#[utoipa::path(get, path = "/readyz", operation_id = "readyz", tag = "Server", security(()),
    responses((status = 200, description = "Done", body = Health), (status = 503, description = "Not now", body = ErrorBody)))]
pub(super) async fn readyz(State(app): State<App>) -> Result<Json<Health>> {
    if app.shutdown.is_cancelled() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    if let Err(error) = app.jobs.store.ping().await {
        tracing::error!(%error, "the database does not answer");
        return Err(ApiError::unavailable("the database does not answer"));
    }
    Ok(Json(OK))
}
