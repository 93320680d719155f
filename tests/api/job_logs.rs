//! What a job's workers wrote: all of it, or as it grows.

use std::io::Write;

use lorad::types::attempt::TaskKind;
use reqwest::{Response, StatusCode};
use serde_json::json;

use crate::support::{TestApp, Worker, error, text};

/// Takes the next attempt up and gives its id.
async fn take_up(app: &TestApp, task: TaskKind) -> (Worker, String) {
    let worker = app.take_up(task).await;
    let attempt = text(&worker.get("task").await["attempt_id"]);
    (worker, attempt)
}

/// Writes to an attempt's log, as its process would.
fn write(app: &TestApp, attempt: &str, words: &str) {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(app.log_path(attempt));
    log.expect("a log").write_all(words.as_bytes()).expect("written");
}

/// Reads on until the text ends so.
async fn read_until(response: &mut Response, read: &mut String, end: &str) {
    while !read.ends_with(end) {
        let piece = response.chunk().await.expect("a body").expect("more to come");
        read.push_str(std::str::from_utf8(&piece).expect("text"));
    }
}

#[tokio::test]
async fn all_logs_that_are_there_come_in_order() {
    let app = TestApp::start().await;
    let path = format!("/v1/fine_tuning/jobs/{}/logs", text(&app.create_job(json!({})).await["id"]));
    assert_eq!(app.get(&path).await.text().await.expect("a body"), "");
    let (worker, first) = take_up(&app, TaskKind::Validate).await;
    // Longer than what is read at once.
    let long = "a line of a log\n".repeat(10_000);
    write(&app, &first, &format!("{long}broken off"));
    worker.finish(json!({"result": "stopped"})).await;
    // This one's log was removed.
    let (worker, _) = take_up(&app, TaskKind::Validate).await;
    worker.finish(json!({"result": "succeeded"})).await;
    let (_worker, third) = take_up(&app, TaskKind::Train).await;
    write(&app, &third, "step 1\n");

    let response = app.get(&path).await;
    assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    let logs = response.text().await.expect("a body");
    let expected = format!(
        "=== attempt 1: validate ({first}) ===\n{long}broken off\n=== attempt 3: train ({third}) ===\nstep 1\n"
    );
    assert!(logs == expected, "{} bytes", logs.len());
    error(app.get("/v1/fine_tuning/jobs/ftjob-1/logs").await, StatusCode::NOT_FOUND).await;
    let wrong = error(app.get(&format!("{path}?stream=2")).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(wrong["param"], "stream");
}

#[tokio::test]
async fn a_stream_goes_on_from_attempt_to_attempt_until_the_job_ends() {
    let app = TestApp::start().await;
    let path = format!("/v1/fine_tuning/jobs/{}/logs?stream=true", text(&app.create_job(json!({})).await["id"]));
    let mut response = app.get(&path).await;
    let mut read = String::new();
    let (worker, first) = take_up(&app, TaskKind::Validate).await;
    write(&app, &first, "one\n");
    read_until(&mut response, &mut read, "one\n").await;
    write(&app, &first, "two\n");
    read_until(&mut response, &mut read, "two\n").await;
    worker.finish(json!({"result": "succeeded"})).await;
    let (worker, second) = take_up(&app, TaskKind::Train).await;
    write(&app, &second, "three\n");
    worker.finish(json!({"result": "failed", "code": "training_failed", "message": "no", "param": null})).await;
    read.push_str(&response.text().await.expect("an end"));
    let expected =
        format!("=== attempt 1: validate ({first}) ===\none\ntwo\n=== attempt 2: train ({second}) ===\nthree\n");
    assert_eq!(read, expected);
}

#[tokio::test]
async fn a_stream_ends_with_the_server() {
    let app = TestApp::start().await;
    let path = format!("/v1/fine_tuning/jobs/{}/logs?stream=true", text(&app.create_job(json!({})).await["id"]));
    let response = app.get(&path).await;
    app.shutdown.cancel();
    assert_eq!(response.text().await.expect("an end"), "");
}
