//! Artifacts: list, retrieve, download in parts, and the result file.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lorad::types::attempt::TaskKind;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{TestApp, column, error, ok_json, parity, text};

/// A server whose one job has made its artifacts; the adapter is `0123456789`.
async fn with_artifacts() -> (TestApp, Value) {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    app.train(3).await;
    let job = app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&job["id"]))).await;
    (app, job)
}

fn header(response: &Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().expect("text").to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn artifacts_are_listed_and_retrieved() {
    let (app, job) = with_artifacts().await;
    let list = app.get_json(&format!("/v1/fine_tuning/jobs/{}/artifacts", text(&job["id"]))).await;
    assert_eq!(column(&list, "type"), ["adapter", "gguf"]);
    assert_eq!(column(&list, "filename"), ["adapter.tar", "model-q4_k_m.gguf"]);
    let adapter = &list["data"][0];
    assert_eq!((&adapter["parity"], &list["data"][1]["parity"]), (&parity(), &json!(null)));
    assert_eq!((&adapter["bytes"], &adapter["quantization"]), (&json!(10), &json!(null)));
    assert_eq!(list["data"][1]["quantization"], "q4_k_m");
    assert_eq!(app.get_json(&format!("/v1/artifacts/{}", text(&adapter["id"]))).await, *adapter);
    for path in ["/v1/artifacts/nope", "/v1/artifacts/nope/content", "/v1/fine_tuning/jobs/nope/artifacts"] {
        error(app.get(path).await, StatusCode::NOT_FOUND).await;
    }
}

#[tokio::test]
async fn a_download_tells_its_digest_its_name_and_its_kind() {
    let (app, job) = with_artifacts().await;
    let list = app.get_json(&format!("/v1/fine_tuning/jobs/{}/artifacts", text(&job["id"]))).await;
    let path = format!("/v1/artifacts/{}/content", text(&list["data"][0]["id"]));
    let response = app.get(&path).await;
    let hash = Sha256::digest(b"0123456789");
    assert_eq!(header(&response, "etag"), format!("\"{}\"", hex::encode(hash)));
    assert_eq!(header(&response, "repr-digest"), format!("sha-256=:{}:", BASE64_STANDARD.encode(hash)));
    let disposition = "attachment; filename=\"adapter.tar\"; filename*=UTF-8''adapter.tar";
    assert_eq!(header(&response, "content-disposition"), disposition);
    assert_eq!(header(&response, "content-type"), "application/octet-stream");
    assert_eq!(header(&response, "x-content-type-options"), "nosniff");
    assert_eq!(
        (header(&response, "accept-ranges"), header(&response, "content-length")),
        ("bytes".into(), "10".into())
    );
    assert_eq!(response.bytes().await.expect("a body"), "0123456789");
    let head = app.request(Method::HEAD, &path).send().await.expect("an answer");
    assert_eq!((head.status(), header(&head, "content-length")), (StatusCode::OK, "10".into()));
}

#[tokio::test]
async fn a_download_can_be_continued() {
    let (app, job) = with_artifacts().await;
    let list = app.get_json(&format!("/v1/fine_tuning/jobs/{}/artifacts", text(&job["id"]))).await;
    let path = format!("/v1/artifacts/{}/content", text(&list["data"][0]["id"]));
    let etag = header(&app.get(&path).await, "etag");
    let ask = async |headers: &[(&str, &str)]| {
        let mut request = app.request(Method::GET, &path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("an answer");
        let (status, range) = (response.status().as_u16(), header(&response, "content-range"));
        (status, range, response.text().await.expect("a body"))
    };
    let whole = (200, String::new(), "0123456789".to_owned());
    let part = |range: &str, body: &str| (206, format!("bytes {range}/10"), body.to_owned());
    assert_eq!(ask(&[("range", "bytes=4-")]).await, part("4-9", "456789"));
    assert_eq!(ask(&[("range", "bytes=2-3")]).await, part("2-3", "23"));
    assert_eq!(ask(&[("range", "bytes=-4")]).await, part("6-9", "6789"));
    assert_eq!(ask(&[("range", "bytes=8-99")]).await, part("8-9", "89"));
    assert_eq!(ask(&[("range", "bytes=4-"), ("if-range", &etag)]).await, part("4-9", "456789"));
    assert_eq!(ask(&[("range", "bytes=4-"), ("if-range", "\"other\"")]).await, whole);
    assert_eq!(ask(&[("range", "bytes=0-1,3-4")]).await, whole);
    assert_eq!(ask(&[("if-none-match", "\"other\"")]).await, whole);
    for tags in [etag.as_str(), "*", &format!("\"a\", W/{etag}")] {
        let (status, _, body) = ask(&[("if-none-match", tags)]).await;
        assert_eq!((status, body), (304, String::new()), "{tags}");
    }
    let (status, range, body) = ask(&[("range", "bytes=10-")]).await;
    assert_eq!((status, range.as_str()), (416, "bytes */10"));
    assert!(body.contains("invalid_request_error"), "{body}");
}

#[tokio::test]
async fn the_result_file_has_openais_header_and_a_line_a_step() {
    let (app, job) = with_artifacts().await;
    let id = text(&job["result_files"][0]);
    let file = app.get_json(&format!("/v1/files/{id}")).await;
    assert_eq!(file["purpose"], "fine-tune-results");
    let csv = app.get(&format!("/v1/files/{id}/content")).await.text().await.expect("a body");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines[..2], ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", "1,2,0.5,,"]);
    assert_eq!(lines.len(), 4);
}

#[tokio::test]
async fn one_more_artifact_has_an_id_before_it_is_made() {
    let (app, job) = with_artifacts().await;
    let path = format!("/v1/fine_tuning/jobs/{}/artifacts", text(&job["id"]));
    let there = ok_json(app.post_json(&path, &json!({"type": "gguf"})).await).await;
    assert_eq!((&there["status"], &there["filename"]), (&json!("succeeded"), &json!("model-q4_k_m.gguf")));
    let asked = ok_json(app.post_json(&path, &json!({"type": "gguf", "quantization": "q8_0"})).await).await;
    assert_eq!((&asked["status"], &asked["bytes"], &asked["filename"]), (&json!("queued"), &json!(null), &json!(null)));
    let id = text(&asked["id"]);
    assert_eq!(column(&app.get_json(&path).await, "status"), ["succeeded", "succeeded", "queued"]);
    let early = error(app.get(&format!("/v1/artifacts/{id}/content")).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(early["param"], "id");

    let worker = app.take_up(TaskKind::Export).await;
    assert_eq!(app.get_json(&format!("/v1/artifacts/{id}")).await["status"], "running");
    let task = worker.get("task").await;
    assert_eq!(task["artifacts"], json!([{"type": "gguf", "quantization": "q8_0"}]));
    assert_eq!((&task["training_file"], &task["init_from"]["size_bytes"]), (&json!(null), &json!(10)));
    let adapter = worker.request(Method::GET, "init_from").send().await.expect("an answer");
    assert_eq!(adapter.bytes().await.expect("a body"), "0123456789");
    // The second time the worker had no answer to the first.
    for _ in 0..2 {
        worker.put_artifact("type=gguf&quantization=q8_0&filename=m-q8_0.gguf", b"GGUF2").await;
    }
    worker.finish(json!({"result": "succeeded"})).await;
    let made = app.get_json(&format!("/v1/artifacts/{id}")).await;
    assert_eq!((&made["status"], &made["bytes"], &made["id"]), (&json!("succeeded"), &json!(5), &json!(id)));
    assert_eq!(app.get(&format!("/v1/artifacts/{id}/content")).await.bytes().await.expect("a body"), "GGUF2");
}

#[tokio::test]
async fn an_export_that_cannot_be_made_says_why() {
    let (app, job) = with_artifacts().await;
    let path = format!("/v1/fine_tuning/jobs/{}/artifacts", text(&job["id"]));
    for (body, param) in [
        (json!({"type": "zip"}), "type"),
        (json!({"type": "gguf", "quantization": "q9"}), "quantization"),
        (json!({"type": "merged", "quantization": "q8_0"}), "quantization"),
        (json!({"type": "merged", "colour": 1}), "colour"),
        (json!({}), "type"),
    ] {
        assert_eq!(error(app.post_json(&path, &body).await, StatusCode::BAD_REQUEST).await["param"], param, "{body}");
    }
    let asked = ok_json(app.post_json(&path, &json!({"type": "merged"})).await).await;
    let worker = app.take_up(TaskKind::Export).await;
    worker.finish(json!({"result": "failed", "code": "export_failed", "message": "too far off"})).await;
    let failed = app.get_json(&format!("/v1/artifacts/{}", text(&asked["id"]))).await;
    assert_eq!(failed["error"], json!({"code": "export_failed", "message": "too far off"}));
    assert_eq!(app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&job["id"]))).await["status"], "succeeded");

    let waiting = app.create_job(json!({})).await;
    let path = format!("/v1/fine_tuning/jobs/{}/artifacts", text(&waiting["id"]));
    let refused = error(app.post_json(&path, &json!({"type": "merged"})).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["code"], "not_exportable", "{refused}");
}
