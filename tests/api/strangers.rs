//! What no client of good will sends: bodies and headers that trickle, nested JSON, names and paths that are tricks.

use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::multipart::{Form, Part};
use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{ROWS, TestApp, error, ok_json, text};

/// Time in which a server with a patience of a second must have had enough.
const SOON: Duration = Duration::from_secs(15);

/// Sends raw bytes, then one byte again and again for as long as the server listens; gives what it answers.
async fn trickle(app: &TestApp, head: &[u8], byte: u8) -> String {
    let address = app.url.strip_prefix("http://").expect("an address");
    let (mut reader, mut writer) = TcpStream::connect(address).await.expect("a connection").into_split();
    writer.write_all(head).await.expect("sent");
    let drip = tokio::spawn(async move {
        let mut drops = tokio::time::interval(Duration::from_millis(100));
        while writer.write_all(&[byte]).await.is_ok() {
            drops.tick().await;
        }
    });
    let mut answer = Vec::new();
    // A connection that is closed while bytes are under way is reset; what came before counts.
    let _ = tokio::time::timeout(SOON, reader.read_to_end(&mut answer)).await.expect("an end in time");
    drip.abort();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn raw(app: &TestApp, request: &[u8]) -> String {
    let address = app.url.strip_prefix("http://").expect("an address");
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request).await.expect("sent");
    let mut answer = Vec::new();
    tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.expect("an end in time").expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn clients_that_trickle_are_ended_and_keep_nobody_waiting() {
    let app = TestApp::start_with(|config| config.server.idle_seconds = 1).await;
    let form = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n\
                content-type: multipart/form-data; boundary=b\r\n\r\n";
    let file = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n";
    let (in_form, in_file) = (form.to_owned(), format!("{form}{file}"));
    let json = "POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n\
                content-type: application/json\r\n\r\n{\"model\": \"";
    let (header, nothing) = ("GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-long: ", "");
    let slow = [in_form.as_str(), &in_file, json, header];
    let slow = slow.map(|head| trickle(&app, head.as_bytes(), b'x'));
    let silent = raw(&app, nothing.as_bytes());
    let (slow, silent, quick) = tokio::join!(futures::future::join_all(slow), silent, app.get_json("/v1/models"));
    for answer in &slow[..3] {
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("1024 bytes"), "{answer}");
        assert!(answer.contains("server_error") && answer.contains("x-request-id"), "{answer}");
    }
    assert!(slow[3].is_empty() || slow[3].starts_with("HTTP/1.1 408"), "{}", slow[3]);
    assert_eq!(silent, "", "a connection that says nothing is closed");
    assert!(quick["data"].is_array(), "others are served meanwhile");
    let stored = app.jobs.storage.keys_older_than("files", Duration::ZERO).await.expect("a list");
    assert!(stored.is_empty(), "nothing is left of the file: {stored:?}");
}

#[tokio::test]
async fn a_stream_is_no_silence() {
    let app = TestApp::start_with(|config| config.server.idle_seconds = 1).await;
    let job = app.create_job(json!({})).await;
    let path = format!("/v1/fine_tuning/jobs/{}", text(&job["id"]));
    let mut stream = app.get(&format!("{path}/events?stream=true")).await;
    stream.chunk().await.expect("a stream").expect("the first event");
    // Longer than the server would wait for a request.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    ok_json(app.post_empty(&format!("{path}/cancel")).await).await;
    let rest = stream.text().await.expect("the rest of the stream");
    assert!(rest.contains("The job was cancelled") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
}

#[tokio::test]
async fn nested_json_is_refused_before_it_is_read() {
    let app = TestApp::start().await;
    let deep = |depth: usize, open: &str| format!("{{\"metadata\": {}", open.repeat(depth));
    for (path, param) in [("/v1/fine_tuning/jobs", "model"), ("/v1/uploads", "bytes")] {
        for open in ["[", "{\"a\":"] {
            let post = async |body: String| {
                let request = app.request(Method::POST, path).header("content-type", "application/json");
                request.body(body).send().await.expect("an answer")
            };
            error(post(deep((10 << 20) / open.len(), open)).await, StatusCode::PAYLOAD_TOO_LARGE).await;
            let nested = error(post(deep(100_000, open)).await, StatusCode::BAD_REQUEST).await;
            assert_ne!(nested["message"], "", "{nested}");
        }
        let missing = error(app.post_json(path, &json!({})).await, StatusCode::BAD_REQUEST).await;
        assert!(text(&missing["message"]).contains(param), "{path}: {missing}");
    }
}

#[tokio::test]
async fn names_that_are_paths_stay_names() {
    let app = TestApp::start().await;
    let upload = async |name: &str| {
        let part = Part::bytes(ROWS.as_bytes()).file_name(name.to_owned());
        let form = Form::new().percent_encode_noop().text("purpose", "fine-tune").part("file", part);
        app.request(Method::POST, "/v1/files").multipart(form).send().await.expect("an answer")
    };
    for (name, kept) in [
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\Windows\\system.ini", "system.ini"),
        ("%2e%2e%2fpasswd", "%2e%2e%2fpasswd"),
        ("née 1.jsonl", "née 1.jsonl"),
    ] {
        let file = ok_json(upload(name).await).await;
        assert_eq!(file["filename"], kept, "{name}");
        let content = app.get(&format!("/v1/files/{}/content", text(&file["id"]))).await;
        assert_eq!(content.text().await.expect("a body"), ROWS);
    }
    for name in ["..", "../", "a/..", ".", &"n".repeat(256)] {
        let refused = error(upload(name).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(refused["param"], "file", "{name}: {refused}");
    }
    let file = app.upload(&ROWS.repeat(10)).await;
    let long = format!("local:{}", "a/".repeat(5000));
    for model in [
        "local:../lorad.db",
        "local:%2e%2e/lorad.db",
        "local:/etc/passwd",
        "local:tiny.gguf\0",
        "local:..",
        "local:",
        &long,
    ] {
        let body = json!({"model": model, "training_file": file});
        let refused = error(app.post_json("/v1/fine_tuning/jobs", &body).await, StatusCode::NOT_FOUND).await;
        assert_eq!(refused["code"], "model_not_found", "{model}: {refused}");
    }
    let long = format!("/v1/files/{}", "a".repeat(8000));
    for path in [
        "/v1/files/..%2f..%2fetc%2fpasswd",
        "/v1/files/%2e%2e%2f%2e%2e%2florad.db/content",
        "/v1/files/file-%00",
        "/v1/models/%2e%2e%2florad.db",
        "/v1/artifacts/..%5c..%5clorad.db/content",
        "/v1/fine_tuning/jobs/%2e%2e/events",
        &long,
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let answer = raw(&app, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("invalid_request_error"), "{path}: {answer}");
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_are_refused_by_name() {
    let app = TestApp::start().await;
    let request = |body: &[u8]| {
        let request = app.request(Method::POST, "/v1/fine_tuning/jobs").header("content-type", "application/json");
        request.body(body.to_vec())
    };
    let bad = error(request(b"{\"model\": \"\xff\"}").send().await.expect("an answer"), StatusCode::BAD_REQUEST).await;
    assert!(text(&bad["message"]).contains("line 1 column 12"), "{bad}");
    let bad = request(b"{\"model\": \"m\", \"\xff\": 1}").send().await.expect("an answer");
    error(bad, StatusCode::BAD_REQUEST).await;
    error(app.get("/v1/models/%ff").await, StatusCode::BAD_REQUEST).await;
    for name in ["idempotency-key", "last-event-id", "x-stainless-retry-count", "accept", "range"] {
        let value = HeaderValue::from_bytes(b"\xff\xfe").expect("a header's bytes");
        let request = request(b"{\"model\": 1}").header(name, value);
        error(request.send().await.expect("an answer"), StatusCode::BAD_REQUEST).await;
    }
    let form = async |disposition: &[u8], value: &[u8]| {
        let body =
            [b"--b\r\ncontent-disposition: form-data; ", disposition, b"\r\n\r\n", value, b"\r\n--b--\r\n"].concat();
        let request = app.request(Method::POST, "/v1/files").header("content-type", "multipart/form-data; boundary=b");
        error(request.body(body).send().await.expect("an answer"), StatusCode::BAD_REQUEST).await
    };
    assert_eq!(form(b"name=\"purpose\"", b"\xff").await["param"], "purpose");
    for disposition in
        [&b"name=\"file\"; filename=\"\xff\""[..], b"name=\"\xff\"", b"name=\"file\"; filename=\"a\x7fb\""]
    {
        let bad = form(disposition, b"x").await;
        assert_ne!(bad["message"], "", "{bad}");
    }
    assert_eq!(app.get_json("/v1/files").await["data"], json!([]));
}
