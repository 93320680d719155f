//! A whole server on free ports, without its scheduler: tests take attempts up themselves and speak the worker protocol.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use lorad::config::Config;
use lorad::http::{App, public_router, serve, worker_router};
use lorad::hub::{Hub, Options};
use lorad::jobs::Jobs;
use lorad::jobs::claim::{Claimed, claim};
use lorad::jobs::keys::{NewKey, create_key};
use lorad::storage::Storage;
use lorad::store::Store;
use lorad::types::api_key::Scope;
use lorad::types::attempt::TaskKind;
use lorad::types::device::Device;
use lorad::types::ids::KeyId;
use lorad::types::worker_protocol::{VERSION, VERSION_HEADER};
use lorad_engine::testing::TinyModel;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A row that a training would take.
pub(crate) const ROWS: &str = "{\"instruction\": \"Say it.\", \"output\": \"It.\"}\n";

/// A server under test.
pub(crate) struct TestApp {
    /// Where the public API listens, `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    /// The use cases behind it.
    pub(crate) jobs: Jobs,
    /// Tells it to end.
    pub(crate) shutdown: CancellationToken,
    client: Client,
    /// The API key that requests show.
    key: Option<String>,
    folder: TempDir,
    _servers: JoinSet<()>,
}

impl TestApp {
    /// A server with the default configuration.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A server whose trainings run on those devices, as far as it knows.
    pub(crate) async fn start_on(devices: &[Device]) -> Self {
        Self::start_with_all(|_| {}, devices).await
    }

    /// A server with a changed configuration; where that names no storage, objects are in memory.
    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with_all(change, &[Device::Cpu]).await
    }

    async fn start_with_all(change: impl FnOnce(&mut Config), devices: &[Device]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut config = Config::default();
        config.server.data_dir = folder.path().to_owned();
        let (models_dir, cache_dir) = (folder.path().join("models"), folder.path().join("cache"));
        config.models.dir = Some(models_dir.clone());
        config.models.cache_dir = Some(cache_dir.clone());
        config.workers.executable = Some(env!("CARGO_BIN_EXE_lorad").into());
        change(&mut config);
        std::fs::create_dir(&models_dir).expect("a folder");
        std::fs::write(models_dir.join("tiny.gguf"), "the server never looks inside").expect("a file");
        let hub = Hub::new(Options { models_dir, cache_dir, endpoint: None, offline: true });
        let store = Store::open(&config.database_path()).await.expect("a database");
        let storage = match &config.storage.url {
            None => Storage::memory(),
            Some(_) => Storage::from_config(&config).expect("a storage"),
        };
        let jobs = Jobs::new(store, storage);
        let shutdown = CancellationToken::new();
        let app = App::new(&config, jobs.clone(), hub, devices, shutdown.clone()).await.expect("a safe configuration");

        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let socket = UnixListener::bind(config.server.data_dir.join("worker.sock")).expect("a socket");
        let mut servers = JoinSet::new();
        let (public, worker) = (public_router(app.clone()), worker_router(app));
        servers.spawn(serve(listener, public, config.patience(), CancellationToken::new()));
        servers.spawn(async move { axum::serve(socket, worker).await.expect("the server runs") });
        Self { url, jobs, shutdown, client: Client::new(), key: None, folder, _servers: servers }
    }

    /// A request to the public API.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.url)).timeout(Duration::from_secs(20));
        match &self.key {
            None => request,
            Some(key) => request.bearer_auth(key),
        }
    }

    /// Makes a key of that owner; requests do not show it before [`TestApp::show_key`].
    pub(crate) async fn create_key(&self, owner: &str, scope: Scope) -> (KeyId, String) {
        let key = NewKey { name: format!("of {owner}"), owner: owner.to_owned(), scope };
        let (key, secret) = create_key(&self.jobs.store, key).await.expect("a database");
        (key.id, secret.expose_secret().to_owned())
    }

    /// From now on requests show this key.
    pub(crate) fn show_key(&mut self, key: &str) {
        self.key = Some(key.to_owned());
    }

    /// Sends a GET.
    pub(crate) async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.expect("an answer")
    }

    /// The JSON of a GET that succeeds.
    pub(crate) async fn get_json(&self, path: &str) -> Value {
        ok_json(self.get(path).await).await
    }

    /// Sends a POST as the official client sends one without a body.
    pub(crate) async fn post_empty(&self, path: &str) -> Response {
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        request.body("").send().await.expect("an answer")
    }

    /// Sends JSON.
    pub(crate) async fn post_json(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path).json(body).send().await.expect("an answer")
    }

    /// Uploads a training file and gives its id.
    pub(crate) async fn upload(&self, rows: &str) -> String {
        let part = reqwest::multipart::Part::bytes(rows.as_bytes().to_vec()).file_name("rows.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.request(Method::POST, "/v1/files").multipart(form);
        let file = ok_json(request.send().await.expect("an answer")).await;
        text(&file["id"])
    }

    /// Creates a job with these changes to a minimal request, and gives it.
    pub(crate) async fn create_job(&self, changes: Value) -> Value {
        let file = self.upload(&ROWS.repeat(10)).await;
        let mut body = json!({"model": "local:tiny.gguf", "training_file": file});
        for (key, value) in changes.as_object().expect("changes are an object") {
            body[key] = value.clone();
        }
        ok_json(self.post_json("/v1/fine_tuning/jobs", &body).await).await
    }

    /// Takes the next attempt up, as the scheduler would.
    pub(crate) async fn take_up(&self, task: TaskKind) -> Worker {
        self.take_up_on(task, Device::Cpu).await
    }

    /// Takes the next attempt up for that device.
    pub(crate) async fn take_up_on(&self, task: TaskKind, device: Device) -> Worker {
        let claimed = claim(&self.jobs, task, device, Duration::from_secs(30)).await.expect("a database");
        let Claimed { token, .. } = claimed.expect("something to do");
        self.worker(token.expose_secret())
    }

    /// Makes a base model that can be read, `local:real.gguf`.
    pub(crate) fn make_model(&self) {
        TinyModel::default().write(&self.folder.path().join("models/real.gguf")).expect("a model");
    }

    /// The folders in which processes work.
    pub(crate) fn scratch_folders(&self) -> Vec<String> {
        let Ok(folders) = std::fs::read_dir(self.folder.path().join("scratch")) else { return Vec::new() };
        folders.map(|folder| folder.expect("a name").file_name().to_string_lossy().into_owned()).collect()
    }

    /// Where the log of an attempt is, in a folder that is there.
    pub(crate) fn log_path(&self, attempt: &str) -> PathBuf {
        let logs_dir = self.folder.path().join("logs");
        std::fs::create_dir_all(&logs_dir).expect("a folder");
        logs_dir.join(format!("{attempt}.log"))
    }

    /// A worker that shows this token.
    pub(crate) fn worker(&self, token: &str) -> Worker {
        let socket = self.folder.path().join("worker.sock");
        let client = Client::builder().unix_socket(socket).build().expect("a client");
        Worker { client, token: token.to_owned() }
    }

    /// Takes a job through its validation.
    pub(crate) async fn validate(&self) {
        let worker = self.take_up(TaskKind::Validate).await;
        worker.finish(json!({"result": "succeeded"})).await;
    }

    /// Takes a job through a training of `steps` steps with one listed checkpoint and all default artifacts.
    pub(crate) async fn train(&self, steps: i64) {
        let worker = self.take_up(TaskKind::Train).await;
        let metrics: Vec<Value> = (1..=steps).map(|step| metric(step, steps)).collect();
        worker.post("events", &json!({ "metrics": metrics })).await;
        worker.put_checkpoint(steps, true, b"checkpoint").await;
        let adapter = format!("type=adapter&filename=adapter.tar&parity={}", in_url(&parity().to_string()));
        worker.put_artifact(&adapter, b"0123456789").await;
        worker.put_artifact("type=gguf&quantization=q4_k_m&filename=model-q4_k_m.gguf", b"GGUF").await;
        worker.finish(json!({"result": "succeeded", "trained_tokens": 1234})).await;
    }
}

/// A certificate, as a worker sends one.
pub(crate) fn parity() -> Value {
    json!({
        "prompts": 4, "positions": 90, "largest_logit_difference": 0.5, "mean_logit_difference": 0.25,
        "logit_deviation": 2.0, "greedy_agreement": 0.75, "bound": 1.0,
    })
}

/// A text as a value of a query.
pub(crate) fn in_url(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// The figures of a step, as a worker sends them.
pub(crate) fn metric(step: i64, total_steps: i64) -> Value {
    json!({
        "step": step, "total_steps": total_steps, "epoch": step as f64, "train_loss": 2.0 / step as f64,
        "train_mean_token_accuracy": 0.5, "learning_rate": 0.0002, "grad_norm": 1.0, "trained_tokens": step * 10,
        "step_ms": 5,
    })
}

/// The client side of the worker protocol.
pub(crate) struct Worker {
    client: Client,
    token: String,
}

impl Worker {
    /// A request with the attempt's token and the protocol's version.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_in_version(method, path, VERSION)
    }

    /// A request with the attempt's token and another version of the protocol.
    pub(crate) fn request_in_version(&self, method: Method, path: &str, version: &str) -> RequestBuilder {
        let url = format!("http://worker/internal/v1/worker/{path}");
        self.client.request(method, url).bearer_auth(&self.token).header(VERSION_HEADER, version)
    }

    /// The JSON of a GET that succeeds.
    pub(crate) async fn get(&self, path: &str) -> Value {
        ok_json(self.request(Method::GET, path).send().await.expect("an answer")).await
    }

    /// A POST that succeeds.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Value {
        ok_json(self.request(Method::POST, path).json(body).send().await.expect("an answer")).await
    }

    /// The attempt's last word.
    pub(crate) async fn finish(&self, body: Value) {
        self.post("finish", &body).await;
    }

    /// Hands in a checkpoint.
    pub(crate) async fn put_checkpoint(&self, step: i64, listed: bool, bytes: &'static [u8]) {
        let hash = hex::encode(Sha256::digest(bytes));
        let path = format!("checkpoints?step={step}&listed={listed}&sha256={hash}");
        ok_json(self.put(&path, bytes).await).await;
    }

    /// Hands in an artifact.
    pub(crate) async fn put_artifact(&self, query: &str, bytes: &'static [u8]) {
        let hash = hex::encode(Sha256::digest(bytes));
        ok_json(self.put(&format!("artifacts?{query}&sha256={hash}"), bytes).await).await;
    }

    /// Sends a PUT.
    pub(crate) async fn put(&self, path: &str, bytes: &'static [u8]) -> Response {
        self.request(Method::PUT, path).body(Bytes::from_static(bytes)).send().await.expect("an answer")
    }
}

/// The JSON of an answer that is no error.
pub(crate) async fn ok_json(response: Response) -> Value {
    let status = response.status();
    let body = response.text().await.expect("a body");
    assert!(status.is_success(), "{status}: {body}");
    serde_json::from_str(&body).expect("JSON")
}

/// The error object of an answer with that status, in OpenAI's envelope and with its request id.
pub(crate) async fn error(response: Response, status: StatusCode) -> Value {
    let request_id = response.headers().get("x-request-id").cloned();
    let got = response.status();
    let text = response.text().await.expect("a body");
    assert_eq!(got, status, "{text}");
    assert!(request_id.is_some(), "every answer has an id");
    let body: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("an error is JSON, got `{text}`"));
    let keys: Vec<&String> = body["error"].as_object().expect("an error object").keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    body["error"].clone()
}

/// A JSON string's text.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("a string, got {value}")).to_owned()
}

/// The field `key` of every item of a list.
pub(crate) fn column(list: &Value, key: &str) -> Vec<String> {
    list["data"].as_array().expect("a list").iter().map(|item| text(&item[key])).collect()
}
