//! kill -9 of the server, of both, and a clean stop: after a restart the job goes on, and no event is lost or doubled.

use serde_json::{Value, json};

use super::support::{Home, poll, rows};

fn run() -> Value {
    json!({"training": {"max_steps": 150, "save_steps": 20, "learning_rate": 0.01}, "lora": {"r": 4}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_goes_on_and_changes_nothing() {
    let mut home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    let file = home.upload(rows(40)).await;
    let undisturbed = home.create(&file, run()).await;
    let job = home.finished(&undisturbed).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let (story, artifacts) = (home.story(&undisturbed).await, home.artifacts(&undisturbed).await);

    for fault in ["server", "server and worker", "server, until the worker gave up", "clean stop"] {
        let before = home.attempts();
        let id = home.create(&file, run()).await;
        home.trained_a_step(&id).await;
        let attempts = match fault {
            "server" => {
                home.kill_server();
                assert_eq!(home.workers().len(), 1, "the worker outlives the server");
                2
            }
            "server and worker" => {
                home.kill_server();
                home.kill_workers();
                3
            }
            "clean stop" => {
                home.stop_server().await;
                assert_eq!(home.workers().len(), 0, "a server that stops takes its workers along");
                3
            }
            _ => {
                home.kill_server();
                poll("the end of the worker's lease", || home.workers().is_empty().then_some(())).await;
                3
            }
        };
        home.start_server().await;
        let job = home.finished(&id).await;
        assert_eq!(job["status"], "succeeded", "{fault}: {job}");
        assert_eq!(home.attempts() - before, attempts, "{fault}");
        assert_eq!(home.story(&id).await, story, "{fault}");
        assert_eq!(home.artifacts(&id).await, artifacts, "{fault}");
    }
}
