//! The queue: pause, resume, priorities, and requests that a client repeats.

use std::time::Duration;

use lorad::jobs::claim::claim;
use lorad::types::attempt::TaskKind;
use lorad::types::device::Device;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{ROWS, TestApp, Worker, column, error, metric, ok_json, text};

const JOBS: &str = "/v1/fine_tuning/jobs";

/// The status of the answer to a POST without a body.
async fn status_after(app: &TestApp, path: &str) -> Value {
    ok_json(app.post_empty(path).await).await["status"].clone()
}

async fn heartbeat(worker: &Worker) -> Value {
    worker.post("heartbeat", &json!({})).await["action"].clone()
}

#[tokio::test]
async fn a_paused_training_hands_in_its_step_and_goes_on_there() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("{JOBS}/{}", text(&job["id"]));
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    worker.get("task").await;
    let step = |step: i64| json!({"metrics": [metric(step, 9)]});
    assert_eq!(worker.post("events", &step(1)).await, json!({"action": "continue"}));
    for _ in 0..2 {
        assert_eq!(status_after(&app, &format!("{path}/pause")).await, "paused");
    }
    assert_eq!(worker.post("events", &step(2)).await, json!({"action": "pause"}));
    worker.put_checkpoint(2, false, b"two").await;
    assert_eq!(heartbeat(&worker).await, "pause");
    let late = worker.put("artifacts?type=adapter&filename=adapter.tar&sha256=00", b"adapter").await;
    assert!(late.status().is_client_error(), "an export is not wanted now");

    // In the queue again, but not before its worker is gone; what that one did until then counts.
    for _ in 0..2 {
        assert_eq!(status_after(&app, &format!("{path}/resume")).await, "queued");
    }
    let claimed = claim(&app.jobs, TaskKind::Train, Device::Cpu, Duration::from_secs(30)).await.expect("a database");
    assert!(claimed.is_none(), "its worker still runs");
    worker.post("events", &step(3)).await;
    worker.put_checkpoint(3, false, b"three").await;
    let succeeded = worker.request(Method::POST, "finish").json(&json!({"result": "succeeded"}));
    assert!(succeeded.send().await.expect("an answer").status().is_client_error());
    worker.finish(json!({"result": "stopped"})).await;

    let worker = app.take_up(TaskKind::Train).await;
    assert_eq!(worker.get("task").await["resume"]["step"], 3);
    assert_eq!(app.get_json(&path).await["status"], "running");
    let messages = column(&app.get_json(&format!("{path}/events?limit=100")).await, "message");
    let times = |wanted: &str| messages.iter().filter(|message| message.contains(wanted)).count();
    assert_eq!((times("was paused"), times("was resumed, moving it to queued"), times("Step 2/9")), (1, 1, 1));
}

#[tokio::test]
async fn a_job_is_paused_in_validation_too_and_never_after_its_end() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("{JOBS}/{}", text(&job["id"]));
    let worker = app.take_up(TaskKind::Validate).await;
    assert_eq!(status_after(&app, &format!("{path}/pause")).await, "paused");
    assert_eq!(heartbeat(&worker).await, "stop");
    let file = format!("/v1/files/{}", text(&job["training_file"]));
    let in_use = app.request(Method::DELETE, &file).send().await.expect("an answer");
    assert_eq!(error(in_use, StatusCode::BAD_REQUEST).await["code"], "file_in_use");
    worker.finish(json!({"result": "stopped"})).await;
    let none = claim(&app.jobs, TaskKind::Validate, Device::Cpu, Duration::from_secs(30)).await.expect("a database");
    assert!(none.is_none(), "a paused job is left alone");

    assert_eq!(status_after(&app, &format!("{path}/resume")).await, "validating_files");
    app.validate().await;
    assert_eq!(status_after(&app, &format!("{path}/pause")).await, "paused");
    assert_eq!(status_after(&app, &format!("{path}/cancel")).await, "cancelled");
    for what in ["pause", "resume"] {
        let refused = error(app.post_empty(&format!("{path}/{what}")).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["code"], "job_has_ended");
        assert!(text(&refused["message"]).ends_with("its status is cancelled"), "{refused}");
        error(app.post_empty(&format!("{JOBS}/ftjob-x/{what}")).await, StatusCode::NOT_FOUND).await;
    }
}

#[tokio::test]
async fn higher_priorities_come_first_then_older_jobs() {
    let app = TestApp::start().await;
    let mut jobs = Vec::new();
    for priority in [0, -1000, 7, 0, 7] {
        let job = app.create_job(json!({"priority": priority})).await;
        assert_eq!(job["priority"], priority);
        jobs.push(text(&job["id"]));
    }
    for task in [TaskKind::Validate, TaskKind::Train] {
        for expected in [2, 4, 0, 3, 1] {
            let worker = app.take_up(task).await;
            assert_eq!(worker.get("task").await["job_id"], jobs[expected], "{task}");
            let last_word = match task {
                TaskKind::Validate => json!({"result": "succeeded"}),
                TaskKind::Train | TaskKind::Export => {
                    json!({"result": "failed", "code": "training_failed", "message": "enough"})
                }
            };
            worker.finish(last_word).await;
        }
    }
    let file = app.upload(&ROWS.repeat(10)).await;
    for priority in [json!(1001), json!(-1001), json!(0.5), json!("high")] {
        let body = json!({"model": "local:tiny.gguf", "training_file": file, "priority": priority});
        let refused = error(app.post_json(JOBS, &body).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["param"], "priority", "{refused}");
    }
}

#[tokio::test]
async fn a_request_that_says_that_it_is_repeated_makes_no_second_job() {
    let app = TestApp::start().await;
    let file = app.upload(&ROWS.repeat(10)).await;
    let create = async |suffix: &str, retry: &str| {
        let body = json!({"model": "local:tiny.gguf", "training_file": file, "suffix": suffix});
        let request = app.request(Method::POST, JOBS).header("x-stainless-retry-count", retry).json(&body);
        text(&ok_json(request.send().await.expect("an answer")).await["id"])
    };
    let first = create("a", "0").await;
    assert_eq!(create("a", "1").await, first);
    assert_eq!(create("a", "2").await, first);
    let second = create("a", "0").await;
    assert_ne!(second, first, "who asks twice gets two");
    assert_eq!(create("a", "1").await, second);
    assert_ne!(create("b", "1").await, second, "a first request that never arrived");
}
