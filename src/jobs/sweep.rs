//! Removes what nobody needs any more: files whose time is over, what `[retention]` no longer keeps, objects that no row names (an
//! upload or a worker left them behind when the server was killed between the two), and old logs of workers.

use std::collections::HashSet;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::launcher::Launcher;
use super::{Jobs, Result, retention, uploads};
use crate::config::Retention;
use crate::storage::{FOLDERS, is_key};
use crate::store;
use crate::types::now_ms;

/// Time between two sweeps.
const INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Age from which an object without a row gets none any more.
const AGE: Duration = Duration::from_secs(24 * 3600);
/// Time that the log of a worker is kept after its end.
const LOG_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Sweeps now and then until `shutdown`.
///
/// # Errors
/// None: a sweep that fails is logged, and the next one tries again.
pub async fn run(jobs: Jobs, launcher: Launcher, rules: Retention, shutdown: CancellationToken) -> Result<()> {
    while !shutdown.is_cancelled() {
        for (what, removed) in [
            ("files whose time is over", remove_expired(&jobs, now_ms()).await),
            ("uploads whose time is over", uploads::expire(&jobs, now_ms()).await),
            ("things that the rules of retention no longer keep", retention::apply(&jobs, &rules, now_ms()).await),
            ("objects that nothing names", sweep(&jobs, AGE).await),
            ("old logs of workers", remove_logs(&jobs, &launcher, LOG_AGE).await),
        ] {
            match removed {
                Ok(0) => (),
                Ok(count) => tracing::info!(count, "removed {what}"),
                Err(error) => tracing::warn!(%error, "cannot look for {what}"),
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => (),
            () = tokio::time::sleep(INTERVAL) => (),
        }
    }
    Ok(())
}

/// Removes the files whose time is over and that no unfinished job needs, and counts them.
async fn remove_expired(jobs: &Jobs, now_ms: i64) -> Result<usize> {
    let mut tx = jobs.store.begin_write().await?;
    let keys = store::file::delete_expired(&mut tx, now_ms).await?;
    tx.commit().await?;
    let count = keys.len();
    jobs.remove_objects(keys).await;
    Ok(count)
}

/// Removes the logs of attempts that ended longer than `age` ago, or that nobody knows and nobody wrote to for as long (their
/// job was deleted), and counts them.
async fn remove_logs(jobs: &Jobs, launcher: &Launcher, age: Duration) -> Result<usize> {
    let ended_before = now_ms() - i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    let (logs, listed) = (launcher.clone(), launcher.clone());
    let mut old = Vec::new();
    for id in tokio::task::spawn_blocking(move || listed.logs()).await? {
        let attempt = store::attempt::find(&mut *jobs.store.read().await?, id).await?;
        let written = async || tokio::fs::metadata(launcher.log_path(id)).await.and_then(|log| log.modified());
        let is_old = match attempt {
            Some(attempt) => attempt.ended_at_ms.is_some_and(|ended| ended <= ended_before),
            // One whose age is not to be had waits for the next sweep.
            None => written().await.is_ok_and(|written| written.elapsed().is_ok_and(|since| since >= age)),
        };
        old.extend(is_old.then_some(id));
    }
    let count = old.len();
    tokio::task::spawn_blocking(move || old.iter().for_each(|attempt| logs.remove_log(*attempt))).await?;
    Ok(count)
}

/// Removes the objects older than `age` that no row names, and uploads as old that never became one, and counts them.
///
/// # Errors
/// The database or the object storage failed.
pub async fn sweep(jobs: &Jobs, age: Duration) -> Result<usize> {
    // The objects first: one that gets its row after this look is not in the list, or its row is seen below.
    let mut keys = Vec::new();
    for folder in FOLDERS {
        keys.extend(jobs.storage.keys_older_than(folder, age).await?);
    }
    let named = store::object::named(&mut *jobs.store.read().await?).await?;
    let named: HashSet<String> = named.into_iter().collect();
    keys.retain(|key| is_key(key) && !named.contains(key));
    let count = jobs.remove_objects(keys).await;
    Ok(count + jobs.storage.remove_abandoned(age).await?)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::Config;
    use crate::jobs::add_file::add_file;
    use crate::jobs::testing;
    use crate::storage::file_key;
    use crate::types::attempt::AttemptOutcome;
    use crate::types::file::{File, FileStatus, Purpose};
    use crate::types::ids::{AttemptId, FileId};

    /// A file with its row and its bytes.
    async fn file(jobs: &Jobs, expires_at_ms: Option<i64>) -> File {
        let id = FileId::new();
        let file = File {
            id,
            owner: "default".into(),
            filename: "rows.jsonl".into(),
            purpose: Purpose::FineTune,
            size_bytes: 4,
            sha256: String::new(),
            object_key: file_key(&id.to_string()),
            status: FileStatus::Processed,
            created_at_ms: 0,
            expires_at_ms,
        };
        jobs.storage.put_bytes(&file.object_key, Bytes::from("rows")).await.expect("a put");
        add_file(jobs, &file).await.expect("a row");
        file
    }

    async fn is_there(jobs: &Jobs, key: &str) -> bool {
        let folder = key.split('/').next().expect("a folder");
        jobs.storage.keys_older_than(folder, Duration::ZERO).await.expect("a list").iter().any(|there| there == key)
    }

    #[tokio::test]
    async fn only_what_no_row_names_is_removed() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let kept = file(&jobs, None).await;
        let left = file_key(&FileId::new().to_string());
        let foreign = ["files/notes.txt", "files/2024/file-1", "jobs/letters/artifacts/cv.pdf", "jobs/list"];
        for key in foreign.into_iter().chain([left.as_str()]) {
            jobs.storage.put_bytes(key, Bytes::from("bytes")).await.expect("a put");
        }

        assert_eq!(sweep(&jobs, AGE).await.expect("a sweep"), 0);
        assert_eq!(sweep(&jobs, Duration::ZERO).await.expect("a sweep"), 1);
        assert!(!is_there(&jobs, &left).await);
        for key in foreign.into_iter().chain([kept.object_key.as_str()]) {
            assert!(is_there(&jobs, key).await, "{key} is still there");
        }
    }

    #[tokio::test]
    async fn a_file_goes_when_its_time_is_over() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (for_ever, for_now) = (file(&jobs, None).await, file(&jobs, Some(1000)).await);
        assert_eq!(remove_expired(&jobs, 999).await.expect("a sweep"), 0);
        assert_eq!(remove_expired(&jobs, 1000).await.expect("a sweep"), 1);
        assert!(is_there(&jobs, &for_ever.object_key).await);
        assert!(!is_there(&jobs, &for_now.object_key).await);
    }

    #[tokio::test]
    async fn a_file_of_an_unfinished_job_stays_past_its_time() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (training, validation) = (file(&jobs, Some(1000)).await, file(&jobs, Some(1000)).await);
        let unused = file(&jobs, Some(1000)).await;
        testing::add_job_with_files(&jobs, training.id, Some(validation.id)).await;
        assert_eq!(remove_expired(&jobs, 2000).await.expect("a sweep"), 1);
        assert!(!is_there(&jobs, &unused.object_key).await);
        for kept in [training, validation] {
            assert!(is_there(&jobs, &kept.object_key).await, "{} is still there", kept.id);
        }
    }

    #[tokio::test]
    async fn logs_are_removed_but_for_those_of_attempts_that_run() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let mut config = Config::default();
        config.server.data_dir = folder.path().to_owned();
        let launcher = Launcher::new(&config, "unix:none".to_owned());
        let mut claimed = Vec::new();
        for _ in 0..2 {
            testing::add_job(&jobs).await;
            claimed.extend(testing::claim_next(&jobs).await.map(|claimed| claimed.attempt.id));
        }
        let [ended, running] = claimed[..] else { panic!("two attempts") };
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        store::attempt::end(&mut tx, ended, AttemptOutcome::Stopped, now_ms()).await.expect("an end");
        tx.commit().await.expect("a commit");
        std::fs::create_dir(config.logs_dir()).expect("a folder");
        let unknown = AttemptId::new();
        for attempt in [ended, running, unknown] {
            std::fs::write(launcher.log_path(attempt), "a line\n").expect("a log");
        }

        assert_eq!(remove_logs(&jobs, &launcher, LOG_AGE).await.expect("a sweep"), 0);
        assert_eq!(remove_logs(&jobs, &launcher, Duration::ZERO).await.expect("a sweep"), 2);
        assert!(!launcher.log_path(ended).exists() && !launcher.log_path(unknown).exists());
        assert!(launcher.log_path(running).exists());
    }
}
