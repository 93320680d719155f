//! Starts real storage servers on free ports, each with a bucket or container `lorad`.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::http::{Method, Request};
use lorad::config::Config;
use lorad::storage::Storage;
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::HttpRequestBody;
use secrecy::SecretString;
use serde_json::json;
use tempfile::TempDir;

/// Longest time that a server may take to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Id of the key that servers are started with, where they check keys.
pub(crate) const KEY_ID: &str = "loradkeyid";
/// Its secret.
pub(crate) const SECRET: &str = "lorad-deep-secret-0123456789";
/// Azurite's account and its key, which everybody knows.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A storage server under test; it ends with this.
pub(crate) struct Server {
    process: Child,
    kind: Kind,
    /// Where it listens, `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    folder: TempDir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Moto,
    Rclone,
    Azurite,
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended already is as dead.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    /// An S3-compatible server that takes any key: `moto_server`, or what `LORAD_TEST_MOTO` names.
    pub(crate) async fn moto() -> Option<Self> {
        let program = program("LORAD_TEST_MOTO", "moto_server")?;
        let server = Self::start(Kind::Moto, program, |command, port, _| {
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        });
        let server = server.await;
        let made = reqwest::Client::new().put(format!("{}/lorad", server.url)).send().await.expect("an answer");
        assert!(made.status().is_success(), "a bucket: {}", made.status());
        Some(server)
    }

    /// rclone's S3 face of a folder, which checks keys: `rclone`, or what `LORAD_TEST_RCLONE` names.
    pub(crate) async fn rclone() -> Option<Self> {
        Self::start_rclone(&["--auth-key", &format!("{KEY_ID},{SECRET}")]).await
    }

    /// The same, for anybody.
    pub(crate) async fn open_rclone() -> Option<Self> {
        Self::start_rclone(&[]).await
    }

    async fn start_rclone(arguments: &[&str]) -> Option<Self> {
        let program = program("LORAD_TEST_RCLONE", "rclone")?;
        let server = Self::start(Kind::Rclone, program, |command, port, folder| {
            std::fs::create_dir_all(folder.path().join("root/lorad")).expect("a folder");
            command
                .args(["serve", "s3", "--addr", &format!("127.0.0.1:{port}"), "--config", "/dev/null"])
                .args(arguments);
            command.arg(format!("local:{}", folder.path().join("root").display()));
            command.env("RCLONE_CONFIG_LOCAL_TYPE", "local").env("RCLONE_CACHE_DIR", folder.path().join("cache"));
        });
        Some(server.await)
    }

    /// Azurite's blob service: `azurite-blob`, or what `LORAD_TEST_AZURITE` names.
    pub(crate) async fn azurite() -> Option<Self> {
        let program = program("LORAD_TEST_AZURITE", "azurite-blob")?;
        let server = Self::start(Kind::Azurite, program, |command, port, _| {
            command.args(["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]);
            command.args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()]);
        });
        let server = server.await;
        let mut request = Request::builder()
            .method(Method::PUT)
            .uri(format!("{}/{ACCOUNT}/lorad?restype=container", server.url))
            .header("content-length", "0")
            .body(HttpRequestBody::empty())
            .expect("a request");
        let key = AzureCredential::AccessKey(AzureAccessKey::try_new(ACCOUNT_KEY).expect("a key"));
        AzureAuthorizer::new(&key, ACCOUNT).try_authorize(&mut request).expect("a signature");
        let (head, _) = request.into_parts();
        let client = reqwest::Client::new();
        let made = client.put(head.uri.to_string()).headers(head.headers).body("").send().await.expect("an answer");
        assert!(made.status().is_success(), "a container: {}", made.text().await.expect("a body"));
        Some(server)
    }

    async fn start(kind: Kind, program: PathBuf, arguments: impl FnOnce(&mut Command, u16, &TempDir)) -> Self {
        let folder = tempfile::Builder::new().prefix("lorad-storage-").tempdir().expect("a temporary folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
        let mut command = Command::new(program);
        command.current_dir(folder.path()).stdin(Stdio::null());
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        arguments(&mut command, port, &folder);
        let process = command.spawn().expect("a storage server");
        let mut server = Self { process, kind, url: format!("http://127.0.0.1:{port}"), folder };
        let begin = Instant::now();
        while reqwest::get(&server.url).await.is_err() {
            let log = || std::fs::read_to_string(server.folder.path().join("log")).unwrap_or_default();
            let ended = server.process.try_wait().expect("a process of ours");
            assert!(ended.is_none() && begin.elapsed() < PATIENCE, "{kind:?} does not start: {ended:?} {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server
    }

    /// Settings that reach it at `endpoint`, which is its own or a proxy's.
    pub(crate) fn configure_at(&self, endpoint: &str, config: &mut Config) {
        let storage = &mut config.storage;
        match self.kind {
            Kind::Moto | Kind::Rclone => {
                storage.url = Some("s3://lorad/deep/folder".into());
                storage.endpoint = Some(endpoint.into());
                storage.access_key_id = Some(KEY_ID.into());
                storage.secret_access_key = Some(SecretString::from(SECRET));
            }
            Kind::Azurite => {
                storage.url = Some("az://lorad/deep/folder".into());
                storage.endpoint = Some(format!("{endpoint}/{ACCOUNT}"));
                storage.account = Some(ACCOUNT.into());
                storage.account_key = Some(SecretString::from(ACCOUNT_KEY));
            }
        }
    }

    /// Settings that reach it.
    pub(crate) fn configure(&self, config: &mut Config) {
        self.configure_at(&self.url, config);
    }

    /// Settings of Google's client that reach this S3-compatible server: the two XML interfaces have the same shape.
    pub(crate) fn configure_as_google(&self, config: &mut Config) {
        let file = self.folder.path().join("account.json");
        let account = json!({"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""});
        std::fs::write(&file, account.to_string()).expect("a file");
        config.storage.url = Some("gs://lorad/google".into());
        config.storage.endpoint = Some(self.url.clone());
        config.storage.credentials_file = Some(file);
    }

    /// The variables of a server process whose storage this is, reached at `endpoint`.
    pub(crate) fn variables(endpoint: &str) -> [(&'static str, &str); 4] {
        [
            ("LORAD__STORAGE__URL", "s3://lorad/deep/folder"),
            ("LORAD__STORAGE__ENDPOINT", endpoint),
            ("LORAD__STORAGE__ACCESS_KEY_ID", KEY_ID),
            ("LORAD__STORAGE__SECRET_ACCESS_KEY", SECRET),
        ]
    }

    /// The keys of all objects that moto has, whoever wrote them.
    pub(crate) async fn keys(&self) -> Vec<String> {
        assert_eq!(self.kind, Kind::Moto);
        self.texts("/lorad?list-type=2", "Key").await
    }

    /// The keys of uploads that moto was told to begin and not to end.
    pub(crate) async fn unfinished_uploads(&self) -> Vec<String> {
        assert_eq!(self.kind, Kind::Moto);
        self.texts("/lorad?uploads", "Key").await
    }

    /// Writes an object past the server under test.
    pub(crate) async fn overwrite(&self, key: &str, bytes: Vec<u8>) {
        let mut config = Config::default();
        self.configure(&mut config);
        let storage = Storage::from_config(&config).expect("a backend");
        storage.put_bytes(key, bytes.into()).await.expect("a put");
    }

    /// Writes an object of moto's that is nobody's.
    pub(crate) async fn put_foreign(&self, key: &str) {
        let put = reqwest::Client::new().put(format!("{}/lorad/{key}", self.url)).body("theirs").send().await;
        assert!(put.expect("an answer").status().is_success());
    }

    /// What stands in all elements of that name of an XML answer.
    async fn texts(&self, path: &str, name: &str) -> Vec<String> {
        let xml = reqwest::get(format!("{}{path}", self.url)).await.expect("an answer").text().await.expect("a body");
        let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
        xml.split(&begin).skip(1).filter_map(|rest| Some(rest.split_once(&end)?.0.to_owned())).collect()
    }
}

/// The program that a variable names, or that is on the `PATH`.
fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    let on_path = || {
        std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
    };
    let found = named.or_else(on_path);
    if found.is_none() {
        eprintln!("SKIPPED: no {name} (scripts/storage-servers.sh installs it, or {variable} names it)");
    }
    found
}
