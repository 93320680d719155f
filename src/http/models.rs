//! `/v1/models`: base models of the catalogue and of the models folder, fine-tuned ones and their checkpoints.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::list::List;
use super::request::NoParams;
use crate::types::ORGANIZATION;
use crate::{jobs, store};

/// A model, as OpenAI shows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Model)]
pub(super) struct ModelView {
    /// Its name.
    id: String,
    /// Always `model`.
    #[schema(value_type = String, example = "model")]
    object: &'static str,
    /// When it was made, in Unix seconds; 0 where its file is not on this machine yet.
    created: i64,
    /// `system` for base models, else whose it is.
    #[schema(value_type = String, example = "lorad")]
    owned_by: &'static str,
}

async fn all(app: &App, owner: &str) -> Result<Vec<ModelView>> {
    let hub = app.hub.clone();
    let base = tokio::task::spawn_blocking(move || hub.list()).await.map_err(jobs::Error::from)?;
    let base = base.into_iter().map(|model| (model.name, model.created_at, "system"));
    let mut conn = app.jobs.store.read().await?;
    let tuned = store::job::models(&mut conn, owner).await?;
    let tuned = tuned.into_iter().map(|model| (model.name, model.created_at_ms / 1000, ORGANIZATION));
    Ok(base.chain(tuned).map(|(id, created, owned_by)| ModelView { id, object: "model", created, owned_by }).collect())
}

/// List models, all in one page.
#[utoipa::path(get, path = "/v1/models", operation_id = "listModels", tag = "Models",
    responses((status = 200, description = "Done", body = List<ModelView>), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>, Owner(owner): Owner, _: NoParams) -> Result<Json<List<ModelView>>> {
    Ok(Json(List::all(all(&app, &owner).await?, |model: &ModelView| model.id.clone())))
}

/// Retrieve a model.
#[utoipa::path(get, path = "/v1/models/{model}", operation_id = "retrieveModel", tag = "Models",
    params(("model" = String, Path, description = "Its name, `/` as `%2F`")),
    responses((status = 200, description = "Done", body = ModelView), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn retrieve(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(name): Path<String>,
    _: NoParams,
) -> Result<Json<ModelView>> {
    let model = all(&app, &owner).await?.into_iter().find(|model| model.id == name);
    model.map(Json).ok_or_else(|| ApiError::no_such_model(&name))
}

/// What is left of a deleted model.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedModel {
    /// Its name.
    id: String,
    /// Always `model`.
    #[schema(value_type = String, example = "model")]
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Delete a fine-tuned model: all artifacts of its job, or the checkpoint that it is. The job stays.
#[utoipa::path(delete, path = "/v1/models/{model}", operation_id = "deleteModel", tag = "Models",
    params(("model" = String, Path, description = "Its name, `/` as `%2F`")),
    responses((status = 200, description = "Done", body = DeletedModel), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn delete(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(name): Path<String>,
    _: NoParams,
) -> Result<Json<DeletedModel>> {
    if jobs::delete_model::delete_model(&app.jobs, &owner, &name).await? {
        return Ok(Json(DeletedModel { id: name, object: "model", deleted: true }));
    }
    if all(&app, &owner).await?.iter().any(|model| model.id == name) {
        let message = format!("`{name}` is a base model: only fine-tuned models can be deleted");
        return Err(ApiError::bad_request("model", message));
    }
    Err(ApiError::no_such_model(&name))
}
