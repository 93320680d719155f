//! A storage that does not work is found when the server starts.

use std::time::{Duration, Instant};

use crate::home::Home;
use crate::servers::{SECRET, Server};

/// Starts a server that must not come up, and gives what it said.
fn refused(home: &Home, variables: &[(&str, &str)]) -> String {
    let begin = Instant::now();
    let (status, output) = home.run_server("other", variables);
    assert!(!status.success() && begin.elapsed() < Duration::from_secs(30), "{:?} {output}", begin.elapsed());
    assert!(!output.contains("panicked") && !output.contains(SECRET), "{output}");
    output
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_do_not_go_together_are_named() {
    let home = Home::start(&[]).await;
    for (variables, words) in [
        (&[("LORAD__STORAGE__URL", "ftp://somewhere")][..], &["storage.url", "`ftp://somewhere`"][..]),
        (&[("LORAD__STORAGE__URL", "s3://")], &["storage.url", "`s3://`"]),
        (&[("LORAD__STORAGE__REGION", "eu-west-1")], &["storage.region", "s3://", "`eu-west-1`"]),
        (
            &[("LORAD__STORAGE__URL", "s3://lorad"), ("LORAD__STORAGE__ENDPOINT", "minio:9000")],
            &["storage.endpoint", "`minio:9000`"],
        ),
        (
            &[("LORAD__STORAGE__URL", "s3://lorad"), ("LORAD__STORAGE__ENDPOINT", "http://minio:9000")],
            &["storage.endpoint", "storage.allow_http"],
        ),
        (
            &[("LORAD__STORAGE__URL", "s3://lorad"), ("LORAD__STORAGE__SECRET_ACCESS_KEY", SECRET)],
            &["storage.access_key_id"],
        ),
        (&[("LORAD__STORAGE__URL", "az://lorad")], &["object storage cannot be opened", "Account"]),
        (
            &[("LORAD__STORAGE__URL", "gs://lorad"), ("LORAD__STORAGE__CREDENTIALS_FILE", "/nowhere.json")],
            &["object storage cannot be opened", "/nowhere.json"],
        ),
    ] {
        let output = refused(&home, variables);
        assert!(words.iter().all(|word| output.contains(word)), "{words:?}: {output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_not_there_or_says_no_is_named() {
    let home = Home::start(&[]).await;
    let [url, _, id, secret] = Server::variables("");
    let nobody =
        [url, ("LORAD__STORAGE__ENDPOINT", "http://127.0.0.1:9"), id, secret, ("LORAD__STORAGE__TIMEOUT_SECONDS", "2")];
    let output = refused(&home, &nobody);
    assert!(output.contains("s3://lorad/deep/folder") && output.contains("write a test object"), "{output}");

    let Some(server) = Server::rclone().await else { return };
    let [_, endpoint, ..] = Server::variables(&server.url);
    let output = refused(&home, &[url, endpoint, id, ("LORAD__STORAGE__SECRET_ACCESS_KEY", "wrong")]);
    assert!(output.contains("write a test object") && output.contains("403"), "{output}");
    let output = refused(&home, &[("LORAD__STORAGE__URL", "s3://no-such-bucket"), endpoint, id, secret]);
    assert!(output.contains("s3://no-such-bucket") && output.contains("write a test object"), "{output}");
}
