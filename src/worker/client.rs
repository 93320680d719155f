//! The worker's side of the worker protocol: requests that are repeated until the server answers or the lease is over.
//!
//! A server that is being restarted is not there for a while and then is again. So whatever fails for reasons that pass is
//! tried again, until the lease ends that the last answered heartbeat gave: then another worker may have the task, and this
//! one must be gone.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::StreamExt;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::Progress;
use crate::types::worker_protocol::{ATTEMPT_ENDED, OBJECT_DAMAGED, VERSION, VERSION_HEADER};

/// Lease before the task says how long it is.
const FIRST_LEASE: Duration = Duration::from_secs(30);
/// Longest wait before a request is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long an answer to a request without a large body may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// How often in a row a download may break off without getting further than before.
const MOST_BROKEN_OFF: u32 = 5;

/// Bytes of a file that are read and sent at once.
const UPLOAD_PIECE_BYTES: usize = 64 << 10;

/// Why the worker cannot go on talking.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The server has closed the attempt: whatever this worker does, nobody waits for it.
    #[error("the server has ended this attempt")]
    Ended,
    /// The lease is over.
    #[error("the server has not answered for the whole lease of {0:?}")]
    ServerGone(Duration),
    /// The server understood the request and refused it.
    #[error("the server refused {method} {path}: {status} {message}")]
    Refused {
        /// Method of the request.
        method: Method,
        /// Path of the request.
        path: &'static str,
        /// What the server answered.
        status: StatusCode,
        /// The answer's text.
        message: String,
    },
    /// What the server keeps is not what it was given; asking again does not help.
    #[error("{path} cannot be downloaded: {how}")]
    Damaged {
        /// Path of the request.
        path: &'static str,
        /// What is wrong with it.
        how: String,
    },
    /// A file of this worker's cannot be read or written.
    #[error("{0:#}")]
    File(#[from] anyhow::Error),
}

/// A connection to the server for one attempt; clones share the lease.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    token: SecretString,
    lease: Arc<Mutex<Lease>>,
    progress: Progress,
}

#[derive(Debug)]
struct Lease {
    length: Duration,
    renewed_at: Instant,
}

impl Client {
    /// A client of `server`: `unix:PATH` or `http://HOST:PORT`. What comes or goes of a file for the first
    /// time is progress; what is repeated after a failure is not.
    pub(super) fn new(server: &str, token: SecretString, progress: Progress) -> anyhow::Result<Self> {
        // No proxy stands between a worker and its server.
        let builder = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(5));
        let (builder, base) = match server.strip_prefix("unix:") {
            Some(socket) => (builder.unix_socket(Path::new(socket)), "http://localhost".to_owned()),
            None => (builder, server.trim_end_matches('/').to_owned()),
        };
        let http = builder.build().with_context(|| format!("cannot make a client of `{server}`"))?;
        let lease = Arc::new(Mutex::new(Lease { length: FIRST_LEASE, renewed_at: Instant::now() }));
        Ok(Self { http, base, token, lease, progress })
    }

    /// Takes note of how long a lease is.
    pub(super) fn set_lease(&self, length: Duration) {
        self.lease.lock().expect("no holder of this lock panics").length = length;
    }

    /// Fetches a JSON value.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &'static str) -> Result<T, Error> {
        let response = self.send(Method::GET, path, |request| Ok(request.timeout(self.answer_timeout()))).await?;
        decode(path, response).await
    }

    /// Sends a JSON value and reads the answer.
    pub(super) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &'static str,
        body: &B,
    ) -> Result<T, Error> {
        let response =
            self.send(Method::POST, path, |request| Ok(request.timeout(self.answer_timeout()).json(body))).await?;
        decode(path, response).await
    }

    /// Sends a heartbeat; an answer renews the lease from the moment of sending.
    pub(super) async fn renew<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &'static str,
        body: &B,
    ) -> Result<T, Error> {
        let sent_at = Mutex::new(Instant::now());
        let prepare = |request: RequestBuilder| {
            *sent_at.lock().expect("no holder of this lock panics") = Instant::now();
            Ok(request.timeout(self.answer_timeout()).json(body))
        };
        let response = self.send(Method::POST, path, prepare).await?;
        let sent_at = *sent_at.lock().expect("no holder of this lock panics");
        self.lease.lock().expect("no holder of this lock panics").renewed_at = sent_at;
        decode(path, response).await
    }

    /// Fetches bytes into the file `target` and checks their hash; a stream that breaks off is fetched anew, unless it does so
    /// again and again: the server breaks a stream off whose bytes are not those that it was given.
    pub(super) async fn download(&self, path: &'static str, target: &Path, sha256: &str) -> Result<(), Error> {
        let (mut furthest, mut broken_off) = (0, 0);
        loop {
            let before = furthest;
            let response = self.send(Method::GET, path, Ok).await?;
            match save(response, target, &mut furthest, &self.progress).await? {
                Some(found) if found == sha256 => return Ok(()),
                Some(found) => {
                    return Err(Error::Damaged { path, how: format!("it has sha256 {found}, expected {sha256}") });
                }
                None => broken_off = if furthest > before { 1 } else { broken_off + 1 },
            }
            if broken_off == MOST_BROKEN_OFF {
                let how = format!("it broke off {broken_off} times in a row after at most {furthest} bytes");
                return Err(Error::Damaged { path, how });
            }
            self.pause(Duration::from_millis(200) * broken_off).await?;
        }
    }

    /// Sends the bytes of the file `source`.
    pub(super) async fn upload<Q: Serialize>(&self, path: &'static str, query: &Q, source: &Path) -> Result<(), Error> {
        let length = source.metadata().with_context(|| format!("cannot read {}", source.display()))?.len();
        let furthest = Arc::new(AtomicU64::new(0));
        let prepare = |request: RequestBuilder| {
            let file = std::fs::File::open(source).with_context(|| format!("cannot read {}", source.display()))?;
            let (progress, furthest) = (self.progress.clone(), Arc::clone(&furthest));
            let mut sent = 0;
            let on_piece = move |_: &std::io::Result<_>| {
                sent += 1;
                if furthest.fetch_max(sent, Ordering::Relaxed) < sent {
                    progress.made();
                }
            };
            let pieces = ReaderStream::with_capacity(tokio::fs::File::from_std(file), UPLOAD_PIECE_BYTES);
            let body = reqwest::Body::wrap_stream(pieces.inspect(on_piece));
            Ok(request.query(query).header(reqwest::header::CONTENT_LENGTH, length).body(body))
        };
        self.send(Method::PUT, path, prepare).await.map(|_| ())
    }

    /// Sends a request until it is answered with success, the server refuses it, or the lease is over.
    async fn send(
        &self,
        method: Method,
        path: &'static str,
        prepare: impl Fn(RequestBuilder) -> Result<RequestBuilder, Error>,
    ) -> Result<Response, Error> {
        let mut pause = Duration::from_millis(50);
        loop {
            let request = self
                .http
                .request(method.clone(), format!("{}{path}", self.base))
                .bearer_auth(self.token.expose_secret())
                .header(VERSION_HEADER, VERSION);
            match prepare(request)?.send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if !may_pass(response.status()) => return Err(refusal(method, path, response).await),
                Ok(response) => {
                    let refused = refusal(method.clone(), path, response).await;
                    if matches!(refused, Error::Damaged { .. }) {
                        return Err(refused);
                    }
                    tracing::debug!(path, %refused, "trying again");
                }
                Err(error) => tracing::debug!(path, %error, "trying again"),
            }
            self.pause(pause).await?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn answer_timeout(&self) -> Duration {
        ANSWER_TIMEOUT.min(self.lease.lock().expect("no holder of this lock panics").length)
    }

    /// Waits, unless the lease ends before the wait does.
    async fn pause(&self, pause: Duration) -> Result<(), Error> {
        {
            let lease = self.lease.lock().expect("no holder of this lock panics");
            if lease.renewed_at.elapsed() + pause > lease.length {
                return Err(Error::ServerGone(lease.length));
            }
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Whether the same request may succeed later.
fn may_pass(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::REQUEST_TIMEOUT
}

async fn refusal(method: Method, path: &'static str, response: Response) -> Error {
    let status = response.status();
    // An answer that breaks off has no text.
    let text = response.text().await.unwrap_or_default();
    let error = serde_json::from_str::<Value>(&text).map(|mut body| body["error"].take()).unwrap_or_default();
    if error["code"] == ATTEMPT_ENDED {
        return Error::Ended;
    }
    let message = error["message"].as_str().unwrap_or(&text).to_owned();
    if error["code"] == OBJECT_DAMAGED {
        return Error::Damaged { path, how: message };
    }
    Error::Refused { method, path, status, message }
}

async fn decode<T: DeserializeOwned>(path: &'static str, response: Response) -> Result<T, Error> {
    let value = response.json().await.with_context(|| format!("the answer of {path} cannot be read"))?;
    Ok(value)
}

/// Writes a body to a file and returns its hash; `None`: it broke off. What is beyond `furthest` bytes is progress.
async fn save(
    response: Response,
    target: &Path,
    furthest: &mut u64,
    progress: &Progress,
) -> anyhow::Result<Option<String>> {
    let context = || format!("cannot write {}", target.display());
    let mut file = tokio::fs::File::create(target).await.with_context(context)?;
    let mut hash = Sha256::new();
    let mut length = 0;
    let mut body = response.bytes_stream();
    while let Some(chunk) = body.next().await {
        let Ok(chunk) = chunk else { return Ok(None) };
        hash.update(&chunk);
        file.write_all(&chunk).await.with_context(context)?;
        length += chunk.len() as u64;
        if length > *furthest {
            *furthest = length;
            progress.made();
        }
    }
    file.flush().await.with_context(context)?;
    Ok(Some(hex::encode(hash.finalize())))
}
