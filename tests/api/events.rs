//! A job's events: the list (newest first) and the stream (oldest first, then live).

use std::time::Duration;

use eventsource_stream::{Event, Eventsource};
use futures::{Stream, StreamExt};
use lorad::types::attempt::TaskKind;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestApp, column, error, metric, text};

/// Every message of a job that trains two steps, oldest first.
async fn finished_job() -> (TestApp, String, Vec<String>) {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    app.train(2).await;
    let (id, file) = (text(&job["id"]), text(&job["training_file"]));
    let model = text(&app.get_json(&format!("/v1/fine_tuning/jobs/{id}")).await["fine_tuned_model"]);
    let messages = vec![
        format!("Created fine-tuning job: {id}"),
        format!("Validating training file: {file}"),
        "Files validated, moving job to queued state".into(),
        "Fine-tuning job started".into(),
        "Step 1/2: training loss=2.00".into(),
        "Step 2/2: training loss=1.00".into(),
        format!("Checkpoint created at step 2 with Snapshot ID: {model}:ckpt-step-2"),
        format!("New fine-tuned model created: {model}"),
        "The job has successfully completed".into(),
    ];
    (app, format!("/v1/fine_tuning/jobs/{id}/events"), messages)
}

async fn follow(app: &TestApp, path: &str, headers: &[(&str, &str)]) -> impl Stream<Item = Event> + Unpin + use<> {
    let mut request = app.request(Method::GET, path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    Box::pin(response.bytes_stream().eventsource().map(|event| event.expect("an event")))
}

fn message(event: &Event) -> String {
    let data: Value = serde_json::from_str(&event.data).expect("JSON");
    text(&data["message"])
}

#[tokio::test]
async fn the_list_is_newest_first_and_ends() {
    let (app, path, mut messages) = finished_job().await;
    messages.reverse();
    let list = app.get_json(&path).await;
    assert_eq!(column(&list, "message"), messages);
    let event = &list["data"][3];
    assert_eq!((&event["object"], &event["level"]), (&json!("fine_tuning.job.event"), &json!("info")));
    assert_eq!((&event["type"], &list["data"][0]["type"]), (&json!("metrics"), &json!("message")));
    assert_eq!(
        event["data"],
        json!({"step": 2, "total_steps": 2, "train_loss": 1.0, "train_mean_token_accuracy": 0.5})
    );
    assert_eq!(list["data"][0]["data"], Value::Null);
    let page = app.get_json(&format!("{path}?limit=2&after={}", text(&event["id"]))).await;
    assert_eq!((column(&page, "message"), &page["has_more"]), (messages[4..6].to_vec(), &json!(true)));
    let end = app.get_json(&format!("{path}?after={}", text(&list["last_id"]))).await;
    assert_eq!((&end["data"], &end["has_more"]), (&json!([]), &json!(false)));
    let unknown = lorad::types::ids::EventId::new();
    for (query, param) in
        [(format!("after={unknown}"), "after"), ("limit=0".into(), "limit"), ("stream=x".into(), "stream")]
    {
        let error = error(app.get(&format!("{path}?{query}")).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], param);
    }
}

#[tokio::test]
async fn a_stream_without_sse_in_accept_has_neither_ids_nor_heartbeats() {
    let (app, path, messages) = finished_job().await;
    let request = app.request(Method::GET, &format!("{path}?stream=true")).header("accept", "application/json");
    let body = request.send().await.expect("an answer").text().await.expect("a body");
    let blocks: Vec<&str> = body.strip_suffix("\n\n").expect("a last blank line").split("\n\n").collect();
    assert_eq!(blocks.len(), messages.len() + 1);
    for (block, message) in blocks.iter().zip(&messages) {
        let data = block.strip_prefix("data: ").expect("nothing but data");
        assert!(!data.contains('\n'), "{block}");
        assert_eq!(serde_json::from_str::<Value>(data).expect("JSON")["message"], *message);
    }
    assert_eq!(blocks.last(), Some(&"data: [DONE]"));
}

#[tokio::test]
async fn a_stream_goes_on_behind_the_event_that_was_seen() {
    let (app, path, messages) = finished_job().await;
    let stream = format!("{path}?stream=true");
    let sse = [("accept", "text/event-stream")];
    let all: Vec<Event> = follow(&app, &stream, &sse).await.collect().await;
    let (done, events) = all.split_last().expect("events");
    assert_eq!(done.data, "[DONE]");
    assert_eq!(events.iter().map(message).collect::<Vec<_>>(), messages);
    let id = events[3].id.as_str();
    assert!(id.starts_with("ftevent-"), "{id}");
    let by_query = follow(&app, &format!("{stream}&after={id}"), &[]).await.collect::<Vec<_>>().await;
    let by_header = follow(&app, &stream, &[("last-event-id", id)]).await.collect::<Vec<_>>().await;
    for rest in [by_query, by_header] {
        assert_eq!(rest[..rest.len() - 1].iter().map(message).collect::<Vec<_>>(), messages[4..]);
    }
    let last = events.last().expect("an event").id.as_str();
    let nothing = follow(&app, &format!("{stream}&after={last}"), &[]).await.collect::<Vec<_>>().await;
    assert_eq!(nothing.iter().map(|event| event.data.as_str()).collect::<Vec<_>>(), ["[DONE]"]);
    let limited = error(app.get(&format!("{stream}&limit=3")).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(limited["param"], "limit");
}

#[tokio::test]
async fn a_stream_tells_what_happens_while_it_is_open() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("/v1/fine_tuning/jobs/{}/events?stream=true", text(&job["id"]));
    let mut events = follow(&app, &path, &[]).await;
    let mut next = async || {
        let event = tokio::time::timeout(Duration::from_secs(5), events.next()).await;
        event.expect("an event in time").expect("no end yet")
    };
    assert!(message(&next().await).starts_with("Created"));
    assert!(message(&next().await).starts_with("Validating"));
    app.validate().await;
    assert!(message(&next().await).starts_with("Files validated"));
    let worker = app.take_up(TaskKind::Train).await;
    assert_eq!(message(&next().await), "Fine-tuning job started");
    worker.post("events", &json!({"metrics": [metric(1, 2)]})).await;
    assert_eq!(message(&next().await), "Step 1/2: training loss=2.00");
    worker.post("events", &json!({"metrics": [metric(1, 2), metric(2, 2)]})).await;
    assert_eq!(message(&next().await), "Step 2/2: training loss=1.00");
    app.post_empty(&format!("/v1/fine_tuning/jobs/{}/cancel", text(&job["id"]))).await;
    assert_eq!(message(&next().await), "The job was cancelled");
    assert_eq!(next().await.data, "[DONE]");
}

#[tokio::test]
async fn streams_end_with_the_server() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("/v1/fine_tuning/jobs/{}/events?stream=true", text(&job["id"]));
    let mut events = follow(&app, &path, &[]).await;
    events.next().await.expect("the first event");
    app.shutdown.cancel();
    let rest = tokio::time::timeout(Duration::from_secs(5), events.collect::<Vec<_>>()).await.expect("an end in time");
    assert!(rest.iter().all(|event| event.data != "[DONE]"), "the job has not ended");
}
