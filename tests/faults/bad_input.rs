//! Inputs that cannot be used: each a clear error on the request or on the job, never a panic.

use std::fs;

use serde_json::{Value, json};

use super::support::{Home, cut, rows};

/// A GGUF file whose only metadata is an alignment of 0.
fn alignment_0() -> Vec<u8> {
    const KEY: &[u8] = b"general.alignment";
    const TYPE_U32: u32 = 4;
    let (version, tensors, entries) = (3u32, 0u64, 1u64);
    let mut file = b"GGUF".to_vec();
    file.extend(version.to_le_bytes());
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend((KEY.len() as u64).to_le_bytes());
    file.extend(KEY);
    file.extend(TYPE_U32.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    file
}

/// Creates a job that must fail, and returns its error.
async fn failure(home: &Home, file: &str, extra: Value) -> Value {
    let id = home.create(file, extra).await;
    let job = home.finished(&id).await;
    assert_eq!(job["status"], "failed", "{job}");
    home.assert_no_path_of_ours(&job.to_string());
    home.story(&id).await;
    job["error"].clone()
}

fn assert_error(error: &Value, code: &str, param: &str, words: &[&str]) {
    assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!(param)), "{error}");
    let message = error["message"].as_str().expect("a message");
    assert!(words.iter().all(|word| message.contains(word)), "{words:?} not in: {message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_set_that_cannot_be_trained_on_fails_the_job_by_line() {
    let home = Home::start(&[]).await;
    let with_line_7 = |line: &str| {
        let mut lines: Vec<String> = rows(20).lines().map(str::to_owned).collect();
        lines[6] = line.to_owned();
        lines.join("\n")
    };
    let alpaca = |output: Value| json!({"instruction": "Say it.", "output": output}).to_string();
    let numeric: String =
        (0..20).map(|row| format!("{}\n", alpaca(if row == 6 { json!(42) } else { json!("It is said.") }))).collect();
    let cases = [
        (with_line_7("{\"messages\": [{\"role\""), "invalid_training_file", &["1 of 20", "line 7"][..]),
        (numeric, "invalid_training_file", &["1 of 20", "line 7", "output"]),
        (String::new(), "invalid_training_file", &["empty"]),
        (rows(3), "invalid_n_examples", &["Training file has 3 example(s), but must have at least 10 examples"]),
    ];
    for (content, code, words) in cases {
        let file = home.upload(content).await;
        assert_error(&failure(&home, &file, json!({})).await, code, "training_file", words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_row_is_told_once() {
    let home = Home::start(&[]).await;
    let file = home.upload("{\"messages\": []}\n".repeat(130)).await;
    let id = home.create(&file, json!({})).await;
    assert_eq!(home.finished(&id).await["error"]["code"], "invalid_training_file");
    let story = home.story(&id).await;
    let told = story.iter().filter(|event| event.contains("line ") && event.starts_with("\"error\"")).count();
    assert!((100..=101).contains(&told), "the first 100 rows, and the first again in the reason: {told} of {story:#?}");
    assert!(story.iter().any(|event| event.contains("130 of 130 rows")), "{story:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_does_not_fit_is_refused_with_what_would() {
    const MIB: u64 = 1 << 20;
    let needed = {
        let home = Home::start(&[]).await;
        let file = home.upload(rows(20)).await;
        let body = json!({"model": "local:tiny.gguf", "training_file": file});
        let (status, estimate) = home.post("/fine_tuning/jobs/estimate", &body).await;
        assert_eq!((status, &estimate["fits"]), (200, &json!(true)), "{estimate}");
        estimate["least_bytes"].as_u64().expect("bytes")
    };
    let home = Home::start(&[("LORAD__WORKERS__MEMORY_BYTES", &(needed / 2).to_string())]).await;
    let file = home.upload(rows(20)).await;
    let mib = format!("may have {} MiB", (needed / 2).div_ceil(MIB));
    let error = failure(&home, &file, json!({})).await;
    assert_error(&error, "does_not_fit", "training", &["needs at least", &mib, "no settings make it fit"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_lies_fails_the_job() {
    let home = Home::start(&[]).await;
    let (tiny, file) = (home.model_path("tiny.gguf"), home.upload(rows(20)).await);
    let bytes = fs::read(&tiny).expect("a model");
    let patch = |name: &str, at: usize, patch: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        fs::write(home.model_path(name), bytes).expect("a model");
    };
    let position =
        |text: &[u8]| bytes.windows(text.len()).position(|window| window == text).expect("the text is in the file");
    cut(&tiny, &home.model_path("half.gguf"), |length| length / 2);
    // The number of tensors, at byte 8 of the header.
    patch("lying.gguf", 8, &u64::MAX.to_le_bytes());
    // The value of the string behind its key, type and length.
    patch("other.gguf", position(b"general.architecture") + 20 + 4 + 8, b"zebra");
    fs::write(home.model_path("alignment.gguf"), alignment_0()).expect("a model");
    fs::write(home.model_path("text.gguf"), "no model").expect("a file");
    for (name, word) in [
        ("half.gguf", "invalid model"),
        ("lying.gguf", "invalid model"),
        ("other.gguf", "zebra"),
        ("alignment.gguf", "alignment"),
        ("text.gguf", "invalid model"),
    ] {
        let model = format!("local:{name}");
        let error = failure(&home, &file, json!({"model": model})).await;
        assert_error(&error, "invalid_model", "model", &[word]);
    }
    let long = json!({"training": {"max_seq_length": 100_000}});
    let error = failure(&home, &file, long).await;
    assert_error(&error, "invalid_hyperparameters", "training.max_seq_length", &["100000", "512"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_there_is_refused_at_once_or_fails_the_job() {
    let home = Home::start(&[]).await;
    let file = home.upload(rows(20)).await;
    for model in ["local:nowhere.gguf", "gpt-4o-mini"] {
        let (status, body) = home.post("/fine_tuning/jobs", &json!({"model": model, "training_file": file})).await;
        assert_eq!((status, &body["error"]["code"]), (404, &json!("model_not_found")), "{body}");
    }
    // Whether a hub has a file is known only when it is asked, which this server may not do.
    let error = failure(&home, &file, json!({"model": "hf:nobody/nothing/nowhere.gguf"})).await;
    assert_error(&error, "model_not_found", "model", &["hf:nobody/nothing/nowhere.gguf"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_and_a_template_of_the_callers_are_used_or_named() {
    let home = Home::start(&[]).await;
    let row = |index: u32| json!({"question": format!("What is {index}?"), "answer": format!("It is {index}.")});
    let file = home.upload((0..20).map(|index| format!("{}\n", row(index))).collect::<String>()).await;
    let columns = json!({"instruction": "question", "output": "answer"});
    let dataset = |template: &str, columns: &Value| {
        json!({"dataset": {"columns": columns, "template": template}, "training": {"max_steps": 1},
            "artifacts": [{"type": "adapter"}]})
    };
    let good = "{% for m in messages %}{{ m.content ~ (eos_token if m.role == 'assistant' else ' > ') }}{% endfor %}";
    let id = home.create(&file, dataset(good, &columns)).await;
    let job = home.finished(&id).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    assert_eq!((&job["dataset"]["columns"], &job["dataset"]["format"]), (&columns, &json!("alpaca")), "{job}");

    let unmasked = "{% for m in messages %}{{ loop.revindex ~ m.content ~ eos_token }}{% endfor %}";
    let error = failure(&home, &file, dataset(unmasked, &columns)).await;
    assert_error(&error, "invalid_hyperparameters", "dataset.template", &["line 1 of the data set", "train_on all"]);
    let typo = json!({"instruction": "question", "output": "answer", "input": "contxt"});
    let error = failure(&home, &file, dataset("auto", &typo)).await;
    assert_error(&error, "invalid_training_file", "training_file", &["`contxt`", "input"]);
}
