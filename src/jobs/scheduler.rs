//! The scheduler: watches the attempts that run, ends those whose process is gone, and claims jobs for free devices.
//!
//! `Scheduler::tick` reads what is to do from the database and may run at any time and twice; everything that wakes it only
//! saves waiting. What is kept in memory is about processes: which of them live, since when one was told to stop, and for how
//! long nothing was heard of it. Silence is measured by the clock that does not jump, from when this server first saw the
//! attempt, and without the time in which this server itself did not run: neither a wall clock that is set nor a machine that
//! was asleep makes a worker look dead.
//!
//! An attempt that an earlier server of this data folder left behind is adopted: its worker may still run, keep its lease
//! and finish. If it does not run, it ended with that server, which is not held against the job.

use std::collections::{HashMap, HashSet};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::claim::{Claimed, claim};
use super::finish_attempt::attempt_lost;
use super::launcher::{self, Launcher, ProcessIdentity};
use super::{Jobs, Result};
use crate::config::Config;
use crate::store;
use crate::types::attempt::{Attempt, AttemptOutcome, AttemptState, TaskKind};
use crate::types::device::Device;
use crate::types::ids::AttemptId;

/// Time between two ticks that nothing woke.
const INTERVAL: Duration = Duration::from_millis(500);
/// Longest time between two ticks of a server that runs; what is beyond it, it did not run.
const LATE: Duration = Duration::from_secs(2);
/// Time that a process has to end after SIGTERM, before SIGKILL.
const GRACE: Duration = Duration::from_secs(3);
/// Time that a worker has to exit after its last word.
const GOODBYE: Duration = Duration::from_secs(5);
/// Longest time without a new attempt after one that could not be started.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Longest time without a new attempt after one that crashed: what one job does must not keep the others waiting for long.
const LONGEST_PAUSE_AFTER_CRASH: Duration = Duration::from_secs(8);
/// Lines of a worker's log that a failure quotes.
const LOG_LINES: usize = 10;

/// How a process that was waited for ended.
type Exit = std::result::Result<(AttemptId, std::io::Result<ExitStatus>), tokio::task::JoinError>;

/// Watches attempts and claims jobs.
#[derive(Debug)]
pub struct Scheduler {
    jobs: Jobs,
    launcher: Launcher,
    lease: Duration,
    stall: Duration,
    pause: Duration,
    validations: usize,
    /// What trainings run on, one at a time each; the first that is free gets the next one.
    devices: Vec<Device>,
    /// How many attempts in a row crashed on a device: a card that fails must not take every job that comes while others are free.
    crashes: HashMap<String, u32>,
    last_tick: Instant,
    watched: HashMap<AttemptId, Watched>,
    exits: JoinSet<(AttemptId, std::io::Result<ExitStatus>)>,
    /// Attempts in a row that could not be started, or crashed.
    setbacks: u32,
    /// Until when none is tried after such a one: a disk that is full for a moment must not cost a job all its attempts.
    paused_until: Option<Instant>,
}

/// A worker process, from its attempt's claim until it is gone.
#[derive(Debug)]
struct Watched {
    task: TaskKind,
    /// The name of the device that it holds; a validation holds none.
    device: String,
    process: Option<ProcessIdentity>,
    /// Whether this server started it, and so learns how it ends.
    own: bool,
    /// The lease's end as it was last seen; another one tells that the worker was heard.
    lease_ms: i64,
    /// When the worker was last heard, or first seen.
    heard_at: Instant,
    /// Whether it has found this server.
    was_heard: bool,
    /// The time of its progress as it was last seen; another one tells that it got on.
    progress_ms: i64,
    /// When it last got on, or was first seen.
    progress_at: Instant,
    /// How it ended, in words.
    exit: Option<String>,
    /// When it was first seen to be told to end its step.
    pausing_since: Option<Instant>,
    /// When it was told to stop.
    stopping_since: Option<Instant>,
    /// When its attempt was first seen to have ended while it still ran.
    ended_since: Option<Instant>,
    /// Why it was killed, where it was not asked for.
    killed_because: Option<String>,
    /// Whether it ended without a word, through no wish of the server's.
    crashed: bool,
}

impl Watched {
    fn adopted(attempt: &Attempt) -> Self {
        let process = match (attempt.pid.and_then(|pid| i32::try_from(pid).ok()), attempt.process_start_time) {
            (Some(pid), Some(start_time)) => Some(ProcessIdentity { pid, start_time }),
            _ => None,
        };
        Self::new(attempt, process, false)
    }

    fn new(attempt: &Attempt, process: Option<ProcessIdentity>, own: bool) -> Self {
        let now = Instant::now();
        Self {
            task: attempt.task,
            device: attempt.device.clone(),
            process,
            own,
            lease_ms: attempt.lease_expires_at_ms,
            heard_at: now,
            was_heard: false,
            progress_ms: attempt.progress_at_ms,
            progress_at: now,
            exit: None,
            pausing_since: None,
            stopping_since: None,
            ended_since: None,
            killed_because: None,
            crashed: false,
        }
    }

    /// Takes note of what the attempt's row tells of the worker.
    fn look(&mut self, attempt: &Attempt) {
        if self.lease_ms != attempt.lease_expires_at_ms {
            (self.lease_ms, self.heard_at, self.was_heard) = (attempt.lease_expires_at_ms, Instant::now(), true);
        }
        if self.progress_ms != attempt.progress_at_ms {
            (self.progress_ms, self.progress_at) = (attempt.progress_at_ms, Instant::now());
        }
    }

    fn is_alive(&self) -> bool {
        // An own process is gone when it was waited for, so that its exit status is known.
        if self.own { self.exit.is_none() } else { self.process.is_some_and(ProcessIdentity::is_alive) }
    }

    /// SIGTERM at first, SIGKILL once the grace is over.
    fn stop(&mut self) {
        let Some(process) = self.process else { return };
        match self.stopping_since {
            None => {
                process.signal(Signal::SIGTERM);
                self.stopping_since = Some(Instant::now());
            }
            Some(since) if since.elapsed() >= GRACE => process.signal(Signal::SIGKILL),
            Some(_) => (),
        }
    }

    fn kill(&mut self, because: String) {
        if let Some(process) = self.process {
            process.signal(Signal::SIGKILL);
        }
        self.killed_because = Some(because);
    }

    fn describe_end(&self) -> String {
        match (&self.killed_because, &self.exit) {
            (Some(because), _) => because.clone(),
            (None, Some(exit)) => exit.clone(),
            (None, None) => "an unknown status".to_owned(),
        }
    }
}

impl Scheduler {
    /// A scheduler of trainings on those devices; it does nothing before [`Scheduler::run`].
    pub fn new(config: &Config, jobs: Jobs, launcher: Launcher, devices: Vec<Device>) -> Self {
        Self {
            jobs,
            launcher,
            lease: config.workers.lease(),
            stall: config.workers.stall(),
            pause: config.workers.pause(),
            validations: config.limits.validations as usize,
            devices,
            crashes: HashMap::new(),
            last_tick: Instant::now(),
            watched: HashMap::new(),
            exits: JoinSet::new(),
            setbacks: 0,
            paused_until: None,
        }
    }

    /// Ticks until `shutdown`, then stops every worker, trainings after the step that they are at.
    ///
    /// # Errors
    /// The database failed while the workers were stopped; errors before that are logged and tried again.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<()> {
        self.clean_up_what_was_left().await?;
        let news = self.jobs.clone();
        while !shutdown.is_cancelled() {
            if let Err(error) = self.tick().await {
                tracing::error!(%error, "the scheduler failed, trying again");
            }
            tokio::select! {
                () = shutdown.cancelled() => (),
                () = news.scheduler_news() => (),
                () = tokio::time::sleep(INTERVAL) => (),
                Some(exit) = self.exits.join_next() => self.note_exit(exit),
            }
        }
        self.pause_all().await?;
        self.stop_all().await
    }

    /// Does everything that is to do now.
    async fn tick(&mut self) -> Result<()> {
        while let Some(exit) = self.exits.try_join_next() {
            self.note_exit(exit);
        }
        self.forgive_own_absence();
        let live = store::attempt::live(&mut *self.jobs.store.read().await?).await?;
        let mut living = HashSet::new();
        for attempt in &live {
            let lives = self.watch(attempt).await.unwrap_or_else(|error| {
                tracing::error!(attempt = %attempt.id, %error, "an attempt cannot be looked after, trying again");
                true
            });
            if lives {
                living.insert(attempt.id);
            }
        }
        self.release(&living).await?;
        while self.validating() < self.validations {
            if !self.claim_and_start(TaskKind::Validate, Device::Cpu).await? {
                break;
            }
        }
        // An export computes on the CPU. It is short, and somebody waits for it: there it goes before the next training.
        if self.is_free(Device::Cpu) {
            self.claim_and_start(TaskKind::Export, Device::Cpu).await?;
        }
        for device in self.free_devices() {
            if !self.claim_and_start(TaskKind::Train, device).await? {
                break;
            }
        }
        Ok(())
    }

    /// Time in which this server did not run, so that no worker could be heard, is no silence.
    fn forgive_own_absence(&mut self) {
        let absence = self.last_tick.elapsed().saturating_sub(LATE);
        self.last_tick = Instant::now();
        for watched in self.watched.values_mut() {
            watched.heard_at += absence;
            watched.progress_at += absence;
        }
    }

    /// Looks after one attempt that has not ended; `false`: it has now.
    async fn watch(&mut self, attempt: &Attempt) -> Result<bool> {
        let watched = self.watched.entry(attempt.id).or_insert_with(|| Watched::adopted(attempt));
        watched.look(attempt);
        if !watched.is_alive() {
            let counts = watched.own || watched.was_heard;
            let outcome = match attempt.state {
                AttemptState::Pausing | AttemptState::Stopping => AttemptOutcome::Stopped,
                AttemptState::Starting | AttemptState::Running | AttemptState::Ended if counts => {
                    AttemptOutcome::Crashed
                }
                AttemptState::Starting | AttemptState::Running | AttemptState::Ended => AttemptOutcome::ServerEnded,
            };
            let reason = watched.describe_end();
            let crashed = outcome == AttemptOutcome::Crashed;
            watched.crashed = crashed;
            self.lose(attempt, outcome, reason).await?;
            if crashed {
                self.set_back(LONGEST_PAUSE_AFTER_CRASH);
                *self.crashes.entry(attempt.device.clone()).or_default() += 1;
            }
            return Ok(false);
        }
        let standing_still = watched.progress_at.elapsed();
        let too_slow = |since: Instant| since.elapsed() > self.pause;
        let pausing =
            attempt.state == AttemptState::Pausing && too_slow(*watched.pausing_since.get_or_insert_with(Instant::now));
        if attempt.state == AttemptState::Stopping || pausing {
            watched.stop();
        } else if watched.heard_at.elapsed() > self.lease {
            watched.kill(format!("no heartbeat for {} s", self.lease.as_secs()));
        } else if standing_still > self.stall {
            watched.kill(format!("no progress for {} s", standing_still.as_secs()));
        }
        Ok(true)
    }

    /// Frees the devices of processes that are gone, and presses those whose attempt has ended to go.
    async fn release(&mut self, living: &HashSet<AttemptId>) -> Result<()> {
        let mut gone = Vec::new();
        for (attempt, watched) in self.watched.iter_mut().filter(|(attempt, _)| !living.contains(attempt)) {
            if !watched.is_alive() {
                gone.push(*attempt);
            } else if watched.ended_since.get_or_insert_with(Instant::now).elapsed() > GOODBYE {
                watched.stop();
            }
        }
        for attempt in gone {
            let launcher = self.launcher.clone();
            spawn_blocking(move || launcher.clean_up(attempt)).await?;
            if let Some(watched) = self.watched.remove(&attempt).filter(|watched| !watched.crashed) {
                self.setbacks = 0;
                self.crashes.remove(&watched.device);
            }
        }
        Ok(())
    }

    fn validating(&self) -> usize {
        self.watched.values().filter(|watched| watched.task == TaskKind::Validate).count()
    }

    /// Whether no training and no export holds the device. One that another server of this data folder started counts too, also where
    /// trainings of this one do not run on it.
    fn is_free(&self, device: Device) -> bool {
        let name = device.to_string();
        !self.watched.values().any(|watched| watched.task != TaskKind::Validate && watched.device == name)
    }

    /// The devices that the next trainings get, in that order.
    fn free_devices(&self) -> Vec<Device> {
        let mut free: Vec<Device> = self.devices.iter().copied().filter(|&device| self.is_free(device)).collect();
        free.sort_by_key(|device| self.crashes.get(&device.to_string()).copied().unwrap_or_default());
        free
    }

    /// Claims the next job and starts its worker; `false`: there was none, or no worker can be started now.
    async fn claim_and_start(&mut self, task: TaskKind, device: Device) -> Result<bool> {
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            return Ok(false);
        }
        let Some(claimed) = claim(&self.jobs, task, device, self.lease).await? else { return Ok(false) };
        let attempt = claimed.attempt.clone();
        let Err(error) = self.start(claimed).await else { return Ok(true) };
        // This machine refuses (no process, no file to be had), which is no fault of the job's and may pass.
        let pause = self.set_back(LONGEST_PAUSE);
        tracing::error!(attempt = %attempt.id, ?pause, "cannot start a worker, trying again: {error:#}");
        attempt_lost(&self.jobs, attempt.id, AttemptOutcome::NotStarted, "the worker could not be started").await?;
        let launcher = self.launcher.clone();
        spawn_blocking(move || launcher.clean_up(attempt.id)).await?;
        Ok(false)
    }

    /// No attempt is made for a while, longer each time that it comes to this in a row.
    fn set_back(&mut self, longest: Duration) -> Duration {
        let pause = Duration::from_secs(1 << self.setbacks.min(6)).min(longest);
        self.setbacks += 1;
        self.paused_until = Some(Instant::now() + pause);
        pause
    }

    async fn start(&mut self, claimed: Claimed) -> anyhow::Result<()> {
        let Claimed { attempt, token, .. } = claimed;
        let launcher = self.launcher.clone();
        let launched = spawn_blocking(move || launcher.start(attempt.id)).await??;
        let process = launched.identity;
        let mut tx = self.jobs.store.begin_write().await?;
        store::attempt::set_process(&mut tx, attempt.id, process.pid.into(), process.start_time).await?;
        tx.commit().await?;
        let mut child = launched.hand_over(&token).await;
        self.watched.insert(attempt.id, Watched::new(&attempt, Some(process), true));
        self.exits.spawn(async move { (attempt.id, child.wait().await) });
        Ok(())
    }

    fn note_exit(&mut self, exit: Exit) {
        let (attempt, status) = exit.expect("waiting for a process does not panic");
        let words = match status {
            Ok(status) => launcher::describe(status),
            Err(error) => format!("an unknown status ({error})"),
        };
        if let Some(watched) = self.watched.get_mut(&attempt) {
            watched.exit = Some(words);
        }
    }

    /// Ends an attempt whose process is gone.
    async fn lose(&self, attempt: &Attempt, outcome: AttemptOutcome, mut reason: String) -> Result<()> {
        tracing::info!(job.id = %attempt.job_id, attempt = %attempt.id, reason, "worker gone");
        if outcome == AttemptOutcome::Crashed {
            let (launcher, id) = (self.launcher.clone(), attempt.id);
            let log = spawn_blocking(move || launcher.last_log_lines(id, LOG_LINES)).await?;
            if !log.is_empty() {
                reason = format!("{reason}; its log ends with:\n{log}");
            }
        }
        attempt_lost(&self.jobs, attempt.id, outcome, &reason).await?;
        Ok(())
    }

    /// Folders of attempts that a killed server left behind.
    async fn clean_up_what_was_left(&self) -> Result<()> {
        let live = store::attempt::live(&mut *self.jobs.store.read().await?).await?;
        let keep: Vec<AttemptId> = live.iter().map(|attempt| attempt.id).collect();
        let launcher = self.launcher.clone();
        Ok(spawn_blocking(move || launcher.clean_up_all_but(&keep)).await?)
    }

    /// Lets every training end its step and hand in a checkpoint, for as long as a pause may take; the others are stopped.
    async fn pause_all(&mut self) -> Result<()> {
        let mut tx = self.jobs.store.begin_write().await?;
        store::attempt::set_pausing(&mut tx, None).await?;
        tx.commit().await?;
        let began = Instant::now();
        let trains = |watched: &Watched| watched.task == TaskKind::Train && watched.is_alive();
        while began.elapsed() < self.pause && self.watched.values().any(trains) {
            for watched in self.watched.values_mut().filter(|watched| watched.task != TaskKind::Train) {
                watched.stop();
            }
            tokio::select! {
                Some(exit) = self.exits.join_next() => self.note_exit(exit),
                () = tokio::time::sleep(INTERVAL) => (),
            }
        }
        Ok(())
    }

    /// Stops every worker; their attempts ended because the server did.
    async fn stop_all(mut self) -> Result<()> {
        while self.watched.values().any(Watched::is_alive) {
            for watched in self.watched.values_mut().filter(|watched| watched.is_alive()) {
                watched.stop();
            }
            tokio::select! {
                Some(exit) = self.exits.join_next() => self.note_exit(exit),
                () = tokio::time::sleep(INTERVAL) => (),
            }
        }
        let live = store::attempt::live(&mut *self.jobs.store.read().await?).await?;
        for attempt in live.iter().filter(|attempt| self.watched.contains_key(&attempt.id)) {
            let outcome = match attempt.state {
                AttemptState::Stopping => AttemptOutcome::Stopped,
                AttemptState::Starting | AttemptState::Running | AttemptState::Pausing | AttemptState::Ended => {
                    AttemptOutcome::ServerEnded
                }
            };
            self.lose(attempt, outcome, "the server ends".to_owned()).await?;
        }
        self.release(&HashSet::new()).await
    }
}

#[cfg(test)]
mod tests;
