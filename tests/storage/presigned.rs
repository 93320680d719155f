//! Downloads that the service itself serves, by a signed URL.

use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::Value;

use crate::servers::Server;
use crate::support::{ROWS, TestApp, error, ok_json};

fn header(response: &Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().expect("text").to_owned()).unwrap_or_default()
}

async fn redirects(server: &Server, names_the_file: bool) {
    let app = TestApp::start_with(|config| {
        server.configure(config);
        config.storage.presign = true;
    })
    .await;
    let file = app.upload(ROWS).await;
    let path = format!("/v1/files/{file}/content");
    let plain = Client::builder().redirect(Policy::none()).build().expect("a client");
    let answer = plain.get(format!("{}{path}", app.url)).send().await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!((header(&answer, "cache-control"), header(&answer, "content-length")), ("no-store".into(), "0".into()));
    let location = header(&answer, "location");
    assert!(location.starts_with(&server.url), "{location}");

    // Whoever has the URL needs no key; without its signature, or for anything but reading, it is worth nothing.
    let object = plain.get(&location).send().await.expect("an answer");
    assert_eq!(object.status(), StatusCode::OK, "{}", object.text().await.expect("a body"));
    let disposition = header(&object, "content-disposition");
    assert_eq!(disposition.contains("rows.jsonl"), names_the_file, "{disposition}");
    assert_eq!(object.text().await.expect("a body"), ROWS);
    let unsigned = location.split('?').next().expect("a URL");
    for (method, url) in [(Method::GET, unsigned), (Method::PUT, &location), (Method::DELETE, &location)] {
        let refused = plain.request(method.clone(), url).header("x-ms-blob-type", "BlockBlob").body("other").send();
        let refused = refused.await.expect("an answer");
        assert!(refused.status().is_client_error(), "{method} {}", refused.status());
    }

    // A client that follows gets what it would get here.
    assert_eq!(app.get(&path).await.text().await.expect("a body"), ROWS);
    let part = app.request(Method::GET, &path).header("range", "bytes=3-7").send().await.expect("an answer");
    // rclone says 200 to the range that it gives.
    assert!(part.status().is_success(), "{}", part.status());
    assert!(header(&part, "content-range").starts_with("bytes 3-7/"), "{part:?}");
    assert_eq!(part.text().await.expect("a body"), ROWS[3..8]);
    let head = app.request(Method::HEAD, &path).send().await.expect("an answer");
    assert_eq!((head.status(), header(&head, "content-length")), (StatusCode::OK, ROWS.len().to_string()));
    let etag = header(&head, "etag");
    let same = app.request(Method::GET, &path).header("if-none-match", etag).send().await.expect("an answer");
    assert_eq!(same.status(), StatusCode::NOT_MODIFIED);
    let beyond = app.request(Method::GET, &path).header("range", "bytes=9999-").send().await.expect("an answer");
    error(beyond, StatusCode::RANGE_NOT_SATISFIABLE).await;
    let deleted: Value =
        ok_json(app.request(Method::DELETE, &format!("/v1/files/{file}")).send().await.expect("one")).await;
    assert_eq!(deleted["deleted"], true);
}

#[tokio::test]
async fn rclone_serves_what_is_signed_for_s3() {
    let Some(server) = Server::rclone().await else { return };
    redirects(&server, true).await;
}

#[tokio::test]
async fn azurite_serves_what_is_signed_for_azure() {
    let Some(server) = Server::azurite().await else { return };
    redirects(&server, false).await;
}
