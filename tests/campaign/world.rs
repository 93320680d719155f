//! The world of a run: a server process, its workers, its disk, and everything that happens to them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lorad_engine::testing::TinyModel;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::{Api, PATIENCE};
use super::disk::Disk;
use super::plan::EVERYTHING;
use super::plan::{Fault, Plan};
use super::shim::{Control, Shim};

/// Seconds of a worker's lease.
const LEASE_SECONDS: &str = "6";
/// Longest wait for a worker that a fault is to hit.
const WORKER_PATIENCE: Duration = Duration::from_secs(3);
/// Lines of the server's log that a failed run shows.
const LOG_LINES: usize = 60;

/// A data folder on a disk of its own, and the server that runs on it.
pub(crate) struct World {
    plan: Plan,
    folder: TempDir,
    disk: Option<Arc<Disk>>,
    shim: Arc<Shim>,
    control: Arc<Mutex<Control>>,
    server: Option<Child>,
    address: watch::Sender<Option<String>>,
    /// What goes on beside the strikes: faults that end by themselves, clients that pause and cancel.
    effects: JoinSet<()>,
    /// Jobs whose cancellation was accepted.
    cancelled: Arc<Mutex<HashSet<usize>>>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
            eprintln!("the run of seed {} failed; its plan: {:#?}\nserver log:\n{tail}", self.plan.seed, self.plan);
            if std::env::var_os("LORAD_CAMPAIGN_KEEP").is_some() {
                self.keep();
            }
        }
        self.kill_server();
        self.signal_workers(Signal::SIGKILL);
    }
}

impl World {
    /// A fresh one, with a tiny model, `local:tiny.gguf`, and a running server.
    pub(crate) async fn begin(plan: Plan) -> Self {
        let folder = tempfile::Builder::new().prefix("lorad-campaign-").tempdir().expect("a temporary folder");
        let data = folder.path().join("data");
        for name in ["models", "data"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        TinyModel::default().write(&folder.path().join("models/tiny.gguf")).expect("a model");
        let disk = Disk::mount(&data).map(Arc::new);
        if disk.is_none() {
            eprintln!(
                "SKIPPED: a disk that is really full, for this machine lets nobody mount one: calls fail with ENOSPC instead"
            );
        }
        let shim = Shim::build(folder.path(), &data);
        shim.write_worker(&folder.path().join("worker"));
        let mut world = Self {
            plan,
            folder,
            disk,
            shim: Arc::new(shim),
            control: Arc::default(),
            server: None,
            address: watch::Sender::new(None),
            effects: JoinSet::new(),
            cancelled: Arc::default(),
        };
        world.start_server().await;
        world
    }

    /// What its clients call.
    pub(crate) fn api(&self) -> Api {
        Api::new(self.address.subscribe())
    }

    /// The data folder.
    pub(crate) fn data(&self) -> PathBuf {
        self.disk.as_ref().map_or_else(|| self.folder.path().join("data"), |disk| disk.seen())
    }

    /// Whether that job was cancelled with success.
    pub(crate) fn was_cancelled(&self, job: usize) -> bool {
        self.cancelled.lock().expect("no holder panics").contains(&job)
    }

    /// The database of a server that has stopped, where SQLite can open it: it takes no path through another mount namespace.
    pub(crate) fn copy_of_database(&self) -> PathBuf {
        let copy = self.folder.path().join("lorad.db");
        let log = self.data().join("lorad.db-wal");
        assert!(!log.exists(), "a server that stops closes its database");
        fs::copy(self.data().join("lorad.db"), &copy).expect("a database");
        copy
    }

    /// Leaves everything where it can be looked at.
    fn keep(&mut self) {
        self.folder.disable_cleanup(true);
        let kept = self.folder.path().join("kept");
        // Whatever cannot be copied is not there to be looked at.
        let _ = Command::new("cp").arg("-a").arg(self.data()).arg(&kept).status();
        eprintln!("kept: {}", kept.display());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("server.log")).unwrap_or_default()
    }

    fn spawn_server(&self) -> Child {
        let program = env!("CARGO_BIN_EXE_lorad");
        let folder = self.folder.path();
        let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("server.log")).expect("a log");
        let mut command = self.disk.as_ref().map_or_else(|| Command::new(program), |disk| disk.command(program));
        command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(folder.join("data"));
        command.arg("--models-dir").arg(folder.join("models"));
        command.current_dir(folder).env_clear().envs(self.shim.environment());
        command.env("HOME", folder).env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
            .env("LORAD__WORKERS__LEASE_SECONDS", LEASE_SECONDS)
            .env("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")
            .env("LORAD__WORKERS__PAUSE_SECONDS", "10")
            .env("LORAD__WORKERS__EXECUTABLE", folder.join("worker"))
            .env("LORAD__MODELS__CACHE_DIR", folder.join("cache"))
            .env("HF_HUB_OFFLINE", "1")
            .env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.spawn().expect("a server")
    }

    /// Starts the server and waits until it listens. One that cannot start while storage fails is started again, as a service
    /// manager would.
    pub(crate) async fn start_server(&mut self) {
        let begin = Instant::now();
        loop {
            let before = self.log().len();
            let mut server = self.spawn_server();
            let address = loop {
                let log = self.log();
                let listening = log[before..].split_once("listening on http://");
                if let Some((address, _)) = listening.and_then(|(_, rest)| rest.split_once("/v1")) {
                    break Some(format!("http://{address}/v1"));
                }
                if server.try_wait().expect("a process of ours").is_some() {
                    break None;
                }
                assert!(begin.elapsed() < PATIENCE, "the server does not start");
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            if address.is_some() {
                self.server = Some(server);
                self.address.send_replace(address);
                return;
            }
            assert!(self.plan.storage_fails(), "the server cannot start");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// kill -9.
    fn kill_server(&mut self) {
        self.address.send_replace(None);
        if let Some(mut server) = self.server.take() {
            server.kill().expect("a process of ours");
            server.wait().expect("its end");
        }
    }

    /// SIGTERM; returns once it has ended.
    pub(crate) async fn stop_server(&mut self) -> ExitStatus {
        let mut server = self.server.take().expect("a running server");
        kill(Pid::from_raw(server.id().cast_signed()), Signal::SIGTERM).expect("a process of ours");
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = server.try_wait().expect("a process of ours") {
                break status;
            }
            assert!(begin.elapsed() < PATIENCE, "the server does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        self.address.send_replace(None);
        status
    }

    /// The process ids of its workers.
    pub(crate) fn workers(&self) -> Vec<Pid> {
        let scratch = self.folder.path().join("data/scratch");
        let processes = fs::read_dir("/proc").expect("a Linux").flatten();
        let workers = processes.filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let arguments = fs::read(entry.path().join("cmdline")).ok()?;
            let arguments = String::from_utf8_lossy(&arguments).into_owned();
            let (_, rest) = arguments.split_once("\0--scratch\0")?;
            Path::new(rest.split('\0').next()?).starts_with(&scratch).then(|| Pid::from_raw(pid))
        });
        workers.collect()
    }

    fn signal_workers(&self, signal: Signal) -> Vec<Pid> {
        let workers = self.workers();
        for worker in &workers {
            // One that has ended already needs no signal.
            let _ = kill(*worker, signal);
        }
        workers
    }

    /// A server that ended by itself is an error, whatever happens to it.
    pub(crate) fn tend(&mut self) {
        while let Some(ended) = self.effects.try_join_next() {
            ended.expect("an effect does not panic");
        }
        if let Some(server) = &mut self.server {
            let ended = server.try_wait().expect("a process of ours");
            assert!(ended.is_none(), "the server ended by itself: {ended:?}");
        }
    }

    /// Whether everything that was to end by itself has.
    pub(crate) fn is_calm(&self) -> bool {
        self.effects.is_empty()
    }

    /// Waits a moment for a worker to be there: what is to hit one should.
    async fn worker_is_there(&self) {
        let begin = Instant::now();
        while self.workers().is_empty() && begin.elapsed() < WORKER_PATIENCE {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Lets a fault happen. `jobs` are the ids of the plan's jobs, as they come.
    pub(crate) async fn strike(&mut self, fault: Fault, jobs: &[watch::Receiver<Option<String>>]) {
        if fault.is_for_workers() {
            self.worker_is_there().await;
        }
        match fault {
            Fault::KillWorker => {
                self.signal_workers(Signal::SIGKILL);
            }
            Fault::KillServer { away_ms } => self.replace_server(away_ms).await,
            Fault::KillBoth { away_ms } => {
                self.kill_server();
                self.signal_workers(Signal::SIGKILL);
                self.replace_server(away_ms).await;
            }
            Fault::Drain => {
                let status = self.stop_server().await;
                assert!(status.success() || self.plan.storage_fails(), "{status}");
                assert!(self.workers().is_empty(), "a server that stops takes its workers along");
                self.start_server().await;
            }
            Fault::HoldServer { for_ms } => {
                let server = self.server.as_ref().expect("a running server");
                let pid = Pid::from_raw(server.id().cast_signed());
                kill(pid, Signal::SIGSTOP).expect("a process of ours");
                tokio::time::sleep(Duration::from_millis(for_ms)).await;
                kill(pid, Signal::SIGCONT).expect("a process of ours");
            }
            Fault::HoldWorker { for_ms } => {
                let held = self.signal_workers(Signal::SIGSTOP);
                self.effects.spawn(async move {
                    tokio::time::sleep(Duration::from_millis(for_ms)).await;
                    for worker in held {
                        // It may have been killed for its silence.
                        let _ = kill(worker, Signal::SIGCONT);
                    }
                });
            }
            Fault::SlowStorage { targets, delay_ms, for_ms } => {
                self.set_for(for_ms, Control { targets, delay_ms, ..Control::default() });
            }
            Fault::StorageErrors { targets, one_in, for_ms } => {
                self.set_for(for_ms, Control { error: Errno::EIO as i32, one_in, targets, ..Control::default() });
            }
            Fault::FullDisk { for_ms } => self.fill_disk(for_ms),
            Fault::ClockJump { minutes } => {
                let mut control = self.control.lock().expect("no holder panics");
                control.clock_offset_ms += minutes * 60_000;
                self.shim.set(*control);
            }
            Fault::Pause { job, for_ms } => {
                let (api, id) = (self.api(), jobs[job].clone());
                self.effects.spawn(async move {
                    let id = known(id).await;
                    api.post(&format!("/fine_tuning/jobs/{id}/pause")).await;
                    tokio::time::sleep(Duration::from_millis(for_ms)).await;
                    api.post(&format!("/fine_tuning/jobs/{id}/resume")).await;
                });
            }
            Fault::Cancel { job } => {
                let (api, id, cancelled) = (self.api(), jobs[job].clone(), Arc::clone(&self.cancelled));
                self.effects.spawn(async move {
                    let id = known(id).await;
                    if api.post(&format!("/fine_tuning/jobs/{id}/cancel")).await {
                        cancelled.lock().expect("no holder panics").insert(job);
                    }
                });
            }
        }
    }

    async fn replace_server(&mut self, away_ms: u64) {
        self.kill_server();
        tokio::time::sleep(Duration::from_millis(away_ms)).await;
        self.start_server().await;
    }

    /// Storage is so for a while; the clock stays where it is.
    fn set_for(&mut self, for_ms: u64, fault: Control) {
        let (shim, control) = (Arc::clone(&self.shim), Arc::clone(&self.control));
        let set = move |fault: Control| {
            let mut control = control.lock().expect("no holder panics");
            *control = Control { clock_offset_ms: control.clock_offset_ms, ..fault };
            shim.set(*control);
        };
        set(fault);
        self.effects.spawn(async move {
            tokio::time::sleep(Duration::from_millis(for_ms)).await;
            set(Control::default());
        });
    }

    fn fill_disk(&mut self, for_ms: u64) {
        let Some(disk) = self.disk.clone() else {
            return self
                .set_for(for_ms, Control { error: Errno::ENOSPC as i32, targets: EVERYTHING, ..Control::default() });
        };
        disk.fill();
        self.effects.spawn(async move {
            tokio::time::sleep(Duration::from_millis(for_ms)).await;
            disk.empty();
        });
    }

    /// Nothing goes wrong any more, and the clock is right.
    pub(crate) fn heal(&self) {
        self.shim.set(Control::default());
    }
}

/// The id of a job once there is one.
async fn known(mut id: watch::Receiver<Option<String>>) -> String {
    let id = id.wait_for(Option::is_some).await.expect("the client of the job does not panic");
    id.clone().expect("it was waited for")
}
