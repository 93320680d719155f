//! API keys: what is another owner's does not exist, on every route that the specification has.

use std::collections::BTreeMap;

use lorad::jobs::keys::revoke_key;
use lorad::types::api_key::Scope;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestApp, error, ok_json, text};

/// What Alice has: a value for each path parameter of the specification.
async fn things_of(app: &TestApp) -> BTreeMap<&'static str, String> {
    let job = app.create_job(json!({"suffix": "hers"})).await;
    app.validate().await;
    app.train(2).await;
    let id = text(&job["id"]);
    let job = app.get_json(&format!("/v1/fine_tuning/jobs/{id}")).await;
    let artifacts = app.get_json(&format!("/v1/fine_tuning/jobs/{id}/artifacts")).await;
    let upload = json!({"bytes": 10, "filename": "a", "mime_type": "text/plain", "purpose": "fine-tune"});
    let upload = ok_json(app.post_json("/v1/uploads", &upload).await).await;
    BTreeMap::from([
        ("file_id", text(&job["training_file"])),
        ("upload_id", text(&upload["id"])),
        ("fine_tuning_job_id", id),
        ("artifact_id", text(&artifacts["data"][0]["id"])),
        ("model", text(&job["fine_tuned_model"])),
    ])
}

/// Every operation of the specification: method, path, operation.
fn operations(specification: &Value) -> Vec<(Method, String, Value)> {
    let mut operations = Vec::new();
    for (path, methods) in specification["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let method = method.to_uppercase().parse().expect("a method");
            operations.push((method, path.clone(), operation.clone()));
        }
    }
    operations
}

/// The operation with its body, as small as it may be.
fn with_body(request: RequestBuilder, operation: &Value) -> RequestBuilder {
    let body = &operation["requestBody"]["content"];
    if body.get("multipart/form-data").is_some() {
        let part = reqwest::multipart::Part::bytes(b"0123456789".to_vec()).file_name("data");
        return request.multipart(reqwest::multipart::Form::new().part("data", part));
    }
    match operation["operationId"].as_str() {
        Some("completeUpload") => request.json(&json!({"part_ids": ["part_00000000000000000000000000000000"]})),
        Some("createArtifact") => request.json(&json!({"type": "gguf", "quantization": "q8_0"})),
        _ => request.header("content-type", "application/json").body(""),
    }
}

#[tokio::test]
async fn what_is_another_owners_does_not_exist_on_any_route() {
    let mut app = TestApp::start().await;
    let (_, alice) = app.create_key("alice", Scope::Write).await;
    let (_, bob) = app.create_key("bob", Scope::Write).await;
    app.show_key(&alice);
    let hers = things_of(&app).await;
    app.show_key(&bob);
    let specification = app.get_json("/openapi.json").await;
    let (mut with_id, mut lists) = (0, 0);
    for (method, path, operation) in operations(&specification) {
        let what = format!("{method} {path}");
        let Some((before, rest)) = path.split_once('{') else {
            if method != Method::GET {
                continue;
            }
            let answer = app.get(&path).await.text().await.expect("a body");
            let seen = hers.values().find(|id| answer.contains(id.as_str()));
            assert!(seen.is_none(), "{what} shows {seen:?}");
            lists += 1;
            continue;
        };
        let (parameter, after) = rest.split_once('}').expect("a parameter");
        let id = hers.get(parameter).unwrap_or_else(|| panic!("{what}: give things_of() a `{parameter}`"));
        let wanted = format!("{before}{}{after}", id.replace('/', "%2F"));
        let answer = with_body(app.request(method, &wanted), &operation).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::NOT_FOUND, "{what}: {:?}", answer.text().await);
        with_id += 1;
    }
    assert!(with_id > 20 && lists > 3, "{with_id} routes with an id, {lists} without");
    // Nothing of it has changed anything.
    app.show_key(&alice);
    let job = app.get_json(&format!("/v1/fine_tuning/jobs/{}", hers["fine_tuning_job_id"])).await;
    assert_eq!(job["status"], "succeeded");
    ok_json(app.post_empty(&format!("/v1/uploads/{}/cancel", hers["upload_id"])).await).await;
}

#[tokio::test]
async fn a_job_cannot_use_what_is_another_owners() {
    let mut app = TestApp::start().await;
    let (_, alice) = app.create_key("alice", Scope::Write).await;
    let (_, bob) = app.create_key("bob", Scope::Write).await;
    app.show_key(&alice);
    let hers = things_of(&app).await;
    app.show_key(&bob);
    let his = app.upload("{}\n").await;
    let (theirs, model) = (&hers["file_id"], &hers["model"]);
    for (changes, param) in [
        (json!({"training_file": theirs}), "training_file"),
        (json!({"training_file": his, "validation_file": theirs}), "validation_file"),
        (json!({"training_file": his, "lora": {"init_from": model}}), "lora.init_from"),
        (json!({"training_file": his, "lora": {"init_from": hers["artifact_id"]}}), "lora.init_from"),
    ] {
        let mut body = changes;
        body["model"] = json!("local:tiny.gguf");
        for path in ["/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/estimate"] {
            let refused = error(app.post_json(path, &body).await, StatusCode::BAD_REQUEST).await;
            assert_eq!(refused["param"], param, "{path}: {refused}");
        }
    }
    // Two owners may use the same key for a repeated request.
    let mut jobs = Vec::new();
    for key in [&alice, &bob, &bob] {
        app.show_key(key);
        let file = if jobs.is_empty() { theirs } else { &his };
        let body = json!({"model": "local:tiny.gguf", "training_file": file});
        let request = app.request(Method::POST, "/v1/fine_tuning/jobs").header("Idempotency-Key", "once");
        let job = ok_json(request.json(&body).send().await.expect("an answer")).await;
        jobs.push(text(&job["id"]));
    }
    assert!(jobs[0] != jobs[1] && jobs[1] == jobs[2], "{jobs:?}");
}

#[tokio::test]
async fn keys_are_needed_once_there_is_one_and_a_revoked_one_ends_at_once() {
    let mut app = TestApp::start().await;
    ok_json(app.get("/v1/models").await).await;
    let (id, key) = app.create_key("default", Scope::Write).await;
    for path in ["/v1/models", "/metrics", "/v1/nowhere"] {
        let refused = error(app.get(path).await, StatusCode::UNAUTHORIZED).await;
        assert_eq!(refused["code"], "invalid_api_key");
    }
    for path in ["/healthz", "/openapi.json"] {
        ok_json(app.get(path).await).await;
    }
    app.show_key(&key);
    ok_json(app.get("/v1/models").await).await;
    assert!(revoke_key(&app.jobs.store, id).await.expect("a database"));
    error(app.get("/v1/models").await, StatusCode::UNAUTHORIZED).await;
}

#[tokio::test]
async fn a_key_that_may_read_changes_nothing() {
    let mut app = TestApp::start().await;
    let file = app.upload("{}\n").await;
    let (_, key) = app.create_key("default", Scope::Read).await;
    app.show_key(&key);
    ok_json(app.get(&format!("/v1/files/{file}")).await).await;
    assert_eq!(app.get(&format!("/v1/files/{file}/content")).await.status(), StatusCode::OK);
    for (method, path) in [
        (Method::DELETE, format!("/v1/files/{file}")),
        (Method::POST, "/v1/fine_tuning/jobs".to_owned()),
        (Method::POST, "/v1/nowhere".to_owned()),
    ] {
        let answer = app.request(method, &path).send().await.expect("an answer");
        let refused = error(answer, StatusCode::FORBIDDEN).await;
        assert_eq!(refused["code"], "insufficient_permissions", "{path}");
    }
    ok_json(app.get(&format!("/v1/files/{file}")).await).await;
}
