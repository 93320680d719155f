//! `/v1/models`, `/healthz`, `/readyz`.

use reqwest::StatusCode;
use serde_json::json;

use crate::support::{TestApp, column, error, text};

#[tokio::test]
async fn base_models_tuned_models_and_checkpoints_are_listed() {
    let app = TestApp::start().await;
    assert_eq!(column(&app.get_json("/v1/models").await, "id"), ["local:tiny.gguf", "smollm2-135m-instruct"]);
    let job = app.create_job(json!({"suffix": "mine"})).await;
    app.validate().await;
    assert_eq!(column(&app.get_json("/v1/models").await, "id").len(), 2, "no model before the job has succeeded");
    app.train(2).await;
    let job = app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&job["id"]))).await;
    let name = text(&job["fine_tuned_model"]);
    assert!(name.starts_with("ft:tiny:lorad:mine:"), "{name}");
    let names = column(&app.get_json("/v1/models").await, "id");
    assert_eq!(names[2..], [name.clone(), format!("{name}:ckpt-step-2")]);
    let model = app.get_json(&format!("/v1/models/{name}")).await;
    assert_eq!((&model["id"], &model["object"], &model["owned_by"]), (&json!(name), &json!("model"), &json!("lorad")));
    let missing = error(app.get("/v1/models/gpt-4%2Fx").await, StatusCode::NOT_FOUND).await;
    assert_eq!((&missing["param"], &missing["code"]), (&json!("model"), &json!("model_not_found")));
}

#[tokio::test]
async fn readiness_ends_with_the_shutdown() {
    let app = TestApp::start().await;
    assert_eq!(app.get_json("/healthz").await["status"], "ok");
    assert_eq!(app.get_json("/readyz").await["status"], "ok");
    app.shutdown.cancel();
    error(app.get("/readyz").await, StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(app.get_json("/healthz").await["status"], "ok");
}
