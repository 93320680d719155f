//! kill -9 of the worker at every phase: the job goes on by itself and ends as if nothing had happened.

use serde_json::{Value, json};

use super::support::{Home, LEASE, Worker, poll, rows};

/// How often a fault is tried that came too late.
const TRIES: usize = 10;

/// Enough steps that one can be hit, and checkpoints all the way.
fn run() -> Value {
    json!({
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 12}}},
        "lora": {"r": 4}, "training": {"learning_rate": 0.01},
        "artifacts": [{"type": "adapter"}, {"type": "gguf"}, {"type": "gguf_lora"}, {"type": "merged"}, {"type": "ollama"}],
    })
}

/// A moment in a worker's life, told by what is in its scratch folder.
struct Phase {
    name: &'static str,
    /// Workers of the job before this one: 0 for the validation, 1 for the first training.
    workers_before: usize,
    is_now: fn(&Worker) -> bool,
}

const PHASES: [Phase; 5] = [
    Phase { name: "validation", workers_before: 0, is_now: |_| true },
    Phase { name: "loading", workers_before: 1, is_now: |worker| worker.has("training_file") },
    Phase { name: "a step", workers_before: 1, is_now: |_| true },
    Phase {
        name: "a checkpoint write",
        workers_before: 1,
        is_now: |worker| worker.has("checkpoint-") || worker.has(".tmp"),
    },
    Phase { name: "export", workers_before: 1, is_now: |worker| worker.has("export") || worker.has(".lorad-export") },
];

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_replaced_and_changes_nothing() {
    let home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    let file = home.upload(rows(40)).await;
    let undisturbed = home.create(&file, run()).await;
    let job = home.finished(&undisturbed).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let (story, artifacts) = (home.story(&undisturbed).await, home.artifacts(&undisturbed).await);
    let kinds: Vec<&str> = artifacts.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["adapter", "gguf", "gguf_lora", "merged", "ollama"]);
    let list = home.get(&format!("/fine_tuning/jobs/{undisturbed}/artifacts")).await;
    for artifact in list["data"].as_array().expect("a list") {
        let agreement = artifact["parity"]["greedy_agreement"].as_f64().expect("a certificate");
        assert!(agreement > 0.8, "{artifact}");
    }

    for phase in PHASES {
        let mut tries = 0;
        loop {
            tries += 1;
            assert!(tries <= TRIES, "{} could not be hit", phase.name);
            let before = home.attempts();
            let id = home.create(&file, run()).await;
            let hit = kill_in(&home, &id, &phase, before).await;
            let job = home.finished(&id).await;
            assert_eq!(job["status"], "succeeded", "killed in {}: {job}", phase.name);
            assert_eq!(home.story(&id).await, story, "killed in {}", phase.name);
            assert_eq!(home.artifacts(&id).await, artifacts, "killed in {}", phase.name);
            // A validation, a training, and one of them once more: else the worker was done before it was killed.
            if hit && home.attempts() - before == 3 {
                break;
            }
        }
    }
}

/// Everything that has a state of its own: masks, an evaluation every few steps, the best one so far, moments in 8 bits.
fn run_with_everything(held: &str) -> Value {
    json!({
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30}}},
        "lora": {"r": 64, "dropout": 0.1}, "validation_file": held,
        "training": {"learning_rate": 0.01, "optimizer": "adamw_8bit", "lr_scheduler": "cosine", "eval_steps": 3, "save_steps": 7,
                     "early_stopping": {"patience": 4}},
        "artifacts": [{"type": "adapter"}],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_with_dropout_validation_early_stopping_and_8_bit_moments_ends_with_the_same_bytes() {
    let home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    let file = home.upload(rows(40)).await;
    let held = home.upload(rows(60).lines().skip(40).map(|row| format!("{row}\n")).collect::<String>()).await;
    let undisturbed = home.create(&file, run_with_everything(&held)).await;
    let job = home.finished(&undisturbed).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let (story, artifacts) = (home.story(&undisturbed).await, home.artifacts(&undisturbed).await);
    let tells = |words: &str| story.iter().any(|line| line.contains(words));
    assert!(tells("full validation loss=") && tells("Stopped early at step"), "{story:?}");

    // Killed at moments that follow each other through the whole run: after the first step, then ever later.
    let mut hits = 0;
    for pause in 0..TRIES {
        let before = home.attempts();
        let id = home.create(&file, run_with_everything(&held)).await;
        let wanted = 1 + pause * 9;
        if home.trained_steps(&id, wanted).await {
            home.kill_workers();
        }
        let job = home.finished(&id).await;
        assert_eq!(job["status"], "succeeded", "killed after step {wanted}: {job}");
        assert_eq!(home.story(&id).await, story, "killed after step {wanted}");
        assert_eq!(home.artifacts(&id).await, artifacts, "killed after step {wanted}");
        hits += usize::from(home.attempts() - before == 3);
        if hits == 4 {
            return;
        }
    }
    assert!(hits > 0, "no worker could be hit");
}

/// Kills the worker in that phase of the job; `false`: it was over too soon.
async fn kill_in(home: &Home, id: &str, phase: &Phase, attempts_before: usize) -> bool {
    if phase.name == "a step" && !home.trained_a_step(id).await {
        return false;
    }
    let begun = || home.attempts() > attempts_before + phase.workers_before;
    let found = poll(phase.name, || {
        let (begun, newest) = (begun(), home.workers().into_iter().max_by(|a, b| a.scratch.cmp(&b.scratch)));
        match newest {
            None if begun => Some(None),
            Some(worker) if begun && (phase.is_now)(&worker) => Some(Some(worker)),
            _ => None,
        }
    })
    .await;
    if let Some(worker) = &found {
        worker.kill();
    }
    found.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_crashes_three_times_without_a_checkpoint_fails_the_job() {
    let home = Home::start(&[]).await;
    let file = home.upload(rows(40)).await;
    let long = json!({"training": {"max_steps": 100_000, "save_steps": 100_000}});
    let id = home.create(&file, long).await;
    assert!(home.trained_a_step(&id).await, "it is long");
    let mut killed = Vec::new();
    for _ in 0..3 {
        // One that has begun to work, so that its log has lines to quote.
        let next = |worker: &Worker| !killed.contains(&worker.pid) && worker.has("training_file");
        let worker = poll("a worker", || home.workers().into_iter().find(next)).await;
        worker.kill();
        killed.push(worker.pid);
    }
    let job = home.finished(&id).await;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("worker_crashed")), "{job}");
    let message = job["error"]["message"].as_str().expect("a message");
    assert!(message.contains("SIGKILL") && message.contains("attempt started"), "{message}");
    home.assert_no_path_of_ours(&job.to_string());
    assert!(home.workers().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_goes_silent_is_replaced() {
    let home = Home::start(&[(LEASE, "4"), ("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    let file = home.upload(rows(40)).await;
    for _ in 0..TRIES {
        let before = home.attempts();
        let id = home.create(&file, run()).await;
        let trained = home.trained_a_step(&id).await;
        let newest = home.workers().into_iter().max_by(|a, b| a.scratch.cmp(&b.scratch));
        let silent = newest.filter(|worker| trained && worker.freeze());
        let job = home.finished(&id).await;
        assert_eq!(job["status"], "succeeded", "{job}");
        let Some(silent) = silent else { continue };
        if home.attempts() - before >= 3 {
            let gone = || home.workers().iter().all(|worker| worker.pid != silent.pid).then_some(());
            return poll("its end", gone).await;
        }
        // Its work was done, and told, before it froze.
        silent.kill();
    }
    panic!("no worker could be held while it trained");
}
