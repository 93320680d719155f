//! What every backend does alike.

use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use lorad::config::Config;
use lorad::storage::{Body, Error, Expected, Storage, Stored, file_key};
use lorad::types::ids::FileId;

use crate::servers::Server;

/// More than two parts of an upload.
const LARGE: usize = 19 << 20;

fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    change(&mut config);
    config
}

fn bytes(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

fn pieces(bytes: &[u8]) -> Vec<Result<Bytes, std::io::Error>> {
    bytes.chunks(1_000_003).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect()
}

async fn put(storage: &Storage, key: &str, bytes: &[u8]) -> Stored {
    storage.put(key, futures::stream::iter(pieces(bytes)), None).await.expect("a put")
}

async fn read(body: Body) -> Result<Vec<u8>, Error> {
    body.try_fold(Vec::new(), |mut all, chunk| async move {
        all.extend_from_slice(&chunk);
        Ok(all)
    })
    .await
}

async fn keys(storage: &Storage) -> Vec<String> {
    storage.keys_older_than("files", Duration::ZERO).await.expect("a list")
}

fn expected<'a>(key: &'a str, stored: &'a Stored) -> Expected<'a> {
    Expected { key, size_bytes: stored.size_bytes, sha256: Some(&stored.sha256) }
}

/// All that the server asks of a backend.
async fn does_what_it_must(config: &Config) {
    let storage = Storage::from_config(config).expect("a backend");
    storage.probe(config).await.expect("a backend that works");
    objects_come_back_whole_and_in_parts(&storage).await;
    what_is_broken_off_leaves_nothing(&storage).await;
    other_bytes_are_found_out(&storage).await;
    many_are_listed(&storage).await;
    storage.close().await;
}

async fn objects_come_back_whole_and_in_parts(storage: &Storage) {
    for length in [0, 5, (8 << 20) - 1, 8 << 20, LARGE] {
        let (key, bytes) = (file_key(&FileId::new().to_string()), bytes(length));
        let stored = put(storage, &key, &bytes).await;
        let expected = expected(&key, &stored);
        assert_eq!(stored.size_bytes, length as u64);
        assert!(read(storage.get(expected).await.expect("a get")).await.expect("a body") == bytes, "{length} bytes");
        if length > 5 {
            let end = bytes.len();
            for range in [0..1, 3..70_000, end - 4..end, 0..end] {
                let part = storage.get_range(expected, range.start as u64..range.end as u64).await.expect("a range");
                assert!(read(part).await.expect("a part") == bytes[range.clone()], "{range:?} of {length} bytes");
            }
        }
        assert_eq!(keys(storage).await, std::slice::from_ref(&key));
        storage.delete(&key).await.expect("a delete");
        storage.delete(&key).await.expect("a second delete");
        assert!(matches!(storage.get(expected).await, Err(Error::NotFound(gone)) if gone == key));
    }
}

async fn what_is_broken_off_leaves_nothing(storage: &Storage) {
    for length in [5, LARGE] {
        let key = file_key(&FileId::new().to_string());
        let mut body = pieces(&bytes(length));
        let long = storage.put(&key, futures::stream::iter(pieces(&bytes(length))), Some(length as u64 - 1)).await;
        assert!(matches!(long, Err(Error::TooLarge { limit }) if limit == length as u64 - 1));
        body.push(Err(std::io::Error::other("gone")));
        let broken = storage.put(&key, futures::stream::iter(body), None).await;
        assert!(matches!(broken, Err(Error::Body(_))));
        // A client that goes away takes the whole request with it.
        let body = futures::StreamExt::chain(futures::stream::iter(pieces(&bytes(length))), futures::stream::pending());
        let dropped = tokio::time::timeout(Duration::from_millis(1500), storage.put(&key, body, None)).await;
        assert!(dropped.is_err(), "a body without an end");
    }
    assert_eq!(keys(storage).await, Vec::<String>::new());
}

async fn other_bytes_are_found_out(storage: &Storage) {
    let (key, bytes) = (file_key(&FileId::new().to_string()), bytes(300_000));
    let stored = put(storage, &key, &bytes).await;
    let mut other = bytes.clone();
    other[299_999] ^= 1;
    put(storage, &key, &other).await;
    let damaged = read(storage.get(expected(&key, &stored)).await.expect("the right length")).await;
    assert!(matches!(damaged, Err(Error::Damaged { .. })), "{damaged:?}");
    put(storage, &key, &bytes[1..]).await;
    assert!(matches!(storage.get(expected(&key, &stored)).await, Err(Error::Damaged { .. })));
    storage.delete(&key).await.expect("a delete");
}

async fn many_are_listed(storage: &Storage) {
    let mut there: Vec<String> = (0..25).map(|_| file_key(&FileId::new().to_string())).collect();
    for key in &there {
        put(storage, key, b"x").await;
    }
    there.sort();
    let mut listed = keys(storage).await;
    listed.sort();
    assert_eq!(listed, there);
    let young = storage.keys_older_than("files", Duration::from_secs(3600)).await.expect("a list");
    assert_eq!(young, Vec::<String>::new());
    for key in &there {
        storage.delete(key).await.expect("a delete");
    }
    assert_eq!(keys(storage).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_folder_does_what_it_must() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = format!("file:{}", folder.path().join("objects").display());
    does_what_it_must(&config(|config| config.storage.url = Some(url))).await;
}

#[tokio::test]
async fn memory_does_what_it_must() {
    does_what_it_must(&config(|config| config.storage.url = Some("memory:".into()))).await;
}

#[tokio::test]
async fn an_s3_compatible_server_does_what_it_must() {
    let Some(server) = Server::moto().await else { return };
    server.put_foreign("files/of-others").await;
    does_what_it_must(&config(|config| server.configure(config))).await;
    // Nothing outside of the server's own folder was touched, and nothing is left that costs.
    assert_eq!(server.keys().await, ["files/of-others"]);
    assert_eq!(server.unfinished_uploads().await, Vec::<String>::new());
}

#[tokio::test]
async fn the_s3_face_of_rclone_does_what_it_must() {
    let Some(server) = Server::rclone().await else { return };
    does_what_it_must(&config(|config| server.configure(config))).await;
}

#[tokio::test]
async fn azurite_does_what_it_must() {
    let Some(server) = Server::azurite().await else { return };
    does_what_it_must(&config(|config| server.configure(config))).await;
}

#[tokio::test]
async fn the_client_for_google_does_what_it_must_against_an_interface_of_the_same_shape() {
    let Some(server) = Server::open_rclone().await else { return };
    does_what_it_must(&config(|config| server.configure_as_google(config))).await;
}
