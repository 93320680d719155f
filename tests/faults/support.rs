//! A real `lorad serve` with its workers on a tiny model, and what the tests see of it: its API, its data folder, `/proc`.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lorad_engine::testing::TinyModel;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::shim::Shim;

/// Longest time that anything may take here.
const PATIENCE: Duration = Duration::from_secs(120);
/// Seconds of a worker's lease: so long that none is over before its time on a busy machine. One that must be is shorter.
const LEASE_SECONDS: &str = "20";
/// The setting of the lease.
pub(crate) const LEASE: &str = "LORAD__WORKERS__LEASE_SECONDS";
/// The setting of the workers' program.
const EXECUTABLE: &str = "LORAD__WORKERS__EXECUTABLE";

/// A data folder and a models folder, and the server that runs on them.
pub(crate) struct Home {
    folder: TempDir,
    http: reqwest::Client,
    server: Option<(Child, SocketAddr)>,
    settings: Vec<(&'static str, String)>,
    shim: Option<Shim>,
}

/// A worker process.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    pub(crate) pid: i32,
    pub(crate) scratch: PathBuf,
}

impl Drop for Home {
    fn drop(&mut self) {
        self.kill_server();
        self.kill_workers();
        if std::thread::panicking() {
            eprintln!("server log:\n{}", self.log());
        }
    }
}

impl Home {
    /// A fresh home with a tiny model, `local:tiny.gguf`, and a running server.
    pub(crate) async fn start(settings: &[(&'static str, &str)]) -> Self {
        let mut home = Self::prepare(settings);
        home.start_server().await;
        home
    }

    /// A fresh home whose processes are told by [`Home::shim`] what goes wrong.
    pub(crate) async fn start_with_shim(settings: &[(&'static str, &str)]) -> Self {
        let mut home = Self::prepare(settings);
        let (shim, worker) = (Shim::build(home.folder.path(), &home.data()), home.folder.path().join("worker"));
        shim.write_worker(&worker);
        home.settings.push((EXECUTABLE, worker.display().to_string()));
        home.shim = Some(shim);
        home.start_server().await;
        home
    }

    /// A fresh home whose workers are this script: `LORAD` in it is our program, `DATA` the data folder.
    pub(crate) async fn start_with_worker(script: &str) -> Self {
        let mut home = Self::prepare(&[]);
        let worker = home.folder.path().join("worker");
        let script = script.replace("LORAD", env!("CARGO_BIN_EXE_lorad"));
        fs::write(&worker, script.replace("DATA", home.data().to_str().expect("UTF-8"))).expect("a file");
        fs::set_permissions(&worker, fs::Permissions::from_mode(0o700)).expect("a file of ours");
        home.settings.push((EXECUTABLE, worker.display().to_string()));
        home.start_server().await;
        home
    }

    fn prepare(settings: &[(&'static str, &str)]) -> Self {
        let folder = tempfile::Builder::new().prefix("lorad-").tempdir().expect("a temporary folder");
        fs::create_dir_all(folder.path().join("models")).expect("a folder");
        let settings = settings.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let home = Self { folder, http: reqwest::Client::new(), server: None, settings, shim: None };
        TinyModel::default().write(&home.model_path("tiny.gguf")).expect("a model");
        home
    }

    /// What goes wrong in a home that was started so.
    pub(crate) fn shim(&self) -> &Shim {
        self.shim.as_ref().expect("a home with a shim")
    }

    /// A file of the data folder.
    pub(crate) fn data_file(&self, name: &str) -> String {
        fs::read_to_string(self.data().join(name)).expect("a file")
    }

    pub(crate) fn model_path(&self, name: &str) -> PathBuf {
        self.folder.path().join("models").join(name)
    }

    /// A path of this home's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs another command of the program in this home's folder, and gives what it said.
    pub(crate) fn lorad(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.args(arguments).current_dir(self.folder.path()).env_clear().env("HOME", self.folder.path());
        let output = command.output().expect("a process");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(said) } else { Err(said) }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("server.log")).unwrap_or_default()
    }

    /// The server's command, out of reach of the environment and the files of whoever runs the tests.
    fn serve(&self, data: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.args(["serve", "--data-dir"]).arg(data).current_dir(self.folder.path()).env_clear();
        command.env("HOME", self.folder.path()).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        // Where a build with CUDA finds its libraries: on a machine with a GPU these tests train there.
        command.envs(std::env::var_os("LD_LIBRARY_PATH").map(|folders| ("LD_LIBRARY_PATH", folders)));
        command
    }

    /// Starts the server (again) and waits until it answers.
    pub(crate) async fn start_server(&mut self) {
        let log = self.folder.path().join("server.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(log).expect("a log");
        let before = self.log().len();
        let mut command = self.serve(&self.data());
        command
            .args(["--listen", "127.0.0.1:0", "--models-dir"])
            .arg(self.folder.path().join("models"))
            .env(LEASE, LEASE_SECONDS)
            .env("LORAD__MODELS__CACHE_DIR", self.folder.path().join("cache"))
            .env("HF_HUB_OFFLINE", "1")
            .env("NO_COLOR", "1")
            .envs(self.shim.iter().flat_map(Shim::environment))
            .envs(self.settings.iter().map(|(name, value)| (*name, value.as_str())))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = command.spawn().expect("a server");
        let address = poll("the server's address", || {
            let log = self.log();
            let (_, rest) = log[before..].split_once("listening on http://")?;
            rest.split_once("/v1")?.0.parse().ok()
        })
        .await;
        self.server = Some((child, address));
    }

    /// Runs another server, on that data folder of this home, which must end by itself.
    pub(crate) fn run_server(&self, data: &str, variables: &[(&str, &str)]) -> (ExitStatus, String) {
        let mut command = self.serve(&self.folder.path().join(data));
        if variables.iter().all(|(name, _)| *name != "LORAD__SERVER__LISTEN") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let output = command.envs(variables.iter().copied()).output().expect("a server");
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// kill -9 of the server.
    pub(crate) fn kill_server(&mut self) {
        if let Some((mut server, _)) = self.server.take() {
            server.kill().expect("a process of ours");
            server.wait().expect("its end");
        }
    }

    /// SIGTERM for the server; returns once it has ended.
    pub(crate) async fn stop_server(&mut self) {
        let (mut server, _) = self.server.take().expect("a running server");
        kill(Pid::from_raw(server.id().cast_signed()), Signal::SIGTERM).expect("a process of ours");
        let status = poll("the server's end", || server.try_wait().expect("a process of ours")).await;
        assert!(status.success(), "{status}");
    }

    /// kill -9 of every worker.
    pub(crate) fn kill_workers(&self) {
        for worker in self.workers() {
            worker.kill();
        }
    }

    /// The workers of this home that run.
    pub(crate) fn workers(&self) -> Vec<Worker> {
        let scratch_root = self.data().join("scratch");
        let processes = fs::read_dir("/proc").expect("a Linux");
        let workers = processes.flatten().filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let arguments = fs::read(entry.path().join("cmdline")).ok()?;
            let mut arguments =
                arguments.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
            arguments.find(|argument| argument == "--scratch")?;
            let scratch = PathBuf::from(arguments.next()?);
            scratch.starts_with(&scratch_root).then_some(Worker { pid, scratch })
        });
        workers.collect()
    }

    /// Attempts made so far, by their logs.
    pub(crate) fn attempts(&self) -> usize {
        fs::read_dir(self.data().join("logs")).map_or(0, Iterator::count)
    }

    /// The step after which the newest training went on, as its log tells.
    pub(crate) fn resumed_from(&self) -> u32 {
        let logs = fs::read_dir(self.data().join("logs")).expect("a folder of logs");
        // Ids of attempts sort by age.
        let mut logs: Vec<PathBuf> = logs.flatten().map(|log| log.path()).collect();
        logs.sort();
        let newest = logs.last().expect("a log");
        let log = fs::read_to_string(newest).expect("a log");
        let step = log.split("resumed_from=").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        step.unwrap_or_else(|| panic!("{}: no word of a resumption in {log}", newest.display()))
    }

    /// Where a path of the API is.
    pub(crate) fn url(&self, path: &str) -> String {
        let (_, address) = self.server.as_ref().expect("a running server");
        format!("http://{address}/v1{path}")
    }

    /// A GET that must succeed.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let response = self.http.get(self.url(path)).send().await.expect("an answer");
        let (status, body) = (response.status(), response.text().await.expect("a body"));
        assert!(status.is_success(), "GET {path}: {status} {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// A POST, with its status.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.http.post(self.url(path)).json(body).send().await.expect("an answer");
        (response.status().as_u16(), response.json().await.expect("JSON"))
    }

    /// Uploads a data set and returns its id.
    /// Sends a DELETE and returns its status.
    pub(crate) async fn delete(&self, path: &str) -> u16 {
        self.http.delete(self.url(path)).send().await.expect("an answer").status().as_u16()
    }

    pub(crate) async fn upload(&self, content: impl Into<Vec<u8>>) -> String {
        let file = Part::bytes(content.into()).file_name("rows.jsonl");
        let form = Form::new().text("purpose", "fine-tune").part("file", file);
        let response = self.http.post(self.url("/files")).multipart(form).send().await.expect("an answer");
        let file: Value = response.json().await.expect("JSON");
        file["id"].as_str().unwrap_or_else(|| panic!("no file: {file}")).to_owned()
    }

    /// Creates a job and returns its id; `extra` fields replace the usual ones.
    pub(crate) async fn create(&self, file: &str, extra: Value) -> String {
        let mut body = json!({"model": "local:tiny.gguf", "training_file": file});
        for (name, value) in extra.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let (status, job) = self.post("/fine_tuning/jobs", &body).await;
        assert_eq!(status, 200, "{job}");
        job["id"].as_str().expect("an id").to_owned()
    }

    pub(crate) async fn job(&self, id: &str) -> Value {
        self.get(&format!("/fine_tuning/jobs/{id}")).await
    }

    /// Waits until the job has come to an end and returns it.
    pub(crate) async fn finished(&self, id: &str) -> Value {
        let begin = Instant::now();
        loop {
            let job = self.job(id).await;
            if is_final(&job) {
                return job;
            }
            assert!(begin.elapsed() < PATIENCE, "the job does not end: {job}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The job's story, oldest first, with its own ids taken out so that two jobs can be compared.
    pub(crate) async fn story(&self, id: &str) -> Vec<String> {
        let events = self.get(&format!("/fine_tuning/jobs/{id}/events?limit=1000")).await;
        self.assert_no_path_of_ours(&events.to_string());
        let model = self.job(id).await["fine_tuned_model"].as_str().unwrap_or("no model").to_owned();
        let mut story: Vec<String> = events["data"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|event| {
                let text = format!("{} {} {}", event["level"], event["message"], event["data"]);
                text.replace(id, "JOB").replace(&model, "MODEL")
            })
            .collect();
        story.reverse();
        story
    }

    /// Hashes of the job's artifacts by type.
    pub(crate) async fn artifacts(&self, id: &str) -> Vec<(String, String)> {
        let list = self.get(&format!("/fine_tuning/jobs/{id}/artifacts")).await;
        let hash = |artifact: &Value| {
            let text =
                |name: &str| artifact[name].as_str().unwrap_or_else(|| panic!("no {name}: {artifact}")).to_owned();
            (text("type"), text("sha256"))
        };
        let mut hashes: Vec<_> = list["data"].as_array().expect("a list").iter().map(hash).collect();
        hashes.sort();
        hashes
    }

    /// Waits for a step to be reported; `false`: the job has come to its end by now.
    pub(crate) async fn trained_a_step(&self, id: &str) -> bool {
        self.trained_steps(id, 1).await
    }

    /// Waits for that many steps to be reported; `false`: the job has come to its end by now.
    pub(crate) async fn trained_steps(&self, id: &str, steps: usize) -> bool {
        let begin = Instant::now();
        loop {
            let events = self.get(&format!("/fine_tuning/jobs/{id}/events?limit=1000")).await;
            let is_step = |event: &&Value| event["type"] == "metrics";
            let trained = events["data"].as_array().expect("a list").iter().filter(is_step).count() >= steps;
            let job = self.job(id).await;
            if is_final(&job) || trained {
                return !is_final(&job);
            }
            assert!(begin.elapsed() < PATIENCE, "no step is reported: {events}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The text, which must not name a folder of this home.
    pub(crate) fn assert_no_path_of_ours(&self, text: &str) {
        let folder = self.folder.path().to_str().expect("a folder with a name in UTF-8");
        assert!(!text.contains(folder), "a path of the server's: {text}");
    }
}

impl Worker {
    /// kill -9.
    pub(crate) fn kill(&self) {
        // A worker that has ended already is as dead.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }

    /// Holds it where it is, so that nothing is heard of it; `false`: it has ended already.
    pub(crate) fn freeze(&self) -> bool {
        kill(Pid::from_raw(self.pid), Signal::SIGSTOP).is_ok()
    }

    /// Whether a file or folder whose name begins so is in its scratch folder.
    pub(crate) fn has(&self, prefix: &str) -> bool {
        let Ok(files) = fs::read_dir(&self.scratch) else { return false };
        files.flatten().any(|file| file.file_name().to_string_lossy().starts_with(prefix))
    }
}

fn is_final(job: &Value) -> bool {
    matches!(job["status"].as_str(), Some("succeeded" | "failed" | "cancelled"))
}

/// Asks again and again until there is an answer.
pub(crate) async fn poll<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "waited too long for {what}");
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
}

/// A data set of that many rows, in OpenAI's chat format.
pub(crate) fn rows(count: usize) -> String {
    let row = |index: usize| {
        let question = format!("What is {index} times {}?", index + 3);
        let answer = format!("It is {}, as everybody knows.", index * (index + 3));
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    };
    (0..count).map(|index| format!("{}\n", row(index))).collect()
}

/// Cuts a file to a part of its length.
pub(crate) fn cut(source: &Path, target: &Path, keep: impl Fn(usize) -> usize) {
    let bytes = fs::read(source).expect("a file");
    fs::write(target, &bytes[..keep(bytes.len())]).expect("a file");
}
