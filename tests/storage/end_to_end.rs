//! A job from its upload to its deletion, with everything it has in a bucket.

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::home::{Home, poll, rows};
use crate::proxy::{Mode, Proxy};
use crate::servers::{SECRET, Server};

/// The bytes of a file or an artifact, or why they are not all there.
async fn download(home: &Home, what: &str, id: &str) -> reqwest::Result<Vec<u8>> {
    let response = reqwest::get(home.url(&format!("/{what}/{id}/content"))).await?;
    Ok(response.error_for_status()?.bytes().await?.to_vec())
}

async fn delete(home: &Home, path: &str) {
    let response = reqwest::Client::new().delete(home.url(path)).send().await.expect("an answer");
    assert!(response.status().is_success(), "DELETE {path}: {}", response.text().await.expect("a body"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_lives_in_a_bucket_and_leaves_it_empty() {
    let Some(server) = Server::moto().await else { return };
    let home = Home::start(&Server::variables(&server.url)).await;
    let file = home.upload(rows(40)).await;
    let id = home.create(&file, json!({"training": {"max_steps": 30, "save_steps": 10}, "lora": {"r": 4}})).await;
    let worker = poll("a worker", || home.workers().pop()).await;
    // A worker that has ended by now has no environment to be read.
    let environment = std::fs::read(format!("/proc/{}/environ", worker.pid)).unwrap_or_default();
    let environment = String::from_utf8_lossy(&environment);
    assert!(!environment.contains(SECRET) && !environment.contains("LORAD__"), "{environment}");
    let job = home.finished(&id).await;
    assert_eq!(job["status"], "succeeded", "{job}");

    let prefix = "deep/folder/";
    let keys = server.keys().await;
    assert!(keys.iter().all(|key| key.starts_with(prefix)), "{keys:?}");
    let artifacts = home.get(&format!("/fine_tuning/jobs/{id}/artifacts")).await;
    let artifacts = artifacts["data"].as_array().expect("a list").clone();
    assert!(!artifacts.is_empty());
    for artifact in &artifacts {
        let bytes = download(&home, "artifacts", artifact["id"].as_str().expect("an id")).await.expect("a whole body");
        assert_eq!(artifact["sha256"], hex::encode(Sha256::digest(&bytes)), "{artifact}");
    }
    let listed = home.get(&format!("/fine_tuning/jobs/{id}/checkpoints")).await;
    assert_eq!(listed["data"].as_array().expect("a list").len(), 3, "{listed}");

    delete(&home, &format!("/fine_tuning/jobs/{id}")).await;
    delete(&home, &format!("/files/{file}")).await;
    delete(&home, &format!("/files/{}", job["result_files"][0].as_str().expect("a result file"))).await;
    assert_eq!(server.keys().await, Vec::<String>::new());
    assert_eq!(server.unfinished_uploads().await, Vec::<String>::new());
    assert!(!home.log().contains(SECRET), "the log tells the secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_outlives_a_storage_that_is_away_for_a_while() {
    let Some(server) = Server::moto().await else { return };
    let proxy = Proxy::start(&server.url).await;
    let variables = Server::variables(&proxy.url);
    let settings: Vec<_> = variables.into_iter().chain([("LORAD__STORAGE__TIMEOUT_SECONDS", "1")]).collect();
    let home = Home::start(&settings).await;
    let file = home.upload(rows(40)).await;
    let id = home.create(&file, json!({"training": {"max_steps": 60, "save_steps": 5}, "lora": {"r": 4}})).await;
    assert!(home.trained_a_step(&id).await, "the job is over too soon");
    for mode in [Mode::Answer(503), Mode::Stall, Mode::CutAfter(10)] {
        proxy.set(mode);
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
        proxy.set(Mode::Pass);
    }
    let job = home.finished(&id).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    assert_eq!(home.attempts(), 2, "the first training goes through");
    assert_eq!(server.unfinished_uploads().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_set_that_changed_in_storage_fails_its_job_by_name() {
    let Some(server) = Server::moto().await else { return };
    let home = Home::start(&Server::variables(&server.url)).await;
    let content = rows(12);
    for (damaged, how) in [(content.replace("What", "That"), "broke off"), (rows(11), "as they were written")] {
        let file = home.upload(content.clone()).await;
        server.overwrite(&format!("files/{file}"), damaged.into_bytes()).await;
        let downloaded = download(&home, "files", &file).await;
        assert!(downloaded.is_err(), "{downloaded:?}");
        let id = home.create(&file, json!({"training": {"max_steps": 2}})).await;
        let job = home.finished(&id).await;
        let error = &job["error"];
        assert_eq!((&job["status"], &error["code"]), (&json!("failed"), &json!("object_damaged")), "{job}");
        assert_eq!(error["param"], "training_file", "{job}");
        assert!(error["message"].as_str().expect("a message").contains(how), "{job}");
    }
    assert!(home.log().contains("is damaged"), "{}", home.log());
}
