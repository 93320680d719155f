//! A cancelled job frees its process, and with it the device, within seconds.

use std::time::{Duration, Instant};

use serde_json::json;

use super::support::{Home, poll, rows};

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_frees_its_device() {
    let home = Home::start(&[]).await;
    let file = home.upload(rows(40)).await;
    let long = home.create(&file, json!({"training": {"max_steps": 100_000, "save_steps": 100_000}})).await;
    assert!(home.trained_a_step(&long).await, "it is long");
    let next = home.create(&file, json!({"training": {"max_steps": 3}})).await;

    let worker = home.workers().pop().expect("a worker");
    let begin = Instant::now();
    let (status, job) = home.post(&format!("/fine_tuning/jobs/{long}/cancel"), &json!({})).await;
    assert_eq!((status, &job["status"]), (200, &json!("cancelled")), "{job}");
    poll("the end of the process", || home.workers().iter().all(|other| other.pid != worker.pid).then_some(())).await;
    // Much less than the lease: it was stopped, not given up.
    assert!(begin.elapsed() < Duration::from_secs(15), "it took {:?}", begin.elapsed());

    assert_eq!(home.finished(&next).await["status"], "succeeded");
    assert_eq!(home.job(&long).await["status"], "cancelled");
    let story = home.story(&long).await;
    assert!(story.last().expect("events").contains("cancelled"), "{story:?}");
}
