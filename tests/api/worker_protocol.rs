//! The worker protocol, from a worker's side.

use lorad::types::attempt::{AttemptOutcome, TaskKind};
use lorad::types::device::Device;
use lorad::types::worker_protocol::VERSION;
use lorad::{jobs, store};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{ROWS, TestApp, Worker, column, error, metric, text};

async fn refused(worker: &Worker, method: Method, path: &str, body: Value, status: StatusCode) -> Value {
    error(worker.request(method, path).json(&body).send().await.expect("an answer"), status).await
}

#[tokio::test]
async fn a_worker_gets_its_task_and_its_bytes() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({"training": {"max_steps": 9}})).await;
    let worker = app.take_up(TaskKind::Validate).await;
    let task = worker.get("task").await;
    assert_eq!((&task["job_id"], &task["kind"], &task["resume"]), (&job["id"], &json!("validate"), &json!(null)));
    assert_eq!(task["spec"]["training"]["max_steps"], 9);
    assert_eq!(task["base_model"], json!({"name": "local:tiny.gguf"}));
    let rows = ROWS.repeat(10);
    assert_eq!(task["training_file"]["sha256"], hex::encode(Sha256::digest(&rows)));
    let bytes = worker.request(Method::GET, "training_file").send().await.expect("an answer");
    assert_eq!(bytes.bytes().await.expect("a body"), rows);
    assert_eq!(worker.get("task").await, task, "asked again, told again");
    worker.finish(json!({"result": "succeeded"})).await;

    let worker = app.take_up(TaskKind::Train).await;
    let artifacts = json!([{"type": "adapter"}, {"type": "gguf", "quantization": "q4_k_m"}]);
    assert_eq!(worker.get("task").await["artifacts"], artifacts);
}

#[tokio::test]
async fn a_worker_gets_the_validation_file_and_the_adapter_to_begin_with() {
    let app = TestApp::start().await;
    let first = app.create_job(json!({"lora": {"r": 4}})).await;
    let worker = app.take_up(TaskKind::Validate).await;
    refused(&worker, Method::GET, "validation_file", json!({}), StatusCode::BAD_REQUEST).await;
    worker.finish(json!({"result": "succeeded"})).await;
    app.train(1).await;
    let model = text(&app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&first["id"]))).await["fine_tuned_model"]);
    let artifacts = app.get_json(&format!("/v1/fine_tuning/jobs/{}/artifacts", text(&first["id"]))).await;

    for name in [model, column(&artifacts, "id")[0].clone()] {
        let held = app.upload(&ROWS.repeat(12)).await;
        let lora = json!({"init_from": name, "dropout": 0.1});
        let job = app.create_job(json!({"validation_file": held, "lora": lora})).await;
        assert_eq!((&job["lora"]["r"], &job["lora"]["init_from"]), (&json!(4), &json!(name)));
        assert_eq!(job["validation_file"], held);
        let worker = app.take_up(TaskKind::Validate).await;
        let task = worker.get("task").await;
        let rows = ROWS.repeat(12);
        assert_eq!(task["validation_file"]["sha256"], hex::encode(Sha256::digest(&rows)));
        let bytes = worker.request(Method::GET, "validation_file").send().await.expect("an answer");
        assert_eq!(bytes.bytes().await.expect("a body"), rows);
        assert_eq!(task["init_from"], Value::Null, "a validation has no use for it");
        worker.finish(json!({"result": "succeeded"})).await;
        let in_use = app.request(Method::DELETE, &format!("/v1/files/{held}")).send().await.expect("an answer");
        assert_eq!(error(in_use, StatusCode::BAD_REQUEST).await["code"], "file_in_use");

        let worker = app.take_up(TaskKind::Train).await;
        let task = worker.get("task").await;
        assert_eq!(task["init_from"]["sha256"], hex::encode(Sha256::digest(b"0123456789")));
        let bytes = worker.request(Method::GET, "init_from").send().await.expect("an answer");
        assert_eq!(bytes.bytes().await.expect("a body"), &b"0123456789"[..]);
        worker.finish(json!({"result": "failed", "code": "training_failed", "message": "enough"})).await;
    }
}

#[tokio::test]
async fn an_evaluation_is_shown_in_events_checkpoints_and_the_result_file() {
    let app = TestApp::start().await;
    let held = app.upload(&ROWS.repeat(12)).await;
    let job = app.create_job(json!({"validation_file": held, "training": {"eval_steps": 2}})).await;
    let path = format!("/v1/fine_tuning/jobs/{}", text(&job["id"]));
    let messages = column(&app.get_json(&format!("{path}/events")).await, "message");
    let validating = format!("Validating training file: {} and validation file: {held}", text(&job["training_file"]));
    assert_eq!(messages[0], validating);
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    let mut evaluated = metric(2, 2);
    (evaluated["valid_loss"], evaluated["valid_mean_token_accuracy"]) = (json!(1.25), json!(0.75));
    worker.post("events", &json!({"metrics": [metric(1, 2), evaluated]})).await;
    worker.put_checkpoint(2, true, b"state").await;
    let figures = json!({"step": 2, "train_loss": 1.0, "train_mean_token_accuracy": 0.5, "valid_loss": 1.25,
        "full_valid_loss": 1.25, "valid_mean_token_accuracy": 0.75, "full_valid_mean_token_accuracy": 0.75});
    assert_eq!(app.get_json(&format!("{path}/checkpoints")).await["data"][0]["metrics"], figures);
    let event = app.get_json(&format!("{path}/events?limit=2")).await["data"][1].clone();
    assert_eq!(event["message"], "Step 2/2: training loss=1.00, validation loss=1.25, full validation loss=1.25");
    assert_eq!((&event["data"]["total_steps"], &event["data"]["full_valid_loss"]), (&json!(2), &json!(1.25)));
    worker.put_artifact("type=adapter&filename=adapter.tar", b"0123456789").await;
    worker.put_artifact("type=gguf&quantization=q4_k_m&filename=model-q4_k_m.gguf", b"GGUF").await;
    worker.finish(json!({"result": "succeeded"})).await;
    let result = text(&app.get_json(&path).await["result_files"][0]);
    let csv = app.get(&format!("/v1/files/{result}/content")).await.text().await.expect("text");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines[1..], ["1,2,0.5,,", "2,1,0.5,1.25,0.75"]);
}

#[tokio::test]
async fn a_wrong_token_or_another_version_is_refused() {
    let app = TestApp::start().await;
    app.create_job(json!({})).await;
    let worker = app.take_up(TaskKind::Validate).await;
    let wrong = app.worker("no token");
    refused(&wrong, Method::GET, "task", json!({}), StatusCode::UNAUTHORIZED).await;
    let response = worker.request_in_version(Method::GET, "task", "1").send().await.expect("an answer");
    let error = error(response, StatusCode::BAD_REQUEST).await;
    assert!(text(&error["message"]).contains(&format!("protocol {VERSION}")), "{error}");
}

#[tokio::test]
async fn a_task_names_the_device_of_its_training() {
    let app = TestApp::start_on(&[Device::Cuda(1), Device::Cuda(0)]).await;
    app.create_job(json!({})).await;
    // Whichever it will be, the last of the devices has the least memory.
    let worker = app.take_up(TaskKind::Validate).await;
    assert_eq!(worker.get("task").await["device"], "cuda:0");
    worker.finish(json!({"result": "succeeded"})).await;
    let worker = app.take_up_on(TaskKind::Train, Device::Cuda(1)).await;
    assert_eq!(worker.get("task").await["device"], "cuda:1");
    let page = app.get("/metrics").await.text().await.expect("a body");
    for sample in ["lorad_device_busy{device=\"cuda:0\"} 0\n", "lorad_device_busy{device=\"cuda:1\"} 1\n"] {
        assert!(page.contains(sample), "{page}");
    }
    assert!(!page.contains("device=\"cpu\""), "{page}");
}

#[tokio::test]
async fn a_repeated_request_changes_nothing() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let path = format!("/v1/fine_tuning/jobs/{}/events?limit=100", text(&job["id"]));
    let worker = app.take_up(TaskKind::Train).await;
    let event =
        |seq: i64| json!({"worker_seq": seq, "level": "warn", "type": "message", "message": format!("row {seq}")});
    let news = json!({"events": [event(1), event(2)], "metrics": [metric(1, 5), metric(2, 5)]});
    worker.post("events", &news).await;
    worker.put_checkpoint(2, true, b"state").await;
    let before = column(&app.get_json(&path).await, "message");
    worker.post("events", &news).await;
    worker.put_checkpoint(2, true, b"state").await;
    assert_eq!(column(&app.get_json(&path).await, "message"), before);

    // A new attempt after a crash counts its events anew, and its steps are known already.
    let attempts = store::attempt::live(&mut app.jobs.store.read().await.expect("a connection")).await.expect("a list");
    let lost = jobs::finish_attempt::attempt_lost(&app.jobs, attempts[0].id, AttemptOutcome::Crashed, "").await;
    assert!(lost.expect("a database"));
    let late = refused(&worker, Method::POST, "events", news.clone(), StatusCode::GONE).await;
    assert_eq!(late["code"], "attempt_ended");
    let worker = app.take_up(TaskKind::Train).await;
    let sha256 = hex::encode(Sha256::digest(b"state"));
    let resume = json!({"step": 2, "size_bytes": 5, "sha256": sha256, "train_loss": 1.0});
    assert_eq!(worker.get("task").await["resume"], resume);
    let bytes = worker.request(Method::GET, "checkpoint").send().await.expect("an answer");
    assert_eq!(bytes.bytes().await.expect("a body"), "state");
    worker.post("events", &json!({"metrics": [metric(2, 5), metric(3, 5)]})).await;
    let after = column(&app.get_json(&path).await, "message");
    assert_eq!(after.len(), before.len() + 1);
    assert_eq!(after[0], "Step 3/5: training loss=0.67");
}

#[tokio::test]
async fn bytes_with_another_hash_are_not_kept() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    let hash = hex::encode(Sha256::digest(b"whole"));
    for path in [
        format!("checkpoints?step=1&listed=true&sha256={hash}"),
        format!("artifacts?type=adapter&filename=adapter.tar&sha256={hash}"),
    ] {
        error(worker.put(&path, b"half").await, StatusCode::BAD_REQUEST).await;
    }
    let hash = hex::encode(Sha256::digest(b"half"));
    let unasked = format!("artifacts?type=gguf&quantization=f16&filename=x.gguf&sha256={hash}");
    error(worker.put(&unasked, b"half").await, StatusCode::BAD_REQUEST).await;
    let senseless = format!("artifacts?type=adapter&filename=adapter.tar&sha256={hash}&parity=good");
    error(worker.put(&senseless, b"half").await, StatusCode::BAD_REQUEST).await;
    for list in ["checkpoints", "artifacts"] {
        let path = format!("/v1/fine_tuning/jobs/{}/{list}", text(&job["id"]));
        assert_eq!(app.get_json(&path).await["data"], json!([]));
    }
    let left = app.jobs.storage.keys_older_than("jobs", std::time::Duration::ZERO).await.expect("a list");
    assert_eq!(left, Vec::<String>::new());
}

#[tokio::test]
async fn a_training_without_its_artifacts_is_not_done() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    worker.put_artifact("type=adapter&filename=adapter.tar", b"adapter").await;
    refused(&worker, Method::POST, "finish", json!({"result": "succeeded"}), StatusCode::BAD_REQUEST).await;
    assert_eq!(app.get_json(&format!("/v1/fine_tuning/jobs/{}", text(&job["id"]))).await["status"], "running");
    assert_eq!(app.get_json("/v1/files?purpose=fine-tune-results").await["data"], json!([]));
}

#[tokio::test]
async fn three_crashes_in_a_row_without_a_checkpoint_fail_the_job() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let path = format!("/v1/fine_tuning/jobs/{}", text(&job["id"]));
    let crash = async |outcome| {
        let attempts = store::attempt::live(&mut app.jobs.store.read().await.expect("a connection")).await;
        let id = attempts.expect("a list")[0].id;
        jobs::finish_attempt::attempt_lost(&app.jobs, id, outcome, "out of memory").await.expect("a database");
    };
    for outcome in
        [AttemptOutcome::Crashed, AttemptOutcome::ServerEnded, AttemptOutcome::Crashed, AttemptOutcome::Crashed]
    {
        let worker = app.take_up(TaskKind::Train).await;
        if outcome == AttemptOutcome::Crashed && worker.get("task").await["resume"].is_null() {
            // The first one gets somewhere, and is not counted.
            worker.put_checkpoint(1, false, b"state").await;
        }
        crash(outcome).await;
        assert_eq!(app.get_json(&path).await["status"], "running");
    }
    app.take_up(TaskKind::Train).await;
    crash(AttemptOutcome::Crashed).await;
    let job = app.get_json(&path).await;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("worker_crashed")));
    assert!(text(&job["error"]["message"]).ends_with("out of memory"), "{job}");
}
