//! `/v1/fine_tuning/jobs`: create, list, retrieve, cancel, checkpoints.

use lorad::types::attempt::TaskKind;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{ROWS, TestApp, column, error, metric, ok_json, text};

const JOBS: &str = "/v1/fine_tuning/jobs";

#[tokio::test]
async fn a_job_goes_from_validation_to_success() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({"seed": 7, "suffix": "mine", "metadata": {"a": "b"}})).await;
    let path = format!("{JOBS}/{}", text(&job["id"]));
    assert_eq!((&job["object"], &job["status"]), (&json!("fine_tuning.job"), &json!("validating_files")));
    let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
    assert_eq!(job["hyperparameters"], auto);
    assert_eq!(job["method"], json!({"type": "supervised", "supervised": {"hyperparameters": auto}}));
    assert_eq!((&job["seed"], &job["metadata"]), (&json!(7), &json!({"a": "b"})));
    for null in ["finished_at", "fine_tuned_model", "error", "trained_tokens", "validation_file", "estimated_finish"] {
        assert_eq!(job[null], Value::Null, "{null}");
    }
    assert_eq!((&job["result_files"], &job["integrations"]), (&json!([]), &json!([])));
    assert_eq!((&job["lora"]["r"], &job["training"]["compute"]), (&json!(16), &json!("auto")));

    app.validate().await;
    let job = app.get_json(&path).await;
    let numbers = json!({"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0});
    assert_eq!((&job["status"], &job["hyperparameters"]), (&json!("queued"), &numbers));

    app.train(4).await;
    let job = app.get_json(&path).await;
    assert_eq!(
        (&job["status"], &job["trained_tokens"], &job["total_steps"]),
        (&json!("succeeded"), &json!(1234), &json!(4))
    );
    assert!(job["finished_at"].as_i64() >= job["created_at"].as_i64());
    assert!(text(&job["fine_tuned_model"]).starts_with("ft:tiny:lorad:mine:"));
    assert_eq!(job["result_files"].as_array().map(Vec::len), Some(1));

    let late = error(app.post_empty(&format!("{path}/cancel")).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(late["code"], "job_has_ended");
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let app = TestApp::start().await;
    let file = app.upload(&ROWS.repeat(10)).await;
    let cases = [
        (json!({"modle": "x"}), "modle"),
        (json!({"lora": {"rank": 4}}), "lora.rank"),
        (json!({"lora": {"r": 0}}), "lora.r"),
        (json!({"training": {"learning_rate": -1}}), "training.learning_rate"),
        (json!({"training": {"max_seq_length": 1}}), "training.max_seq_length"),
        (json!({"hyperparameters": {"batch_size": 0}}), "hyperparameters.batch_size"),
        (json!({"method": {"type": "dpo"}}), "method.type"),
        (json!({"validation_file": lorad::types::ids::FileId::new()}), "validation_file"),
        (json!({"training": {"early_stopping": {}}}), "training.early_stopping"),
        (json!({"lora": {"init_from": "ft:tiny:lorad::nothing"}}), "lora.init_from"),
        (json!({"lora": {"init_from": lorad::types::ids::ArtifactId::new()}}), "lora.init_from"),
        (json!({"artifacts": [{"type": "gguf", "quantization": "q4_k_x"}]}), "artifacts[0].quantization"),
        (json!({"training_file": lorad::types::ids::FileId::new()}), "training_file"),
    ];
    for (changes, param) in cases {
        let mut body = json!({"model": "local:tiny.gguf", "training_file": file});
        for (key, value) in changes.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let error = error(app.post_json(JOBS, &body).await, StatusCode::BAD_REQUEST).await;
        assert_eq!((&error["param"], &error["type"]), (&json!(param), &json!("invalid_request_error")), "{error}");
    }
    for model in ["local:other.gguf", "local:../tiny.gguf", "gpt-4o"] {
        let body = json!({"model": model, "training_file": file});
        let error = error(app.post_json(JOBS, &body).await, StatusCode::NOT_FOUND).await;
        assert_eq!((&error["param"], &error["code"]), (&json!("model"), &json!("model_not_found")), "{error}");
    }
    assert_eq!(app.get_json(JOBS).await["data"], json!([]));
}

#[tokio::test]
async fn a_repeated_request_with_its_key_makes_no_second_job() {
    let app = TestApp::start().await;
    let file = app.upload(&ROWS.repeat(10)).await;
    let post = async |key: &str, seed: i64| {
        let body = json!({"model": "local:tiny.gguf", "training_file": file, "seed": seed});
        let request = app.request(reqwest::Method::POST, JOBS).header("idempotency-key", key).json(&body);
        request.send().await.expect("an answer")
    };
    let first = ok_json(post("one", 1).await).await;
    assert_eq!(ok_json(post("one", 1).await).await["id"], first["id"]);
    assert_ne!(ok_json(post("two", 1).await).await["id"], first["id"]);
    let reused = error(post("one", 2).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(reused["param"], "Idempotency-Key");
    error(post(&"k".repeat(256), 1).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(column(&app.get_json(JOBS).await, "id").len(), 2);
}

#[tokio::test]
async fn jobs_are_listed_newest_first_and_by_label() {
    let app = TestApp::start().await;
    let mut ids = Vec::new();
    for metadata in [json!(null), json!({"team": "a"}), json!({"team": "a", "run": ""}), json!({"team": "b"})] {
        ids.push(text(&app.create_job(json!({"metadata": metadata})).await["id"]));
    }
    ids.reverse();
    assert_eq!(column(&app.get_json(JOBS).await, "id"), ids);
    let list = async |query: &str| column(&app.get_json(&format!("{JOBS}?{query}")).await, "id");
    assert_eq!(list("metadata%5Bteam%5D=a").await, ids[1..3]);
    assert_eq!(list("metadata[team]=a&metadata[run]=").await, ids[1..2]);
    assert_eq!(list("metadata[team]=c").await, [] as [&str; 0]);
    assert_eq!(list("metadata=null").await, ids[3..]);
    assert_eq!(list("limit=1").await, ids[..1]);
    assert_eq!(list(&format!("after={}&limit=2", ids[0])).await, ids[1..3]);
    assert_eq!(list(&format!("after={}", ids[3])).await, [] as [&str; 0]);
    let missing = error(app.get(&format!("{JOBS}/ftjob-x")).await, StatusCode::NOT_FOUND).await;
    assert_eq!(
        missing,
        json!({"message": "Could not find fine tune: ftjob-x", "type": "invalid_request_error",
            "param": "fine_tune_id", "code": "fine_tune_not_found"})
    );
}

#[tokio::test]
async fn a_cancelled_job_is_cancelled_at_once_and_its_worker_is_told() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("{JOBS}/{}", text(&job["id"]));
    let worker = app.take_up(TaskKind::Validate).await;
    assert_eq!(worker.post("heartbeat", &json!({})).await, json!({"action": "continue"}));
    for _ in 0..2 {
        let cancelled = ok_json(app.post_empty(&format!("{path}/cancel")).await).await;
        assert_eq!(cancelled["status"], "cancelled");
    }
    assert_eq!(worker.post("heartbeat", &json!({})).await, json!({"action": "stop"}));
    let late = worker.request(reqwest::Method::POST, "finish").json(&json!({"result": "succeeded"}));
    error(late.send().await.expect("an answer"), StatusCode::GONE).await;
    worker.finish(json!({"result": "stopped"})).await;
    assert_eq!(app.get_json(&path).await["status"], "cancelled");
    let messages = column(&app.get_json(&format!("{path}/events")).await, "message");
    assert_eq!(messages.iter().filter(|message| message.contains("cancelled")).count(), 1);
}

#[tokio::test]
async fn a_failure_is_shown_with_its_code_and_what_the_worker_found() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("{JOBS}/{}", text(&job["id"]));
    let worker = app.take_up(TaskKind::Validate).await;
    let row = json!({"worker_seq": 1, "level": "error", "type": "message", "message": "line 7: broken", "data": null});
    let message = "1 of 10 rows cannot be used";
    let last_word = json!({"result": "failed", "code": "invalid_training_file", "message": message,
        "param": "training_file", "events": [row]});
    worker.finish(last_word).await;
    let job = app.get_json(&path).await;
    let error = json!({"code": "invalid_training_file", "message": message, "param": "training_file"});
    assert_eq!((&job["status"], &job["error"]), (&json!("failed"), &error));
    let messages = column(&app.get_json(&format!("{path}/events?limit=2")).await, "message");
    assert_eq!(messages, [format!("The job failed: {message}"), "line 7: broken".to_owned()]);
}

#[tokio::test]
async fn checkpoints_are_listed_newest_first() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("{JOBS}/{}/checkpoints", text(&job["id"]));
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    worker.post("events", &json!({"metrics": [crate::support::metric(2, 9)]})).await;
    for (step, listed) in [(1, false), (2, true), (4, true), (5, false), (6, true), (7, false)] {
        worker.put_checkpoint(step, listed, b"state").await;
    }
    let list = app.get_json(&path).await;
    let steps = |list: &Value| -> Vec<i64> {
        let items = list["data"].as_array().expect("a list");
        items.iter().map(|item| item["step_number"].as_i64().expect("a number")).collect()
    };
    assert_eq!(steps(&list), [6, 4, 2]);
    let oldest = &list["data"][2];
    assert!(text(&oldest["id"]).starts_with("ftckpt_"));
    assert!(text(&oldest["fine_tuned_model_checkpoint"]).ends_with(":ckpt-step-2"));
    assert_eq!((&oldest["object"], &oldest["fine_tuning_job_id"]), (&json!("fine_tuning.job.checkpoint"), &job["id"]));
    assert_eq!(oldest["metrics"], json!({"step": 2, "train_loss": 1.0, "train_mean_token_accuracy": 0.5}));
    assert_eq!(steps(&app.get_json(&format!("{path}?limit=1&after={}", text(&list["first_id"]))).await), [4]);
    let end = app.get_json(&format!("{path}?after={}", text(&list["last_id"]))).await;
    assert_eq!((&end["data"], &end["has_more"]), (&json!([]), &json!(false)));
}

#[tokio::test]
async fn a_running_job_tells_when_its_steps_will_be_done() {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    let path = format!("/v1/fine_tuning/jobs/{}", text(&job["id"]));
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    assert_eq!(app.get_json(&path).await["estimated_finish"], Value::Null);
    let step = |step: i64| {
        let mut step = metric(step, 102);
        step["step_ms"] = json!(60_000);
        step
    };
    worker.post("events", &json!({"metrics": [step(1), step(2)]})).await;
    for job in [app.get_json(&path).await, app.get_json("/v1/fine_tuning/jobs").await["data"][0].clone()] {
        let left = job["estimated_finish"].as_i64().expect("a time") - job["created_at"].as_i64().expect("a time");
        assert!((6000..6060).contains(&left), "100 steps of a minute: {left} s");
    }
    worker.finish(json!({"result": "failed", "code": "training_failed", "message": "enough"})).await;
    assert_eq!(app.get_json(&path).await["estimated_finish"], Value::Null);
}
