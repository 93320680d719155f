//! Wall clocks that jump kill nobody; a worker that lives and gets nothing done is replaced.

use std::time::{Duration, Instant};

use serde_json::json;

use super::shim::{Control, SCRATCH};
use super::support::{Home, poll, rows};

/// How long a scheduler that takes a jump for silence may take to show it: several of its ticks.
const SEVERAL_TICKS: Duration = Duration::from_millis(2500);

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_kills_no_worker() {
    const HOUR_MS: i64 = 3_600_000;
    let home = Home::start_with_shim(&[("LORAD__WORKERS__STALL_SECONDS", "10")]).await;
    let file = home.upload(rows(40)).await;
    let id = home.create(&file, json!({"training": {"max_steps": 100_000, "save_steps": 100_000}})).await;
    assert!(home.trained_a_step(&id).await, "it is long");
    let worker = home.workers()[0].pid;
    for clock_offset_ms in [2 * HOUR_MS, -HOUR_MS, 0] {
        home.shim().set(Control { clock_offset_ms, ..Control::default() });
        let begin = Instant::now();
        poll("several ticks", || (begin.elapsed() > SEVERAL_TICKS).then_some(())).await;
        let workers: Vec<i32> = home.workers().iter().map(|worker| worker.pid).collect();
        assert_eq!(workers, [worker], "after a jump to {clock_offset_ms} ms");
    }
    assert_eq!(home.attempts(), 2, "a validation and a training");
    let (status, cancelled) = home.post(&format!("/fine_tuning/jobs/{id}/cancel"), &json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")), "{cancelled}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_is_replaced_and_changes_nothing() {
    let settings = [("LORAD__WORKERS__STALL_SECONDS", "10"), ("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")];
    let home = Home::start_with_shim(&settings).await;
    let file = home.upload(rows(40)).await;
    let run = json!({"training": {"max_steps": 150, "save_steps": 20, "learning_rate": 0.01}, "lora": {"r": 4}});
    let undisturbed = home.create(&file, run.clone()).await;
    assert_eq!(home.finished(&undisturbed).await["status"], "succeeded");
    let (story, artifacts) = (home.story(&undisturbed).await, home.artifacts(&undisturbed).await);

    let id = home.create(&file, run).await;
    assert!(home.trained_a_step(&id).await, "it is long");
    // Its checkpoints take for ever, while its heartbeats go on.
    home.shim().set(Control { delay_ms: i32::MAX, targets: SCRATCH, ..Control::default() });
    poll("the end of the worker", || home.log().contains("no progress for 10 s").then_some(())).await;
    home.shim().set(Control::default());
    assert_eq!(home.finished(&id).await["status"], "succeeded");
    assert_eq!(home.story(&id).await, story);
    assert_eq!(home.artifacts(&id).await, artifacts);
    assert!(!home.log().contains("no heartbeat"), "it was heard all the time");
}
