//! Who may call, and the envelope that everything wears.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{TestApp, error, ok_json};

#[tokio::test]
async fn without_a_key_any_bearer_is_fine_but_only_under_this_machines_names() {
    let app = TestApp::start().await;
    ok_json(app.request(Method::GET, "/v1/models").bearer_auth("anything").send().await.expect("an answer")).await;
    for (host, status) in [("localhost", 200), ("127.0.0.1:9", 200), ("[::1]:9", 200), ("evil.example", 403)] {
        let request = app.request(Method::GET, "/v1/models").header("host", host);
        assert_eq!(request.send().await.expect("an answer").status(), status, "{host}");
    }
}

#[tokio::test]
async fn with_a_key_only_its_bearer_may_call() {
    let app = TestApp::start_with(|config| config.auth.bootstrap_key = Some("sk-secret".into())).await;
    let ask = |key: &str| app.request(Method::GET, "/v1/models").header("authorization", key.to_owned());
    for wrong in ["Bearer sk-other", "Bearer", "sk-secret", "Basic sk-secret", "Bearer sk-secret2"] {
        let error = error(ask(wrong).send().await.expect("an answer"), StatusCode::UNAUTHORIZED).await;
        assert_eq!(error["code"], "invalid_api_key", "{wrong}");
    }
    error(app.get("/v1/nowhere").await, StatusCode::UNAUTHORIZED).await;
    ok_json(ask("Bearer sk-secret").header("host", "lorad.example").send().await.expect("an answer")).await;
    assert_eq!(app.get_json("/healthz").await["status"], "ok");
}

#[tokio::test]
async fn a_query_parameter_that_a_route_does_not_have_is_refused() {
    let app = TestApp::start().await;
    let (get, post) = (Method::GET, Method::POST);
    let job = "/v1/fine_tuning/jobs/ftjob-1";
    for (method, path) in [
        (&get, "/metrics".to_owned()),
        (&get, "/v1/models".to_owned()),
        (&get, "/v1/models/tiny".to_owned()),
        (&get, "/v1/files".to_owned()),
        (&post, "/v1/files".to_owned()),
        (&get, "/v1/files/file-1".to_owned()),
        (&Method::DELETE, "/v1/files/file-1".to_owned()),
        (&get, "/v1/files/file-1/content".to_owned()),
        (&get, "/v1/fine_tuning/jobs".to_owned()),
        (&post, "/v1/fine_tuning/jobs".to_owned()),
        (&get, job.to_owned()),
        (&Method::DELETE, job.to_owned()),
        (&post, format!("{job}/cancel")),
        (&post, format!("{job}/rerun")),
        (&get, format!("{job}/artifacts")),
        (&get, format!("{job}/logs")),
        (&get, format!("{job}/metrics.csv")),
        (&get, format!("{job}/metrics.svg")),
        (&get, "/v1/artifacts/artifact-1".to_owned()),
        (&get, "/v1/artifacts/artifact-1/content".to_owned()),
    ] {
        let answer = app.request(method.clone(), &format!("{path}?colour=red")).send().await.expect("an answer");
        let error = error(answer, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], "colour", "{method} {path}: {error}");
    }
}

#[tokio::test]
async fn pages_of_other_sites_are_refused() {
    let app = TestApp::start_with(|config| config.auth.bootstrap_key = Some("sk-secret".into())).await;
    let ask = |name: &str, value: &str| {
        app.request(Method::GET, "/v1/models").bearer_auth("sk-secret").header(name.to_owned(), value.to_owned())
    };
    for (name, value) in [("origin", "http://evil.example"), ("origin", "null"), ("sec-fetch-site", "cross-site")] {
        error(ask(name, value).send().await.expect("an answer"), StatusCode::FORBIDDEN).await;
    }
    for (name, value) in [("origin", app.url.as_str()), ("sec-fetch-site", "same-origin")] {
        ok_json(ask(name, value).send().await.expect("an answer")).await;
    }
}

#[tokio::test]
async fn json_bodies_say_that_they_are() {
    let app = TestApp::start().await;
    for kind in ["text/plain", "application/x-www-form-urlencoded", ""] {
        let request = app.request(Method::POST, "/v1/fine_tuning/jobs").header("content-type", kind).body("{}");
        error(request.send().await.expect("an answer"), StatusCode::UNSUPPORTED_MEDIA_TYPE).await;
    }
    let request =
        app.request(Method::POST, "/v1/fine_tuning/jobs").header("content-type", "application/json; charset=utf-8");
    let missing = error(request.body("{}").send().await.expect("an answer"), StatusCode::BAD_REQUEST).await;
    assert_eq!(missing["param"], "model");
    let long = format!("{{\"model\": \"{}\"}}", "x".repeat(2 << 20));
    let request =
        app.request(Method::POST, "/v1/fine_tuning/jobs").header("content-type", "application/json").body(long);
    error(request.send().await.expect("an answer"), StatusCode::PAYLOAD_TOO_LARGE).await;
}

#[tokio::test]
async fn the_routers_own_errors_wear_the_envelope() {
    let app = TestApp::start().await;
    let unknown = error(app.get("/v1/nowhere").await, StatusCode::NOT_FOUND).await;
    assert_eq!(unknown["type"], "invalid_request_error");
    let response = app.request(Method::DELETE, "/v1/models").send().await.expect("an answer");
    assert!(response.headers().contains_key("allow"));
    error(response, StatusCode::METHOD_NOT_ALLOWED).await;
    error(app.post_json("/healthz", &json!({})).await, StatusCode::METHOD_NOT_ALLOWED).await;
    error(app.get("/v1/files/%ff").await, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn the_public_listener_does_not_know_the_workers_routes() {
    let app = TestApp::start().await;
    error(app.get("/internal/v1/worker/task").await, StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn a_request_without_a_host_is_refused() {
    let app = TestApp::start().await;
    let address = app.url.strip_prefix("http://").expect("an address");
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(b"GET /v1/models HTTP/1.0\r\n\r\n").await.expect("sent");
    let mut answer = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await;
    read.expect("an answer in time").expect("an answer");
    assert!(answer.starts_with("HTTP/1.0 403"), "{answer}");
}
