//! `/v1/files`.

use reqwest::multipart::{Form, Part};
use reqwest::{Method, Response, StatusCode};
use serde_json::json;

use crate::support::{ROWS, TestApp, column, error, ok_json, text};

async fn post_form(app: &TestApp, form: Form) -> Response {
    app.request(Method::POST, "/v1/files").multipart(form).send().await.expect("an answer")
}

fn file_part(bytes: &[u8]) -> Part {
    Part::bytes(bytes.to_vec()).file_name("rows.jsonl")
}

#[tokio::test]
async fn a_file_goes_in_and_comes_out_whatever_the_order_of_the_fields() {
    let app = TestApp::start().await;
    let first = Form::new().text("purpose", "fine-tune").part("file", file_part(b"abc"));
    let last = Form::new()
        .part("file", file_part(b"abc"))
        .text("expires_after[seconds]", "3600")
        .text("expires_after[anchor]", "created_at")
        .text("purpose", "fine-tune");
    for form in [first, last] {
        let file = ok_json(post_form(&app, form).await).await;
        let id = text(&file["id"]);
        assert!(id.starts_with("file-"), "{id}");
        assert_eq!(
            (&file["object"], &file["bytes"], &file["status"]),
            (&json!("file"), &json!(3), &json!("processed"))
        );
        assert_eq!((&file["filename"], &file["purpose"]), (&json!("rows.jsonl"), &json!("fine-tune")));
        assert_eq!(app.get_json(&format!("/v1/files/{id}")).await, file);
        let content = app.get(&format!("/v1/files/{id}/content")).await;
        assert_eq!(content.bytes().await.expect("a body"), "abc");
        let deleted =
            app.request(Method::DELETE, &format!("/v1/files/{id}")).header("content-type", "application/json");
        let deleted = ok_json(deleted.send().await.expect("an answer")).await;
        assert_eq!(deleted, json!({"id": id, "object": "file", "deleted": true}));
        let gone = error(app.get(&format!("/v1/files/{id}")).await, StatusCode::NOT_FOUND).await;
        assert_eq!(
            (gone["message"].clone(), gone["param"].clone()),
            (json!(format!("No such File object: {id}")), json!("id"))
        );
    }
}

#[tokio::test]
async fn a_bad_form_names_its_field() {
    let app = TestApp::start().await;
    let file = || file_part(b"abc");
    let cases = [
        (Form::new().text("purpose", "fine-tune"), "file"),
        (Form::new().part("file", file()), "purpose"),
        (Form::new().part("file", file()).text("purpose", "fine-tuning"), "purpose"),
        (Form::new().part("file", file()).text("purpose", "fine-tune-results"), "purpose"),
        (Form::new().part("file", file()).text("purpose", "x".repeat(5000)), "purpose"),
        (Form::new().part("file", file()).part("file", file()).text("purpose", "fine-tune"), "file"),
        (Form::new().text("purpose", "fine-tune").text("file", "no name"), "file"),
        (Form::new().text("porpoise", "fine-tune").part("file", file()), "porpoise"),
        (
            Form::new().text("purpose", "fine-tune").text("expires_after[seconds]", "9").part("file", file()),
            "expires_after[anchor]",
        ),
        (
            Form::new()
                .text("purpose", "fine-tune")
                .text("expires_after[anchor]", "created_at")
                .text("expires_after[seconds]", "9")
                .part("file", file()),
            "expires_after[seconds]",
        ),
    ];
    for (form, param) in cases {
        let error = error(post_form(&app, form).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], param, "{error}");
    }
    assert_eq!(app.get_json("/v1/files").await["data"], json!([]));
    let no_form = app.post_json("/v1/files", &json!({})).await;
    let no_form = error(no_form, StatusCode::BAD_REQUEST).await;
    assert!(text(&no_form["message"]).contains("multipart/form-data"), "{no_form}");
}

#[tokio::test]
async fn a_file_above_the_limit_is_refused() {
    let app = TestApp::start_with(|config| config.server.max_upload_bytes = 1000).await;
    let form = |length| Form::new().text("purpose", "fine-tune").part("file", file_part(&vec![b'x'; length]));
    error(post_form(&app, form(1001)).await, StatusCode::PAYLOAD_TOO_LARGE).await;
    ok_json(post_form(&app, form(1000)).await).await;
}

#[tokio::test]
async fn lists_turn_pages_and_end() {
    let app = TestApp::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(app.upload("x").await);
    }
    assert_eq!(column(&app.get_json("/v1/files?order=asc").await, "id"), ids);
    ids.reverse();
    let page = app.get_json("/v1/files?limit=2").await;
    assert_eq!(column(&page, "id"), ids[..2]);
    assert_eq!(
        (&page["has_more"], &page["first_id"], &page["last_id"]),
        (&json!(true), &json!(ids[0]), &json!(ids[1]))
    );
    let page = app.get_json(&format!("/v1/files?limit=3&after={}", ids[1])).await;
    assert_eq!((column(&page, "id"), &page["has_more"]), (ids[2..].to_vec(), &json!(false)));
    let end = app.get_json(&format!("/v1/files?after={}", ids[4])).await;
    assert_eq!(end, json!({"object": "list", "data": [], "has_more": false, "first_id": null, "last_id": null}));
    assert_eq!(app.get_json("/v1/files?purpose=batch").await["data"], json!([]));
    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=x", "after"),
        ("limits=1", "limits"),
    ] {
        let error = error(app.get(&format!("/v1/files?{query}")).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], param);
    }
}

#[tokio::test]
async fn a_file_stays_while_an_unfinished_job_needs_it() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("/v1/files/{}", text(&job["training_file"]));
    let kept = app.request(Method::DELETE, &path).send().await.expect("an answer");
    let kept = error(kept, StatusCode::BAD_REQUEST).await;
    assert_eq!(kept["code"], "file_in_use");
    assert_eq!(app.get_json(&path).await["bytes"], ROWS.len() * 10);
    app.post_empty(&format!("/v1/fine_tuning/jobs/{}/cancel", text(&job["id"]))).await;
    ok_json(app.request(Method::DELETE, &path).send().await.expect("an answer")).await;
    assert_eq!(app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&job["id"]))).await["status"], "cancelled");
}
