//! What a server checks before it starts, and the workers' other way to call it.

use serde_json::{Value, json};

use super::support::{Home, rows};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_on_the_same_folder_is_refused() {
    let home = Home::start(&[]).await;
    let (status, output) = home.run_server("data", &[]);
    assert!(!status.success() && output.contains("another server uses the data folder"), "{output}");
    home.get("/models").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_cannot_be_used_is_named() {
    let home = Home::start(&[]).await;
    for (name, value, words) in [
        ("LORAD__WORKERS__LEASE", "4", &["workers", "lease"][..]),
        ("LORAD__WORKERS__DEVICES", "gpu", &["workers.devices", "`auto`", "`gpu`"]),
        ("LORAD__WORKERS__DEVICES", "cuda:997", &["workers.devices", "GPU", "`cuda:997`"]),
        ("LORAD__SERVER__LISTEN", "0.0.0.0:0", &["server.listen", "auth.bootstrap_key"]),
        ("LORAD__STORAGE__URL", "ftp://somewhere", &["storage.url", "ftp://somewhere"]),
    ] {
        let (status, output) = home.run_server("other", &[(name, value)]);
        assert!(!status.success() && words.iter().all(|word| output.contains(word)), "{output}");
        assert!(!output.contains("panicked"), "{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_tells_what_trainings_run_on() {
    for (setting, words) in [("cpu", "as workers.devices says"), ("auto", "trainings run on")] {
        let home = Home::start(&[("LORAD__WORKERS__DEVICES", setting)]).await;
        let log = home.log();
        assert!(log.contains(words) && !log.contains("cannot be looked for"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_may_call_over_tcp() {
    let home = Home::start(&[("LORAD__WORKERS__LISTEN", "127.0.0.1:0")]).await;
    let file = home.upload(rows(12)).await;
    let id = home.create(&file, json!({"training": {"max_steps": 2}})).await;
    let job = home.finished(&id).await;
    assert_eq!(job["status"], "succeeded", "{job}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_story_is_under_ten_lines_of_log_and_each_is_json_on_request() {
    let home = Home::start(&[("LORAD_LOG_FORMAT", "json")]).await;
    let file = home.upload(rows(12)).await;
    let id = home.create(&file, json!({"training": {"max_steps": 2}})).await;
    assert_eq!(home.finished(&id).await["status"], "succeeded");
    let log = home.log();
    let lines: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    assert!(lines.iter().all(|line| line["level"].is_string() && line["timestamp"].is_string()), "{log}");
    let story = log.lines().filter(|line| line.contains(&id)).count();
    assert!((3..10).contains(&story), "{story} lines of {log}");
    let (status, output) = home.run_server("other", &[("LORAD_LOG_FORMAT", "xml")]);
    assert!(!status.success() && output.contains("LORAD_LOG_FORMAT") && output.contains("xml"), "{output}");
}
