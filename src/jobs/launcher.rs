//! Worker processes of this machine: start them, tell whether they live, signal them, read their logs.
//!
//! A worker leads a process group of its own, so that a signal reaches whatever it started; its token comes on stdin, so
//! that no process list shows it; its environment is empty but for `PASSED_ON`. It learns its token only after its process
//! id is in the database: should the server die between the two, the worker finds no token and exits.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use anyhow::Context;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use secrecy::{ExposeSecret, SecretString};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};

use crate::LOG_FORMAT;
use crate::config::Config;
use crate::types::ids::AttemptId;

/// The program that runs.
pub(super) const THIS_PROGRAM: &str = "/proc/self/exe";

/// Variables of the server's environment that a worker sees: where programs, the home and temporary folders are, how to
/// speak, how much to log, how to reach a model hub; and of CUDA where its libraries are, which cards there are and how they are
/// counted, where kernels that a driver translates are kept, who shares a card, and that launches are to be waited for, which finds faults.
const PASSED_ON: [&str; 31] = [
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "TZ",
    "RUST_LOG",
    LOG_FORMAT,
    "RUST_BACKTRACE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_CACHE_PATH",
    "CUDA_CACHE_DISABLE",
    "CUDA_CACHE_MAXSIZE",
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_LAUNCH_BLOCKING",
];

/// How the names of the folders of inspections begin.
const INSPECTION_PREFIX: &str = "inspection-";
/// Bytes at the end of a log in which [`Launcher::last_log_lines`] looks.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// Starts workers of this machine.
#[derive(Debug, Clone)]
pub struct Launcher {
    executable: PathBuf,
    server: String,
    models_dir: PathBuf,
    cache_dir: PathBuf,
    logs_dir: PathBuf,
    scratch_dir: PathBuf,
    threads: u32,
}

/// What tells a process from every other that ever had its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Process id, also that of the process group.
    pub pid: i32,
    /// Start time in clock ticks since boot, as the kernel tells it.
    pub start_time: i64,
}

/// A worker that waits for its token.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    stdin: ChildStdin,
    /// Its process.
    pub identity: ProcessIdentity,
}

impl Launcher {
    /// A launcher of workers that call `server` (`unix:PATH` or `http://…`).
    pub fn new(config: &Config, server: String) -> Self {
        Self {
            executable: config.workers.executable.clone().unwrap_or_else(|| PathBuf::from(THIS_PROGRAM)),
            server,
            models_dir: config.models_dir(),
            cache_dir: config.cache_dir(),
            logs_dir: config.logs_dir(),
            scratch_dir: config.scratch_dir(),
            threads: config.workers.threads,
        }
    }

    /// Starts a worker; it does nothing before [`Launched::hand_over`].
    ///
    /// # Errors
    /// A folder, a log or a process that the operating system refuses to make.
    pub fn start(&self, attempt: AttemptId) -> anyhow::Result<Launched> {
        let scratch = self.scratch_of(attempt);
        private_folder(&self.logs_dir)?;
        private_folder(&scratch)?;
        let log = self.log_path(attempt);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log)
            .with_context(|| format!("cannot open the log {}", log.display()))?;
        let mut command = self.command("worker", &scratch);
        command
            .arg("--server")
            .arg(&self.server)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().context("cannot share the log")?)
            .stderr(log);
        let mut child =
            command.spawn().with_context(|| format!("cannot start a worker from {}", self.executable.display()))?;
        let stdin = child.stdin.take().context("a worker has no stdin")?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).context("a worker has no process id")?;
        let (start_time, _) = read_stat(pid).context("a worker ended before it was told what to do")?;
        Ok(Launched { child, stdin, identity: ProcessIdentity { pid, start_time } })
    }

    /// A process of this program in that role, a process group of its own, with no more of the server's environment than it needs.
    pub(super) fn command(&self, role: &str, scratch: &Path) -> Command {
        let mut command = Command::new(&self.executable);
        command
            .arg(role)
            .arg("--scratch")
            .arg(scratch)
            .arg("--models-dir")
            .arg(&self.models_dir)
            .arg("--cache-dir")
            .arg(&self.cache_dir)
            .env_clear()
            .envs(passed_on())
            .process_group(0);
        if self.threads > 0 {
            command.env("RAYON_NUM_THREADS", self.threads.to_string());
        }
        command
    }

    /// A folder for the files of one inspection, which goes with its handle.
    ///
    /// # Errors
    /// A folder that the operating system refuses to make.
    pub(super) fn inspection_folder(&self) -> anyhow::Result<TempDir> {
        private_folder(&self.scratch_dir)?;
        tempfile::Builder::new()
            .prefix(INSPECTION_PREFIX)
            .tempdir_in(&self.scratch_dir)
            .with_context(|| format!("cannot make a folder in {}", self.scratch_dir.display()))
    }

    /// The last lines of an attempt's log, for the reason of a failure.
    pub fn last_log_lines(&self, attempt: AttemptId, lines: usize) -> String {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut log = File::open(self.log_path(attempt))?;
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut tail = Vec::new();
            log.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
            Ok(tail)
        };
        // A log that is not there has no lines.
        let tail = read().unwrap_or_default();
        let tail = String::from_utf8_lossy(&tail);
        let all: Vec<&str> = tail.lines().filter(|line| !line.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Removes what an attempt whose process is gone left in its scratch folder.
    pub fn clean_up(&self, attempt: AttemptId) {
        remove_folder(&self.scratch_of(attempt));
    }

    /// Removes the scratch folders of all attempts but those in `keep`, and those of inspections: what a server that was killed
    /// left behind.
    pub fn clean_up_all_but(&self, keep: &[AttemptId]) {
        // A folder that is not there has nothing to clean.
        let Ok(folders) = fs::read_dir(&self.scratch_dir) else { return };
        for folder in folders.flatten() {
            if folder.file_name().to_string_lossy().starts_with(INSPECTION_PREFIX) {
                remove_folder(&folder.path());
            }
            let attempt = folder.file_name().to_str().and_then(|name| name.parse::<AttemptId>().ok());
            if let Some(attempt) = attempt.filter(|attempt| !keep.contains(attempt)) {
                self.clean_up(attempt);
            }
        }
    }

    /// The attempts whose logs there are.
    pub fn logs(&self) -> Vec<AttemptId> {
        // A folder that is not there has no logs.
        let Ok(logs) = fs::read_dir(&self.logs_dir) else { return Vec::new() };
        let attempt = |name: &str| name.strip_suffix(".log")?.parse().ok();
        logs.flatten().filter_map(|log| log.file_name().to_str().and_then(attempt)).collect()
    }

    /// Removes the log of an attempt.
    pub fn remove_log(&self, attempt: AttemptId) {
        let log = self.log_path(attempt);
        if let Err(error) = fs::remove_file(&log) {
            tracing::warn!(log = %log.display(), %error, "cannot remove a log");
        }
    }

    /// The log of an attempt.
    pub fn log_path(&self, attempt: AttemptId) -> PathBuf {
        log_path(&self.logs_dir, attempt)
    }

    fn scratch_of(&self, attempt: AttemptId) -> PathBuf {
        self.scratch_dir.join(attempt.to_string())
    }
}

impl Launched {
    /// Hands the worker its token, which sets it going, and returns its process to wait for. One that is gone already does
    /// not take the token, and its exit status says why.
    pub async fn hand_over(mut self, token: &SecretString) -> Child {
        let line = format!("{}\n", token.expose_secret());
        if let Err(error) = self.stdin.write_all(line.as_bytes()).await {
            tracing::warn!(pid = self.identity.pid, %error, "a worker does not take its token");
        }
        self.child
    }
}

impl ProcessIdentity {
    /// Whether this very process still runs; one that ended and was not waited for does not.
    pub fn is_alive(self) -> bool {
        read_stat(self.pid).is_some_and(|(start_time, ended)| start_time == self.start_time && !ended)
    }

    /// Signals the process group, if it is still that of this process.
    pub fn signal(self, signal: Signal) {
        if !self.is_alive() {
            return;
        }
        if let Err(error) = killpg(Pid::from_raw(self.pid), signal) {
            tracing::debug!(pid = self.pid, %signal, %error, "a process ended before its signal");
        }
    }
}

/// What a process of ours sees of the server's environment.
pub(super) fn passed_on() -> impl Iterator<Item = (&'static str, OsString)> {
    PASSED_ON.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)))
}

/// Where in the folder of logs that of an attempt is.
pub fn log_path(logs_dir: &Path, attempt: AttemptId) -> PathBuf {
    logs_dir.join(format!("{attempt}.log"))
}

/// How a worker ended, in words.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("signal {signal}"),
            Err(_) => format!("signal {signal}"),
        },
        (None, None) => "an unknown status".to_owned(),
    }
}

/// Start time of a process, and whether it has ended and only waits to be reaped; `None`: there is no such process.
fn read_stat(pid: i32) -> Option<(i64, bool)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The fields after the command's name, which is in parentheses and may hold any character: the state is the first of them,
/// the start time the 20th.
fn parse_stat(stat: &str) -> Option<(i64, bool)> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X" | "x");
    Some((fields.nth(18)?.parse().ok()?, ended))
}

fn remove_folder(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(folder = %path.display(), %error, "cannot remove a scratch folder");
        }
        _ => (),
    }
}

fn private_folder(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the folder {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_cannot_forge_its_stat() {
        let stat = "7 (a) Z 1) S 1 7 7 0 -1 4194560 2 0 0 0 0 0 0 0 20 0 1 0 123456 1 1 1";
        assert_eq!(parse_stat(stat), Some((123_456, false)));
        assert_eq!(parse_stat(&stat.replace(") S", ") Z")), Some((123_456, true)));
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[tokio::test]
    async fn only_the_very_process_is_alive() {
        let mut child = Command::new("sleep").arg("600").process_group(0).spawn().expect("a process");
        let pid = child.id().expect("a process id").cast_signed();
        let (start_time, _) = read_stat(pid).expect("a process");
        let process = ProcessIdentity { pid, start_time };
        let other = ProcessIdentity { start_time: start_time + 1, ..process };
        assert!(process.is_alive() && !other.is_alive());
        other.signal(Signal::SIGKILL);
        assert!(process.is_alive());
        process.signal(Signal::SIGKILL);
        assert_eq!(describe(child.wait().await.expect("its end")), "signal SIGKILL");
        assert!(!process.is_alive());
    }
}
