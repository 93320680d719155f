//! A finished job is deleted, with what it left.

use lorad::types::attempt::TaskKind;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::{ROWS, TestApp, column, error, ok_json, text};

const JOBS: &str = "/v1/fine_tuning/jobs";

async fn delete(app: &TestApp, id: &Value) -> Response {
    // As the official client sends one.
    let request =
        app.request(Method::DELETE, &format!("{JOBS}/{}", text(id))).header("content-type", "application/json");
    request.send().await.expect("an answer")
}

/// A job that has trained and succeeded.
async fn succeeded(app: &TestApp) -> Value {
    let id = app.create_job(json!({})).await["id"].clone();
    app.validate().await;
    app.train(3).await;
    app.get_json(&format!("{JOBS}/{}", text(&id))).await
}

#[tokio::test]
async fn nothing_of_a_deleted_job_is_left_but_its_result_file() {
    let app = TestApp::start().await;
    let (job, other) = (succeeded(&app).await, succeeded(&app).await);
    let path = format!("{JOBS}/{}", text(&job["id"]));
    let artifacts = app.get_json(&format!("{path}/artifacts")).await;
    let objects = async || {
        let all = app.jobs.storage.keys_older_than("jobs", std::time::Duration::ZERO).await.expect("a list");
        all.into_iter().filter(|key| key.contains(&text(&job["id"]))).count()
    };
    assert_eq!(objects().await, 3);

    let answer = ok_json(delete(&app, &job["id"]).await).await;
    assert_eq!(answer, json!({"id": job["id"], "object": "fine_tuning.job", "deleted": true}));
    for gone in ["", "/events", "/metrics", "/logs", "/checkpoints", "/artifacts"] {
        error(app.get(&format!("{path}{gone}")).await, StatusCode::NOT_FOUND).await;
    }
    error(app.get(&format!("/v1/artifacts/{}", text(&artifacts["data"][0]["id"]))).await, StatusCode::NOT_FOUND).await;
    error(app.get(&format!("/v1/models/{}", text(&job["fine_tuned_model"]))).await, StatusCode::NOT_FOUND).await;
    error(delete(&app, &job["id"]).await, StatusCode::NOT_FOUND).await;
    assert_eq!(objects().await, 0);
    let result = app.get(&format!("/v1/files/{}/content", text(&job["result_files"][0]))).await;
    assert_eq!(result.text().await.expect("a body").lines().count(), 4);

    assert_eq!(column(&app.get_json(JOBS).await, "id"), [text(&other["id"])]);
    let artifact = &app.get_json(&format!("{JOBS}/{}/artifacts", text(&other["id"]))).await["data"][0];
    let bytes = app.get(&format!("/v1/artifacts/{}/content", text(&artifact["id"]))).await;
    assert_eq!(bytes.text().await.expect("a body"), "0123456789");
    app.get_json(&format!("/v1/models/{}", text(&other["fine_tuned_model"]))).await;
}

#[tokio::test]
async fn only_a_job_that_nobody_works_for_is_deleted() {
    let app = TestApp::start().await;
    let id = app.create_job(json!({})).await["id"].clone();
    let waiting = error(delete(&app, &id).await, StatusCode::BAD_REQUEST).await;
    assert_eq!((&waiting["code"], &waiting["param"]), (&json!("not_deletable"), &json!("fine_tune_id")));
    assert!(text(&waiting["message"]).contains("its status is validating_files"), "{waiting}");

    let worker = app.take_up(TaskKind::Validate).await;
    let attempt = text(&worker.get("task").await["attempt_id"]);
    std::fs::write(app.log_path(&attempt), "a line\n").expect("a log");
    ok_json(app.post_empty(&format!("{JOBS}/{}/cancel", text(&id))).await).await;
    let stopping = error(delete(&app, &id).await, StatusCode::BAD_REQUEST).await;
    assert!(text(&stopping["message"]).contains(&format!("attempt {attempt} of it has not ended")), "{stopping}");

    worker.finish(json!({"result": "stopped"})).await;
    ok_json(delete(&app, &id).await).await;
    assert!(!app.log_path(&attempt).exists());
    error(delete(&app, &json!("ftjob-1")).await, StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn an_adapter_that_a_job_begins_with_keeps_its_job() {
    let app = TestApp::start().await;
    let job = succeeded(&app).await;
    let next = app.create_job(json!({"lora": {"init_from": job["fine_tuned_model"]}})).await;
    let needed = error(delete(&app, &job["id"]).await, StatusCode::BAD_REQUEST).await;
    assert!(text(&needed["message"]).contains(&text(&next["id"])), "{needed}");
    ok_json(app.post_empty(&format!("{JOBS}/{}/cancel", text(&next["id"]))).await).await;
    ok_json(delete(&app, &job["id"]).await).await;
    app.get_json(&format!("{JOBS}/{}", text(&next["id"]))).await;
}

#[tokio::test]
async fn the_idempotency_key_of_a_deleted_job_makes_a_new_one() {
    let app = TestApp::start().await;
    let body = json!({"model": "local:tiny.gguf", "training_file": app.upload(&ROWS.repeat(10)).await});
    let create = async || {
        let request = app.request(Method::POST, JOBS).header("idempotency-key", "one").json(&body);
        ok_json(request.send().await.expect("an answer")).await["id"].clone()
    };
    let first = create().await;
    assert_eq!(create().await, first);
    ok_json(app.post_empty(&format!("{JOBS}/{}/cancel", text(&first))).await).await;
    ok_json(delete(&app, &first).await).await;
    assert_ne!(create().await, first);
}
