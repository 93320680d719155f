//! A training that is paused, or whose server is told to stop, ends its step and saves it; later it goes on as if nothing had been.

use serde_json::json;

use super::support::{Home, poll, rows};

/// How often a pause is tried that came too late.
const TRIES: usize = 10;

#[derive(Debug, Clone, Copy)]
enum Halt {
    Pause,
    Drain,
}

impl Halt {
    /// Halts the training and takes it up again.
    async fn happen(self, home: &mut Home, job: &str) {
        match self {
            Self::Pause => {
                let (status, paused) = home.post(&format!("/fine_tuning/jobs/{job}/pause"), &json!({})).await;
                assert_eq!(status, 200, "{paused}");
                poll("the end of the worker", || home.workers().is_empty().then_some(())).await;
                assert_eq!(home.job(job).await["status"], "paused");
                let (status, resumed) = home.post(&format!("/fine_tuning/jobs/{job}/resume"), &json!({})).await;
                assert_eq!((status, &resumed["status"]), (200, &json!("queued")), "{resumed}");
            }
            Self::Drain => {
                home.stop_server().await;
                assert_eq!(home.workers().len(), 0, "a server that stops takes its workers along");
                home.start_server().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_training_goes_on_after_its_last_step() {
    // No checkpoint but the one that is made for the halt.
    let mut home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "86400")]).await;
    let file = home.upload(rows(40)).await;
    let run = json!({"training": {"max_steps": 400, "save_steps": 1000, "learning_rate": 0.01}, "lora": {"r": 4}});
    let undisturbed = home.create(&file, run.clone()).await;
    assert_eq!(home.finished(&undisturbed).await["status"], "succeeded");
    let artifacts = home.artifacts(&undisturbed).await;

    for halt in [Halt::Pause, Halt::Drain] {
        let mut halted = false;
        for _ in 0..TRIES {
            let begun = home.log().len();
            let job = home.create(&file, run.clone()).await;
            halted = home.trained_steps(&job, 3).await;
            if halted {
                halt.happen(&mut home, &job).await;
            }
            assert_eq!(home.finished(&job).await["status"], "succeeded", "{halt:?}");
            assert_eq!(home.artifacts(&job).await, artifacts, "{halt:?}");
            let steps = home.story(&job).await.iter().filter(|line| line.contains("Step ")).count();
            assert_eq!(steps, 400, "{halt:?}: each step once");
            let resumed = home.resumed_from();
            if halted {
                assert!(resumed >= 3, "{halt:?}: it went on after step {resumed}\n{}", &home.log()[begun..]);
                break;
            }
        }
        assert!(halted, "{halt:?} always came too late");
    }
}
