//! Storage that stalls, answers with errors or cuts bodies off: requests end in time, and nothing is left behind.

use std::time::{Duration, Instant};

use lorad::jobs::sweep::sweep;
use lorad::types::attempt::TaskKind;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::proxy::{Mode, Proxy};
use crate::servers::Server;
use crate::support::{TestApp, error, ok_json, text};

/// Seconds that a request to storage may be silent.
const TIMEOUT_SECONDS: u32 = 1;
/// Longest time that a request to the server may take: two silences and a slow machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server whose storage is behind a network that fails when it is told to.
async fn behind_a_proxy() -> Option<(Server, Proxy, TestApp)> {
    let server = Server::moto().await?;
    let proxy = Proxy::start(&server.url).await;
    let app = TestApp::start_with(|config| {
        server.configure_at(&proxy.url, config);
        config.storage.timeout_seconds = TIMEOUT_SECONDS;
    })
    .await;
    Some((server, proxy, app))
}

async fn upload(app: &TestApp, bytes: Vec<u8>) -> Response {
    let form = Form::new().text("purpose", "fine-tune").part("file", Part::bytes(bytes).file_name("rows.jsonl"));
    app.request(Method::POST, "/v1/files").multipart(form).send().await.expect("an answer")
}

async fn file(app: &TestApp, bytes: Vec<u8>) -> String {
    let file: Value = ok_json(upload(app, bytes).await).await;
    text(&file["id"])
}

/// What is left when the sweep looks a day later.
async fn swept(server: &Server, app: &TestApp) -> Vec<String> {
    app.jobs.storage.close().await;
    sweep(&app.jobs, Duration::ZERO).await.expect("a sweep");
    assert_eq!(server.unfinished_uploads().await, Vec::<String>::new());
    server.keys().await
}

#[tokio::test]
async fn a_storage_that_fails_is_told_in_time_and_leaves_no_orphan() {
    let Some((server, proxy, app)) = behind_a_proxy().await else { return };
    let there = file(&app, b"rows".to_vec()).await;
    for mode in [Mode::Stall, Mode::Answer(500), Mode::Answer(503), Mode::CutAfter(20)] {
        for length in [4, 9 << 20] {
            proxy.set(mode);
            let begin = Instant::now();
            let refused = error(upload(&app, vec![b'x'; length]).await, StatusCode::SERVICE_UNAVAILABLE).await;
            assert_eq!((&refused["code"], &refused["type"]), (&json!("storage_unavailable"), &json!("server_error")));
            assert!(begin.elapsed() < PATIENCE, "{mode:?} {length}: {:?}", begin.elapsed());
            let begin = Instant::now();
            let refused = app.get(&format!("/v1/files/{there}/content")).await;
            assert_eq!(error(refused, StatusCode::SERVICE_UNAVAILABLE).await["code"], "storage_unavailable");
            assert!(begin.elapsed() < PATIENCE, "{mode:?}: {:?}", begin.elapsed());
            proxy.set(Mode::Pass);
            assert_eq!(app.get(&format!("/v1/files/{there}/content")).await.text().await.expect("a body"), "rows");
        }
    }
    assert_eq!(swept(&server, &app).await, [format!("deep/folder/files/{there}")]);
}

#[tokio::test]
async fn an_upload_that_breaks_in_its_middle_leaves_no_parts() {
    let Some((server, proxy, app)) = behind_a_proxy().await else { return };
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body = futures::stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let part = Part::stream(reqwest::Body::wrap_stream(body)).file_name("rows.jsonl");
    let form = Form::new().text("purpose", "fine-tune").part("file", part);
    let request = app.request(Method::POST, "/v1/files").multipart(form);
    let answer = tokio::spawn(request.send());
    for _ in 0..20 {
        sender.send(Ok(vec![b'x'; 1 << 20])).await.expect("the server reads");
    }
    // Two parts are on their way, or there already.
    while server.unfinished_uploads().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    proxy.set(Mode::Answer(503));
    while sender.send(Ok(vec![b'x'; 1 << 20])).await.is_ok() && !answer.is_finished() {}
    drop(sender);
    // A server that answers before it has read everything may close the connection on its client.
    if let Ok(answer) = answer.await.expect("no panic") {
        error(answer, StatusCode::SERVICE_UNAVAILABLE).await;
    }
    proxy.set(Mode::Pass);
    // The sweep takes back what could not be while storage was away; another upload is as good as ever.
    let there = file(&app, vec![b'y'; 9 << 20]).await;
    assert_eq!(swept(&server, &app).await, [format!("deep/folder/files/{there}")]);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_no_parts() {
    let Some((server, _proxy, app)) = behind_a_proxy().await else { return };
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
    let body = futures::stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let part = Part::stream(reqwest::Body::wrap_stream(body)).file_name("rows.jsonl");
    let form = Form::new().text("purpose", "fine-tune").part("file", part);
    let answer = tokio::spawn(app.request(Method::POST, "/v1/files").multipart(form).send());
    for _ in 0..20 {
        sender.send(Ok(vec![b'x'; 1 << 20])).await.expect("the server reads");
    }
    while server.unfinished_uploads().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    answer.abort();
    let begin = Instant::now();
    while !server.unfinished_uploads().await.is_empty() {
        assert!(begin.elapsed() < PATIENCE, "the parts stay");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(swept(&server, &app).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_download_goes_on_where_it_was_cut_off() {
    let Some((_server, proxy, app)) = behind_a_proxy().await else { return };
    let bytes: Vec<u8> = (0..600_000_u32).map(|index| (index % 251) as u8).collect();
    let id = file(&app, bytes.clone()).await;
    for mode in [Mode::CutAfter(200_000), Mode::StallAfter(250_000)] {
        proxy.set(mode);
        let answer = app.get(&format!("/v1/files/{id}/content")).await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert!(answer.bytes().await.expect("a whole body") == bytes, "{mode:?}");
    }
}

#[tokio::test]
async fn a_download_that_cannot_go_on_is_broken_off() {
    let Some((server, proxy, app)) = behind_a_proxy().await else { return };
    let bytes = vec![b'x'; 600_000];
    let id = file(&app, bytes.clone()).await;
    proxy.set(Mode::StallAfter(200_000));
    let mut answer = app.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.chunk().await.expect("bytes").is_some());
    proxy.set(Mode::Answer(503));
    let begin = Instant::now();
    let rest = loop {
        match answer.chunk().await {
            Ok(Some(_)) => (),
            rest => break rest,
        }
    };
    assert!(rest.is_err() && begin.elapsed() < PATIENCE, "{rest:?} {:?}", begin.elapsed());

    // The same length, and one other byte: only the last piece is held back, a part of it is what it is.
    proxy.set(Mode::Pass);
    let mut other = bytes.clone();
    other[599_999] = b'y';
    server.overwrite(&format!("files/{id}"), other).await;
    let answer = app.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.bytes().await.is_err(), "other bytes than were uploaded");
    // Another length is known before the first byte.
    server.overwrite(&format!("files/{id}"), vec![b'x'; 599_999]).await;
    for range in ["bytes=0-", "bytes=1-5"] {
        let request = app.request(Method::GET, &format!("/v1/files/{id}/content")).header("range", range);
        let refused = error(request.send().await.expect("an answer"), StatusCode::INTERNAL_SERVER_ERROR).await;
        assert_eq!(refused["code"], "object_damaged");
    }
}

#[tokio::test]
async fn what_a_worker_hands_in_is_refused_while_storage_fails_and_taken_afterwards() {
    let Some((server, proxy, app)) = behind_a_proxy().await else { return };
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    let checkpoint = format!(
        "checkpoints?step=1&listed=true&sha256={}",
        hex::encode(<sha2::Sha256 as sha2::Digest>::digest(b"state"))
    );
    for mode in [Mode::Stall, Mode::Answer(503)] {
        proxy.set(mode);
        let refused = error(worker.put(&checkpoint, b"state").await, StatusCode::SERVICE_UNAVAILABLE).await;
        assert_eq!(refused["code"], "storage_unavailable");
        let listed = app.get_json(&format!("/v1/fine_tuning/jobs/{}/checkpoints", text(&job["id"]))).await;
        assert_eq!(listed["data"], json!([]));
        proxy.set(Mode::Pass);
    }
    worker.put_checkpoint(1, true, b"state").await;
    let keys = swept(&server, &app).await;
    let file = format!("deep/folder/files/{}", text(&job["training_file"]));
    let checkpoints = format!("deep/folder/jobs/{}/checkpoints/", text(&job["id"]));
    assert!(
        keys.len() == 2 && keys.contains(&file) && keys.iter().any(|key| key.starts_with(&checkpoints)),
        "{keys:?}"
    );
}
