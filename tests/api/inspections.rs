//! Looking before training: reports, previews and estimates, each from a real process on a tiny model.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{ROWS, TestApp, error, ok_json};

/// Rows of which one repeats another, and one cannot be used.
fn rows() -> String {
    let row = |number: u32| format!("{{\"instruction\": \"Say {number}.\", \"output\": \"It is {number}.\"}}\n");
    (0..12).map(row).collect::<String>() + &row(3) + "{\"instruction\": \"No answer.\"}\n"
}

fn text_of(tokens: &Value, trained: bool) -> String {
    let tokens = tokens.as_array().expect("tokens").iter().filter(|token| token["trained"] == trained);
    tokens.map(|token| token["text"].as_str().expect("a text")).collect()
}

#[tokio::test]
async fn a_report_tells_what_a_training_would_find() {
    let app = TestApp::start().await;
    app.make_model();
    let file = app.upload(&rows()).await;
    let validation = app.upload(&ROWS.repeat(2)).await;
    let path = format!("/v1/files/{file}/report?model=local:real.gguf&validation_file={validation}&template=alpaca");
    let report = app.get_json(&path).await;
    assert_eq!((&report["object"], &report["file_id"]), (&json!("file.report"), &json!(file)));
    let training = &report["training"];
    assert_eq!(training["format"], "alpaca");
    assert_eq!((&training["rows"], &training["bad_row_count"]), (&json!(14), &json!(1)));
    assert_eq!(training["duplicates"], json!({"rows": 1, "lines": [13]}));
    assert_eq!((&training["bad_rows"][0]["line"], &training["bad_rows"][0]["row"]), (&json!(14), &json!(14)));
    let bins = training["histogram"].as_array().expect("bins");
    assert_eq!(bins.iter().map(|bin| bin["rows"].as_u64().expect("a count")).sum::<u64>(), 13);
    assert!(training["trained_tokens"].as_u64() < training["tokens"].as_u64(), "{training}");
    let why = report["training_error"].as_str().expect("a reason");
    assert!(why.contains("1 of 14"), "{why}");
    assert_eq!((&report["validation"]["rows"], &report["validation_error"]), (&json!(2), &Value::Null));
    assert_eq!(report["validation"]["duplicates"]["rows"], 1);
}

#[tokio::test]
async fn a_preview_marks_the_tokens_that_have_a_loss() {
    let app = TestApp::start().await;
    app.make_model();
    let file = app.upload(&rows()).await;
    let path = format!("/v1/files/{file}/preview?model=local:real.gguf&template=alpaca");
    let preview = app.get_json(&format!("{path}&n=2")).await;
    assert_eq!(preview["rows"].as_array().map(Vec::len), Some(2));
    let tokens = &preview["rows"][1]["tokens"];
    assert!(text_of(tokens, true).contains("It is 1."), "{tokens}");
    assert!(text_of(tokens, false).contains("Say 1."), "{tokens}");
    let all = app.get_json(&format!("{path}&train_on=all&n=1&max_seq_length=5")).await;
    let row = &all["rows"][0];
    // The first token is no target: nothing comes before it.
    let trained = row["tokens"].as_array().expect("tokens").iter().map(|token| token["trained"] == true);
    assert_eq!(trained.collect::<Vec<_>>(), [false, true, true, true, true]);
    assert!(row["cut_tokens"].as_u64() > Some(0), "{row}");
    let bad = app.get_json(&format!("{path}&n=100")).await;
    assert_eq!(bad["rows"].as_array().map(Vec::len), Some(14));
    assert_eq!(bad["rows"][13]["problem"]["line"], 14);
}

#[tokio::test]
async fn the_base_model_is_that_of_the_newest_job_unless_named() {
    let app = TestApp::start().await;
    app.make_model();
    let file = app.upload(&ROWS.repeat(10)).await;
    let refused = error(app.get(&format!("/v1/files/{file}/report")).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["param"], "model");
    app.create_job(json!({"training_file": file, "model": "local:real.gguf"})).await;
    let report = app.get_json(&format!("/v1/files/{file}/report?columns[output]=output")).await;
    assert_eq!((&report["model"], &report["training_error"]), (&json!("local:real.gguf"), &Value::Null));
}

#[tokio::test]
async fn what_cannot_be_looked_into_is_named() {
    let app = TestApp::start().await;
    app.make_model();
    let file = app.upload(&ROWS.repeat(10)).await;
    for (query, param, words) in [
        ("model=local:none.gguf", "model", "none.gguf"),
        ("model=local:tiny.gguf", "model", "tiny.gguf"),
        // Who may only look downloads nothing.
        ("model=smollm2-135m-instruct", "model", "is not on this machine yet"),
        ("model=hf:org/repo/model.gguf", "model", "is not on this machine yet"),
        ("model=local:real.gguf&format=csv", "format", "csv"),
        ("model=local:real.gguf&train_on=nothing", "train_on", "nothing"),
        ("model=local:real.gguf&max_seq_length=1", "max_seq_length", "1"),
        ("model=local:real.gguf&max_seq_length=100000", "training.max_seq_length", "100000"),
        ("model=local:real.gguf&validation_file=file-1", "validation_file", "file-1"),
        ("model=local:real.gguf&colour=red", "colour", "colour"),
    ] {
        let answer = app.get(&format!("/v1/files/{file}/report?{query}")).await;
        let status = answer.status();
        assert!([400, 404].contains(&status.as_u16()), "{query}: {status}");
        let refused = error(answer, status).await;
        assert_eq!(refused["param"], param, "{query}: {refused}");
        assert!(refused["message"].as_str().expect("a message").contains(words), "{query}: {refused}");
    }
    for n in ["0", "101", "-1", "many"] {
        let path = format!("/v1/files/{file}/preview?model=local:real.gguf&n={n}");
        assert_eq!(error(app.get(&path).await, StatusCode::BAD_REQUEST).await["param"], "n");
    }
    let broken = app.upload("\u{0}\u{1}not rows").await;
    let report = app.get_json(&format!("/v1/files/{broken}/report?model=local:real.gguf")).await;
    assert!(report["training_error"].is_string(), "{report}");
}

#[tokio::test]
async fn an_estimate_tells_steps_memory_and_disk_and_queues_nothing() {
    let app = TestApp::start().await;
    app.make_model();
    let file = app.upload(&ROWS.repeat(16)).await;
    let body = json!({
        "model": "local:real.gguf", "training_file": file, "dataset": {"template": "alpaca"},
        "artifacts": [{"type": "adapter"}, {"type": "gguf", "quantization": "q8_0"}, {"type": "merged"}],
    });
    let estimate = ok_json(app.post_json("/v1/fine_tuning/jobs/estimate", &body).await).await;
    assert_eq!((&estimate["object"], &estimate["total_steps"]), (&json!("fine_tuning.job.estimate"), &json!(6)));
    assert_eq!((&estimate["fits"], &estimate["nearest"]), (&json!(true), &json!([])));
    for field in
        ["tokens", "peak_host_bytes", "least_bytes", "memory_bytes", "checkpoint_bytes", "trainable_parameters"]
    {
        assert!(estimate[field].as_u64() > Some(0), "{field}: {estimate}");
    }
    assert!(estimate["seconds"].as_f64() > Some(0.0) && estimate["tokens_per_second"].as_f64() > Some(0.0));
    let artifacts = estimate["artifacts"].as_array().expect("artifacts");
    assert_eq!(artifacts.len(), 3);
    assert!(artifacts.iter().all(|artifact| artifact["bytes"].as_u64() > Some(1000)), "{artifacts:?}");
    assert_eq!((&artifacts[1]["type"], &artifacts[1]["quantization"]), (&json!("gguf"), &json!("q8_0")));
    assert_eq!(app.get_json("/v1/fine_tuning/jobs").await["data"], json!([]));

    let mut wrong = body;
    wrong["lora"] = json!({"rank": 8});
    let refused = error(app.post_json("/v1/fine_tuning/jobs/estimate", &wrong).await, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["param"], "lora.rank");
}

#[tokio::test]
async fn an_estimate_that_does_not_fit_names_the_settings_that_do() {
    let app = TestApp::start_with(|config| config.workers.memory_bytes = 1 << 20).await;
    app.make_model();
    let file = app.upload(&ROWS.repeat(16)).await;
    let body = json!({"model": "local:real.gguf", "training_file": file, "dataset": {"template": "alpaca"}});
    let estimate = ok_json(app.post_json("/v1/fine_tuning/jobs/estimate", &body).await).await;
    assert_eq!((&estimate["fits"], &estimate["memory_bytes"]), (&json!(false), &json!(1 << 20)));
    assert_eq!((&estimate["nearest"], &estimate["seconds"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn the_settings_that_an_estimate_proposes_fit() {
    let row = json!({"instruction": "Say it.", "output": "It is said. ".repeat(20)}).to_string() + "\n";
    let estimate = async |memory_bytes: u64, training: &Value| {
        let app = TestApp::start_with(|config| config.workers.memory_bytes = memory_bytes).await;
        app.make_model();
        let file = app.upload(&row.repeat(64)).await;
        let body = json!({
            "model": "local:real.gguf", "training_file": file, "dataset": {"template": "alpaca"}, "training": training,
        });
        ok_json(app.post_json("/v1/fine_tuning/jobs/estimate", &body).await).await
    };
    let least = async |training: &Value| estimate(0, training).await["least_bytes"].as_u64().expect("bytes");
    let mut training =
        json!({"gradient_checkpointing": "none", "micro_batch_size": 64, "gradient_accumulation_steps": 1});
    let large = least(&training).await;
    let small = least(&json!({"gradient_checkpointing": "full", "micro_batch_size": 1})).await;
    assert!(large > small + (16 << 20), "{large} and {small} are too close to choose between them");
    let memory_bytes = small + (large - small) / 4;

    let refused = estimate(memory_bytes, &training).await;
    let nearest = refused["nearest"].as_array().expect("settings that fit");
    assert!(refused["fits"] == false && !nearest.is_empty(), "{refused}");
    for change in nearest {
        let field = change["field"].as_str().expect("a field").strip_prefix("training.").expect("of the training");
        training[field] = change["value"].clone();
    }
    let proposed = estimate(memory_bytes, &training).await;
    assert_eq!((&proposed["fits"], &proposed["nearest"]), (&json!(true), &json!([])), "{training}: {proposed}");
    assert_eq!(proposed["total_steps"], refused["total_steps"], "as many rows a step as before");
}

#[tokio::test]
async fn one_that_takes_too_long_is_ended() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("never-answers");
    std::fs::write(&program, "#!/bin/sh\nexec sleep 600\n").expect("a file");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).expect("permissions");
    let app = TestApp::start_with(|config| {
        config.limits.inspection_seconds = 1;
        config.workers.executable = Some(program);
    })
    .await;
    app.make_model();
    let file = app.upload(ROWS).await;
    let answer = app.get(&format!("/v1/files/{file}/report?model=local:real.gguf")).await;
    assert_eq!(answer.headers()["x-should-retry"], "false");
    let refused = error(answer, StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(refused["message"].as_str().expect("a message").contains("limits.inspection_seconds"), "{refused}");
}

#[tokio::test]
async fn a_process_that_dies_is_told_and_leaves_nothing() {
    let app = TestApp::start_with(|config| config.workers.executable = Some("/bin/false".into())).await;
    app.make_model();
    let file = app.upload(ROWS).await;
    let answer = app.get(&format!("/v1/files/{file}/report?model=local:real.gguf")).await;
    let refused = error(answer, StatusCode::BAD_REQUEST).await;
    assert_eq!(refused["code"], "inspection_failed");
    let gone = async {
        while !app.scratch_folders().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("its folder goes");
}
