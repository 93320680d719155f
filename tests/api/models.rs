//! `/v1/models`, `/healthz`, `/readyz`.

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{TestApp, column, error, ok_json, text};

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
async fn a_deleted_model_is_gone_with_its_artifacts_and_its_job_stays() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({"suffix": "mine"})).await;
    app.validate().await;
    app.train(2).await;
    let path = format!("/v1/fine_tuning/jobs/{}", text(&job["id"]));
    let name = text(&app.get_json(&path).await["fine_tuned_model"]);
    let delete = async |name: &str| {
        let path = format!("/v1/models/{}", name.replace('/', "%2F"));
        app.request(Method::DELETE, &path).send().await.expect("an answer")
    };
    let user = app.create_job(json!({"lora": {"init_from": name}})).await;
    let refused = error(delete(&name).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["code"], "model_in_use", "{refused}");
    ok_json(app.post_empty(&format!("/v1/fine_tuning/jobs/{}/cancel", text(&user["id"]))).await).await;

    let deleted = ok_json(delete(&name).await).await;
    assert_eq!(deleted, json!({"id": name, "object": "model", "deleted": true}));
    error(delete(&name).await, StatusCode::NOT_FOUND).await;
    error(app.get(&format!("/v1/models/{name}")).await, StatusCode::NOT_FOUND).await;
    let artifacts = app.get_json(&format!("{path}/artifacts")).await;
    assert_eq!(artifacts["data"], json!([]));
    assert_eq!(app.get_json(&path).await["status"], "succeeded");
    let more = app.post_json(&format!("{path}/artifacts"), &json!({"type": "merged"})).await;
    assert_eq!(error(more, StatusCode::BAD_REQUEST).await["code"], "not_exportable");

    let checkpoint = format!("{name}:ckpt-step-2");
    ok_json(app.get(&format!("/v1/models/{checkpoint}")).await).await;
    ok_json(delete(&checkpoint).await).await;
    assert_eq!(app.get_json(&format!("{path}/checkpoints")).await["data"], json!([]));
    let base = error(delete("local:tiny.gguf").await, StatusCode::BAD_REQUEST).await;
    assert_eq!(base["param"], "model", "{base}");
    error(delete("ft:nobody").await, StatusCode::NOT_FOUND).await;
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
