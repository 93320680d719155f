//! kill -9 of the server, of both, and a clean stop: after a restart the job goes on, and no event is lost or doubled.

use serde_json::{Value, json};

use super::support::{Home, LEASE, poll, rows};

/// How often a fault is tried that came too late.
const TRIES: usize = 10;

fn run() -> Value {
    json!({"training": {"max_steps": 150, "save_steps": 20, "learning_rate": 0.01}, "lora": {"r": 4}})
}

/// What happens while a job trains.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// kill -9 of the server; it is back before the worker gives up.
    Server,
    /// kill -9 of the server; it is back after the worker gave up.
    ServerForLong,
    /// kill -9 of both.
    ServerAndWorker,
    /// SIGTERM of the server.
    CleanStop,
}

impl Fault {
    /// Attempts of the job, its validation among them.
    fn attempts(self) -> usize {
        match self {
            Self::Server => 2,
            Self::ServerForLong | Self::ServerAndWorker | Self::CleanStop => 3,
        }
    }

    /// Makes it happen; `false`: no worker was there any more.
    async fn strike(self, home: &mut Home) -> bool {
        if matches!(self, Self::CleanStop) {
            home.stop_server().await;
            assert_eq!(home.workers().len(), 0, "a server that stops takes its workers along");
            return true;
        }
        home.kill_server();
        // It may have been about to end.
        let outlived = home.workers().len() == 1;
        match self {
            Self::ServerAndWorker => home.kill_workers(),
            Self::ServerForLong => {
                poll("the end of the worker's lease", || home.workers().is_empty().then_some(())).await;
            }
            Self::Server | Self::CleanStop => {}
        }
        outlived
    }
}

/// Lets the faults happen, each to a job of its own, which must end as one that nothing happens to.
async fn change_nothing(mut home: Home, faults: &[Fault]) {
    let file = home.upload(rows(40)).await;
    let undisturbed = home.create(&file, run()).await;
    let job = home.finished(&undisturbed).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let (story, artifacts) = (home.story(&undisturbed).await, home.artifacts(&undisturbed).await);

    for fault in faults {
        let mut tries = 0;
        loop {
            tries += 1;
            assert!(tries <= TRIES, "{fault:?} always came too late");
            let before = home.attempts();
            let id = home.create(&file, run()).await;
            let mut hit = home.trained_a_step(&id).await;
            if hit {
                hit = fault.strike(&mut home).await;
                home.start_server().await;
            }
            let job = home.finished(&id).await;
            assert_eq!(job["status"], "succeeded", "{fault:?}: {job}");
            assert_eq!(home.story(&id).await, story, "{fault:?}");
            assert_eq!(home.artifacts(&id).await, artifacts, "{fault:?}");
            let attempts = home.attempts() - before;
            assert!(attempts <= fault.attempts(), "{fault:?}: {attempts} attempts");
            // Fewer: the job was done before anything happened to it.
            if hit && attempts == fault.attempts() {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_goes_on_and_changes_nothing() {
    let home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    change_nothing(home, &[Fault::Server, Fault::ServerAndWorker, Fault::CleanStop]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_late_goes_on_and_changes_nothing() {
    let home = Home::start(&[(LEASE, "8"), ("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    change_nothing(home, &[Fault::ServerForLong]).await;
}
