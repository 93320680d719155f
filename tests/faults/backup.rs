//! Backup beside a server that works, and a restore that goes on where it was; archives that are not whole.

use std::fs;

use serde_json::{Value, json};

use super::support::{Home, rows};

fn run(epochs: u32) -> Value {
    json!({
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}},
        "lora": {"r": 4}, "training": {"learning_rate": 0.01}, "artifacts": [{"type": "adapter"}, {"type": "gguf"}],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_has_everything_and_goes_on_with_what_ran() {
    let mut home = Home::start(&[("LORAD__WORKERS__CHECKPOINT_SECONDS", "1")]).await;
    let file = home.upload(rows(40)).await;
    let done = home.create(&file, run(12)).await;
    assert_eq!(home.finished(&done).await["status"], "succeeded");
    let (story, artifacts) = (home.story(&done).await, home.artifacts(&done).await);
    let running = home.create(&file, run(12)).await;
    assert!(home.trained_steps(&running, 10).await, "it runs while it is backed up");
    home.lorad(&["backup", "--data-dir", "data", "--to", "all.tar"]).expect("a backup");
    let again = home.lorad(&["backup", "--data-dir", "data", "--to", "all.tar"]).expect_err("a second one");
    assert!(again.contains("all.tar is there already"), "{again}");
    let refused = home.lorad(&["restore", "--data-dir", "data", "--from", "all.tar"]).expect_err("a server runs");
    assert!(refused.contains("another server uses"), "{refused}");

    home.kill_server();
    home.kill_workers();
    let refused = home.lorad(&["restore", "--data-dir", "data", "--from", "all.tar"]).expect_err("a full folder");
    assert!(refused.contains("there is a database already"), "{refused}");
    fs::rename(home.path("data"), home.path("lost")).expect("a folder");
    // What a killed server left of its database would be played back over the restored one.
    fs::create_dir(home.path("data")).expect("a folder");
    fs::write(home.path("data/lorad.db-wal"), "left").expect("a file");
    let refused =
        home.lorad(&["restore", "--data-dir", "data", "--from", "all.tar"]).expect_err("a log without its database");
    assert!(refused.contains("lorad.db-wal"), "{refused}");
    fs::remove_file(home.path("data/lorad.db-wal")).expect("a file");
    home.lorad(&["restore", "--data-dir", "data", "--from", "all.tar"]).expect("a restore");
    home.start_server().await;
    assert_eq!((home.story(&done).await, home.artifacts(&done).await), (story.clone(), artifacts.clone()));
    let job = home.finished(&running).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    assert_eq!((home.story(&running).await, home.artifacts(&running).await), (story, artifacts));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_not_whole_leaves_nothing() {
    let mut home = Home::start(&[]).await;
    let file = home.upload(rows(40)).await;
    home.stop_server().await;
    home.lorad(&["backup", "--data-dir", "data", "--to", "all.tar"]).expect("a backup");
    let whole = fs::read(home.path("all.tar")).expect("an archive");
    let content = whole.windows(rows(1).len()).position(|bytes| bytes == rows(1).as_bytes()).expect("the rows");
    let mut changed = whole.clone();
    changed[content + 5] ^= 1;
    let foreign = {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        archive.append_data(&mut header, "objects/../escape", &b"x"[..]).map(|()| Vec::new()).unwrap_or_else(|_| {
            header.set_path("objects/escape").expect("a short name");
            header.set_cksum();
            archive.append(&header, &b"x"[..]).expect("an archive in memory");
            archive.into_inner().expect("an archive in memory")
        })
    };
    for (name, bytes, words) in [
        ("cut.tar", whole[..whole.len() / 2].to_vec(), ""),
        ("no-manifest.tar", whole[..content / 512 * 512 + 4096].to_vec(), ""),
        ("changed.tar", changed, "is damaged"),
        ("foreign.tar", foreign, "objects/escape"),
        ("empty.tar", Vec::new(), "no manifest"),
        ("text.tar", b"this is no archive, it is a sentence".repeat(40), ""),
    ] {
        fs::write(home.path(name), bytes).expect("a file");
        let refused = home.lorad(&["restore", "--data-dir", "fresh", "--from", name]).expect_err(name);
        assert!(
            refused.contains(name) && refused.contains(words) && !refused.contains("panicked"),
            "{name}: {refused}"
        );
        assert!(!home.path("fresh/lorad.db").exists(), "{name}");
        let objects = fs::read_dir(home.path("fresh/objects/files")).map(Iterator::count).unwrap_or(0);
        assert_eq!(objects, 0, "{name}");
    }
    home.lorad(&["restore", "--data-dir", "fresh", "--from", "all.tar"]).expect("the whole one");
    assert!(home.path("fresh/objects/files").join(file).exists());
}
