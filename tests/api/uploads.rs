//! `/v1/uploads`: files that come in parts.

use std::time::Duration;

use lorad::jobs::uploads;
use lorad::types::now_ms;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestApp, error, ok_json, text};

const UPLOADS: &str = "/v1/uploads";

async fn begin(app: &TestApp, bytes: usize, extra: Value) -> Value {
    let mut body = json!({"bytes": bytes, "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    ok_json(app.post_json(UPLOADS, &body).await).await
}

async fn send_part(app: &TestApp, upload: &str, bytes: &[u8]) -> Response {
    // As OpenAI's client sends it.
    let part = Part::bytes(bytes.to_vec()).file_name("upload");
    let form = Form::new().part("data", part);
    app.request(Method::POST, &format!("{UPLOADS}/{upload}/parts")).multipart(form).send().await.expect("an answer")
}

async fn part(app: &TestApp, upload: &str, bytes: &[u8]) -> String {
    let part = ok_json(send_part(app, upload, bytes).await).await;
    assert_eq!((&part["object"], &part["upload_id"]), (&json!("upload.part"), &json!(upload)));
    text(&part["id"])
}

async fn complete(app: &TestApp, upload: &str, body: &Value) -> Response {
    app.post_json(&format!("{UPLOADS}/{upload}/complete"), body).await
}

/// Objects of parts that are in storage.
async fn stored_parts(app: &TestApp) -> usize {
    app.jobs.storage.keys_older_than("uploads", Duration::ZERO).await.expect("a list").len()
}

#[tokio::test]
async fn parts_that_come_at_once_and_out_of_order_become_a_file() {
    let app = TestApp::start().await;
    let expiry = json!({"expires_after": {"anchor": "created_at", "seconds": 3600}});
    let upload = begin(&app, 11, expiry).await;
    let id = text(&upload["id"]);
    assert_eq!(
        (&upload["object"], &upload["status"], &upload["file"]),
        (&json!("upload"), &json!("pending"), &json!(null))
    );
    assert_eq!(upload["expires_at"].as_i64(), upload["created_at"].as_i64().map(|at| at + 3600));
    let (second, first, again) =
        tokio::join!(part(&app, &id, b" world"), part(&app, &id, b"hello"), part(&app, &id, b"hello"));
    let wrong_md5 = json!({"part_ids": [first, second], "md5": "00"});
    let refused = error(complete(&app, &id, &wrong_md5).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["param"], "md5", "{refused}");

    let body = json!({"part_ids": [first, second], "md5": "5EB63BBBE01EEED093CB22BB8F5ACDC3"});
    let done = ok_json(complete(&app, &id, &body).await).await;
    assert_eq!(
        (&done["status"], &done["file"]["bytes"], &done["file"]["object"]),
        (&json!("completed"), &json!(11), &json!("file"))
    );
    let file = text(&done["file"]["id"]);
    assert_eq!(done["file"]["expires_at"].as_i64(), done["file"]["created_at"].as_i64().map(|at| at + 3600));
    let content = app.get(&format!("/v1/files/{file}/content")).await;
    assert_eq!(content.text().await.expect("text"), "hello world");
    assert_eq!(stored_parts(&app).await, 0, "part {again} that was sent twice is gone too");
    assert_eq!(ok_json(complete(&app, &id, &body).await).await, done, "asked again, told again");
    error(send_part(&app, &id, b"more").await, StatusCode::BAD_REQUEST).await;
    error(app.post_empty(&format!("{UPLOADS}/{id}/cancel")).await, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn an_upload_is_completed_once_however_many_ask() {
    let app = TestApp::start().await;
    let id = text(&begin(&app, 5, json!({})).await["id"]);
    let body = json!({"part_ids": [part(&app, &id, b"hello").await]});
    let answers = futures::future::join_all((0..6).map(|_| complete(&app, &id, &body))).await;
    let mut files = Vec::new();
    for answer in answers {
        files.push(text(&ok_json(answer).await["file"]["id"]));
    }
    assert!(files.iter().all(|file| *file == files[0]), "{files:?}");
    let stored = app.jobs.storage.keys_older_than("files", Duration::ZERO).await.expect("a list");
    assert_eq!(stored, [format!("files/{}", files[0])]);
}

#[tokio::test]
async fn what_is_wrong_with_an_upload_is_named_and_nothing_is_lost() {
    let app = TestApp::start().await;
    let whole = json!({"bytes": 5, "filename": "a", "mime_type": "b", "purpose": "fine-tune"});
    for (field, value, param) in [
        ("bytes", json!(0), "bytes"),
        ("bytes", json!(u64::MAX), "bytes"),
        ("bytes", json!(-1), "bytes"),
        ("filename", json!("a/"), "filename"),
        ("mime_type", json!(""), "mime_type"),
        ("purpose", json!("fine-tune-results"), "purpose"),
        ("expires_after", json!({"anchor": "now", "seconds": 3600}), "expires_after.anchor"),
        ("expires_after", json!({"anchor": "created_at", "seconds": 1}), "expires_after.seconds"),
    ] {
        let mut body = whole.clone();
        body[field] = value;
        let refused = error(app.post_json(UPLOADS, &body).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["param"], param, "{refused}");
    }
    let (id, other) = (text(&begin(&app, 5, json!({})).await["id"]), text(&begin(&app, 5, json!({})).await["id"]));
    let (ours, theirs) = (part(&app, &id, b"hello").await, part(&app, &other, b"hello").await);
    for part_ids in [json!([]), json!([theirs]), json!([ours, ours]), json!(["part_x"])] {
        let refused = error(complete(&app, &id, &json!({"part_ids": part_ids})).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["param"], "part_ids", "{refused}");
    }
    let form = Form::new().part("file", Part::bytes(b"hello".to_vec()).file_name("upload"));
    let wrong = app.request(Method::POST, &format!("{UPLOADS}/{id}/parts")).multipart(form);
    assert_eq!(error(wrong.send().await.expect("an answer"), StatusCode::BAD_REQUEST).await["param"], "file");
    error(send_part(&app, "upload_x", b"hello").await, StatusCode::NOT_FOUND).await;
    assert_eq!(ok_json(complete(&app, &id, &json!({"part_ids": [ours]})).await).await["status"], "completed");
}

#[tokio::test]
async fn a_cancelled_or_expired_upload_leaves_nothing_behind() {
    let app = TestApp::start().await;
    let (cancelled, expired) =
        (text(&begin(&app, 5, json!({})).await["id"]), text(&begin(&app, 5, json!({})).await["id"]));
    for id in [&cancelled, &expired] {
        part(&app, id, b"hello").await;
    }
    for _ in 0..2 {
        let answer = ok_json(app.post_empty(&format!("{UPLOADS}/{cancelled}/cancel")).await).await;
        assert_eq!(answer["status"], "cancelled");
    }
    assert_eq!(stored_parts(&app).await, 1);
    assert_eq!(uploads::expire(&app.jobs, now_ms() + 3_590_000).await.expect("a database"), 0);
    assert_eq!(uploads::expire(&app.jobs, now_ms() + 3_600_000).await.expect("a database"), 1);
    assert_eq!(stored_parts(&app).await, 0);
    let late = error(send_part(&app, &expired, b"hello").await, StatusCode::BAD_REQUEST).await;
    assert!(text(&late["message"]).ends_with("its status is expired"), "{late}");
}
