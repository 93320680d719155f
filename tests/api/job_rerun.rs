//! A job is run again.

use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::{ROWS, TestApp, column, error, ok_json, text};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn path(job: &Value) -> String {
    format!("{JOBS}/{}/rerun", text(&job["id"]))
}

/// A job without what no two have in common.
fn settings(job: &Value) -> Value {
    let mut job = job.clone();
    for own in ["id", "created_at"] {
        job[own] = Value::Null;
    }
    job
}

#[tokio::test]
async fn a_rerun_has_the_same_settings_but_for_what_is_said() {
    let app = TestApp::start().await;
    let old = app
        .create_job(json!({"suffix": "first", "metadata": {"team": "a"}, "seed": 7, "lora": {"r": 4, "dropout": 0.25},
            "hyperparameters": {"n_epochs": 2}, "training": {"warmup_steps": 1}, "artifacts": [{"type": "gguf_lora"}]}))
        .await;
    // As the official client posts without a body, and as a plain POST does.
    let again = ok_json(app.post_empty(&path(&old)).await).await;
    assert_ne!(again["id"], old["id"]);
    assert_eq!(settings(&again), settings(&old));
    let plain = app.request(Method::POST, &path(&old)).send().await.expect("an answer");
    assert_eq!(settings(&ok_json(plain).await), settings(&old));

    let changes = json!({"suffix": "second", "metadata": null});
    let changed = ok_json(app.post_json(&path(&again), &changes).await).await;
    let mut expected = settings(&old);
    expected["user_provided_suffix"] = json!("second");
    expected["metadata"] = Value::Null;
    assert_eq!(settings(&changed), expected);
    let events = app.get_json(&format!("{JOBS}/{}/events", text(&changed["id"]))).await;
    assert_eq!(column(&events, "message").len(), 2);
}

#[tokio::test]
async fn what_a_rerun_cannot_change_or_has_lost_is_named() {
    let app = TestApp::start().await;
    let old = app.create_job(json!({})).await;
    for (body, param) in
        [(json!({"seed": 1}), "seed"), (json!({"suffix": ""}), "suffix"), (json!({"metadata": 1}), "metadata")]
    {
        let refused = error(app.post_json(&path(&old), &body).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["param"], param, "{refused}");
    }
    let form = app.request(Method::POST, &path(&old)).header("content-type", "text/plain").body("{}");
    error(form.send().await.expect("an answer"), StatusCode::UNSUPPORTED_MEDIA_TYPE).await;
    error(app.post_empty(&format!("{JOBS}/ftjob-1/rerun")).await, StatusCode::NOT_FOUND).await;

    app.validate().await;
    app.train(3).await;
    let model = app.get_json(&format!("{JOBS}/{}", text(&old["id"]))).await["fine_tuned_model"].clone();
    let next = app.create_job(json!({"lora": {"init_from": model}})).await;
    let delete = async |path: String| {
        ok_json(app.request(Method::DELETE, &path).send().await.expect("an answer")).await;
    };
    ok_json(app.post_empty(&format!("{JOBS}/{}/cancel", text(&next["id"]))).await).await;
    delete(format!("{JOBS}/{}", text(&old["id"]))).await;
    let lost = error(app.post_empty(&path(&next)).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(lost["param"], "lora.init_from", "{lost}");
    delete(format!("/v1/files/{}", text(&next["training_file"]))).await;
    let lost = error(app.post_empty(&path(&next)).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(lost["param"], "training_file", "{lost}");
}

#[tokio::test]
async fn a_repeated_rerun_with_its_key_makes_no_second_job() {
    let app = TestApp::start().await;
    let body = json!({"model": "local:tiny.gguf", "training_file": app.upload(&ROWS.repeat(10)).await});
    let post = async |path: &str, key: &str, body: &Value| -> Response {
        let request = app.request(Method::POST, path).header("idempotency-key", key).json(body);
        request.send().await.expect("an answer")
    };
    let old = ok_json(post(JOBS, "zero", &body).await).await;
    let first = ok_json(post(&path(&old), "one", &json!({"suffix": "a"})).await).await;
    assert_eq!(ok_json(post(&path(&old), "one", &json!({"suffix": "a"})).await).await["id"], first["id"]);
    for (path, key, body) in [
        (path(&old), "one", json!({"suffix": "b"})),
        (path(&first), "one", json!({"suffix": "a"})),
        (path(&old), "zero", json!({})),
        (JOBS.to_owned(), "one", body.clone()),
    ] {
        let reused = error(post(&path, key, &body).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(reused["param"], "Idempotency-Key", "{path} {key}");
    }
    assert_eq!(column(&app.get_json(JOBS).await, "id").len(), 2);
}
