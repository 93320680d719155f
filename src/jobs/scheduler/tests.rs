//! Devices that are taken, freed and tried in turn, with real processes standing in for workers.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::jobs::cancel::cancel;
use crate::jobs::finish_attempt::MOST_ATTEMPTS_WITHOUT_PROGRESS;
use crate::jobs::testing;
use crate::types::DEFAULT_OWNER;
use crate::types::ids::JobId;

/// A scheduler of those devices, whose workers take their token and then say nothing until they are told to end.
fn scheduler(folder: &Path, jobs: &Jobs, devices: &[Device]) -> Scheduler {
    let worker = folder.join("worker");
    if !worker.exists() {
        // Written by a process of its own: one that is started elsewhere meanwhile would keep the file open, and it could not run.
        let script = format!(
            "printf '#!/bin/sh\\nread -r token\\nexec sleep 60\\n' >'{0}' && chmod 700 '{0}'",
            worker.display()
        );
        assert!(Command::new("sh").args(["-c", &script]).status().expect("a shell").success());
    }
    let mut config = Config::default();
    config.server.data_dir = folder.to_owned();
    config.workers.executable = Some(worker);
    let launcher = Launcher::new(&config, "unix:none".to_owned());
    Scheduler::new(&config, jobs.clone(), launcher, devices.to_vec())
}

/// What runs on which device.
async fn held(jobs: &Jobs) -> Vec<(String, TaskKind, JobId)> {
    let live = store::attempt::live(&mut jobs.store.read().await.expect("a connection")).await.expect("a list");
    let mut held: Vec<_> = live.into_iter().map(|attempt| (attempt.device, attempt.task, attempt.job_id)).collect();
    held.sort_by(|one, other| one.0.cmp(&other.0));
    held
}

fn trains(device: Device, job: JobId) -> (String, TaskKind, JobId) {
    (device.to_string(), TaskKind::Train, job)
}

/// Ticks until that is what runs.
async fn tick_until(scheduler: &mut Scheduler, jobs: &Jobs, wanted: &[(String, TaskKind, JobId)]) {
    let begin = Instant::now();
    loop {
        scheduler.tick().await.expect("a tick");
        let held = held(jobs).await;
        if held == wanted {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{held:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn each_device_trains_one_job_at_a_time() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let jobs = testing::jobs(folder.path()).await;
    let (first, second) = (testing::add_queued_job(&jobs).await, testing::add_queued_job(&jobs).await);
    let (third, fourth) = (testing::add_queued_job(&jobs).await, testing::add_queued_job(&jobs).await);
    let mut scheduler = scheduler(folder.path(), &jobs, &[Device::Cuda(0), Device::Cuda(1)]);
    for _ in 0..2 {
        scheduler.tick().await.expect("a tick");
        assert_eq!(held(&jobs).await, [trains(Device::Cuda(0), first), trains(Device::Cuda(1), second)]);
    }
    // The device of a job that is gone, and no other, goes to the next one.
    cancel(&jobs, DEFAULT_OWNER, second).await.expect("a job that trains");
    let expected = [trains(Device::Cuda(0), first), trains(Device::Cuda(1), third)];
    tick_until(&mut scheduler, &jobs, &expected).await;
    cancel(&jobs, DEFAULT_OWNER, first).await.expect("a job that trains");
    let expected = [trains(Device::Cuda(0), fourth), trains(Device::Cuda(1), third)];
    tick_until(&mut scheduler, &jobs, &expected).await;
    scheduler.stop_all().await.expect("no worker is left");
}

#[tokio::test]
async fn a_restarted_server_leaves_the_devices_of_its_old_workers_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let jobs = testing::jobs(folder.path()).await;
    let (first, second) = (testing::add_queued_job(&jobs).await, testing::add_queued_job(&jobs).await);
    let mut before = scheduler(folder.path(), &jobs, &[Device::Cuda(0), Device::Cuda(1)]);
    before.tick().await.expect("a tick");
    let (third, fourth) = (testing::add_queued_job(&jobs).await, testing::add_queued_job(&jobs).await);
    // It is told of other devices than its predecessor; what that one began on cuda:0 goes on there.
    let mut after = scheduler(folder.path(), &jobs, &[Device::Cuda(1), Device::Cuda(2)]);
    for _ in 0..2 {
        after.tick().await.expect("a tick");
        let expected =
            [trains(Device::Cuda(0), first), trains(Device::Cuda(1), second), trains(Device::Cuda(2), third)];
        assert_eq!(held(&jobs).await, expected);
    }
    cancel(&jobs, DEFAULT_OWNER, first).await.expect("a job that trains");
    cancel(&jobs, DEFAULT_OWNER, second).await.expect("a job that trains");
    // Whoever started a worker learns of its end: here that is the scheduler before.
    let expected = [trains(Device::Cuda(1), fourth), trains(Device::Cuda(2), third)];
    tick_until(&mut after, &jobs, &expected).await;
    after.stop_all().await.expect("no worker is left");
}

#[tokio::test]
async fn a_job_that_crashed_on_a_device_is_tried_on_another() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let jobs = testing::jobs(folder.path()).await;
    let crashes = testing::add_queued_job(&jobs).await;
    let mut scheduler = scheduler(folder.path(), &jobs, &[Device::Cuda(0), Device::Cuda(1)]);
    for device in [Device::Cuda(0), Device::Cuda(1), Device::Cuda(0)] {
        scheduler.paused_until = None;
        tick_until(&mut scheduler, &jobs, &[trains(device, crashes)]).await;
        let process = scheduler.watched.values().find_map(|watched| watched.process).expect("a worker");
        process.signal(Signal::SIGKILL);
        tick_until(&mut scheduler, &jobs, &[]).await;
    }
    assert_eq!(testing::state(&jobs, crashes).await.1.as_deref(), Some("worker_crashed"));
    // The other one has crashed less often.
    let next = testing::add_queued_job(&jobs).await;
    scheduler.paused_until = None;
    tick_until(&mut scheduler, &jobs, &[trains(Device::Cuda(1), next)]).await;
    scheduler.stop_all().await.expect("no worker is left");
}

#[tokio::test]
async fn an_export_keeps_a_training_from_the_cpu_and_not_from_a_gpu() {
    for (device, beside) in [(Device::Cpu, false), (Device::Cuda(0), true)] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let exports = [testing::add_export(&jobs).await, testing::add_export(&jobs).await];
        let waits = testing::add_queued_job(&jobs).await;
        let mut scheduler = scheduler(folder.path(), &jobs, &[device]);
        for _ in 0..2 {
            scheduler.tick().await.expect("a tick");
            let mut expected = vec![(Device::Cpu.to_string(), TaskKind::Export, exports[0])];
            expected.extend(beside.then(|| trains(device, waits)));
            assert_eq!(held(&jobs).await, expected);
        }
        scheduler.stop_all().await.expect("no worker is left");
    }
}

#[tokio::test]
async fn a_worker_that_cannot_be_started_is_not_held_against_its_job() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let jobs = testing::jobs(folder.path()).await;
    let mut config = Config::default();
    config.server.data_dir = folder.path().to_owned();
    // A file, so that no log can be made in it.
    std::fs::write(config.logs_dir(), "").expect("a file");
    let waiting = [testing::add_job(&jobs).await, testing::add_job(&jobs).await];
    let launcher = Launcher::new(&config, "unix:none".to_owned());
    let mut scheduler = Scheduler::new(&config, jobs.clone(), launcher, vec![Device::Cpu]);

    let mut pauses = Vec::new();
    for failed_starts in 1..=MOST_ATTEMPTS_WITHOUT_PROGRESS + 1 {
        scheduler.tick().await.expect("a tick");
        let pause = scheduler.paused_until.take().expect("a pause").saturating_duration_since(Instant::now());
        pauses.push(pause);
        scheduler.paused_until = Some(Instant::now() + LONGEST_PAUSE);
        scheduler.tick().await.expect("a tick that claims nothing");
        assert_eq!(i64::from(scheduler.setbacks), failed_starts);
        scheduler.paused_until = None;
    }
    assert!(pauses.is_sorted(), "{pauses:?}");
    for job in waiting {
        assert_eq!(testing::state(&jobs, job).await, ("validating_files".to_owned(), None));
    }
}
