//! Artifacts that are asked for after a job: the same bytes as those that the job itself would have made.

use serde_json::{Value, json};

use super::support::{Home, poll, rows};

fn run(artifacts: &Value) -> Value {
    json!({
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "lora": {"r": 4}, "training": {"learning_rate": 0.01}, "artifacts": artifacts,
    })
}

/// Waits until an artifact is made, or cannot be.
async fn made(home: &Home, id: &str) -> Value {
    for _ in 0..600 {
        let artifact = home.get(&format!("/artifacts/{id}")).await;
        if artifact["status"] == "succeeded" || artifact["status"] == "failed" {
            return artifact;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("artifact {id} is not made");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_after_the_job_has_the_bytes_of_one_within_it() {
    let mut home = Home::start(&[]).await;
    let file = home.upload(rows(20)).await;
    let all = json!([{"type": "adapter"}, {"type": "gguf", "quantization": "q8_0"}, {"type": "gguf_lora"}]);
    let within = home.create(&file, run(&all)).await;
    assert_eq!(home.finished(&within).await["status"], "succeeded");
    let after = home.create(&file, run(&json!([{"type": "adapter"}]))).await;
    assert_eq!(home.finished(&after).await["status"], "succeeded");
    // Its data set is not needed any more.
    assert_eq!(home.delete(&format!("/files/{file}")).await, 200);

    let path = format!("/fine_tuning/jobs/{after}/artifacts");
    let (status, lora) = home.post(&path, &json!({"type": "gguf_lora"})).await;
    assert_eq!((status, &lora["bytes"]), (200, &Value::Null), "{lora}");
    let (_, gguf) = home.post(&path, &json!({"type": "gguf", "quantization": "q8_0"})).await;
    let (_, again) = home.post(&path, &json!({"type": "gguf", "quantization": "q8_0"})).await;
    assert_eq!(gguf["id"], again["id"]);
    // A worker that is killed is replaced, and so is a server.
    poll("an export's worker", || (!home.workers().is_empty()).then_some(())).await;
    home.kill_server();
    home.kill_workers();
    home.start_server().await;
    for artifact in [&lora, &gguf] {
        let id = artifact["id"].as_str().expect("an id");
        let artifact = made(&home, id).await;
        assert_eq!((&artifact["status"], &artifact["id"]), (&json!("succeeded"), &json!(id)), "{artifact}");
        assert!(artifact["parity"].is_object(), "{artifact}");
    }
    assert_eq!(home.artifacts(&after).await, home.artifacts(&within).await);
    let (_, there) = home.post(&path, &json!({"type": "gguf_lora"})).await;
    assert_eq!((&there["id"], &there["status"]), (&lora["id"], &json!("succeeded")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_whose_base_is_gone_fails_alone_and_can_be_asked_for_again() {
    let home = Home::start(&[]).await;
    let file = home.upload(rows(20)).await;
    let id = home.create(&file, run(&json!([{"type": "adapter"}]))).await;
    assert_eq!(home.finished(&id).await["status"], "succeeded");
    let (model, aside) = (home.model_path("tiny.gguf"), home.model_path("aside.gguf"));
    std::fs::rename(&model, &aside).expect("a base model");
    let path = format!("/fine_tuning/jobs/{id}/artifacts");
    let (_, asked) = home.post(&path, &json!({"type": "merged"})).await;
    let failed = made(&home, asked["id"].as_str().expect("an id")).await;
    assert_eq!(
        (&failed["status"], &failed["error"]["code"]),
        (&json!("failed"), &json!("model_not_found")),
        "{failed}"
    );
    home.assert_no_path_of_ours(&failed.to_string());
    std::fs::rename(&aside, &model).expect("a base model");
    let (_, again) = home.post(&path, &json!({"type": "merged"})).await;
    assert_eq!((&again["id"], &again["status"], &again["error"]), (&asked["id"], &json!("queued"), &Value::Null));
    assert_eq!(made(&home, asked["id"].as_str().expect("an id")).await["status"], "succeeded");
    assert_eq!(home.job(&id).await["status"], "succeeded");
}
