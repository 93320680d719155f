//! What the rules of `[retention]` no longer keep goes: first the rows, a few at a time, then their bytes.

use super::{Jobs, Result};
use crate::config::Retention;
use crate::store;

/// Rows that one transaction removes.
const BATCH: i64 = 100;
/// A day, in milliseconds.
const DAY_MS: i64 = 24 * 3600 * 1000;

/// Kinds of things that are kept for a while.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Files,
    Checkpoints,
    Artifacts,
}

/// Removes what is older than the rules allow, and counts it.
pub(super) async fn apply(jobs: &Jobs, rules: &Retention, now_ms: i64) -> Result<usize> {
    let mut count = 0;
    for (kind, days) in [
        (Kind::Files, rules.files_days),
        (Kind::Checkpoints, rules.checkpoints_days),
        (Kind::Artifacts, rules.artifacts_days),
    ] {
        if let Some(days) = days {
            count += remove(jobs, kind, now_ms - i64::from(days) * DAY_MS).await?;
        }
    }
    Ok(count)
}

async fn remove(jobs: &Jobs, kind: Kind, before_ms: i64) -> Result<usize> {
    let mut count = 0;
    loop {
        let mut tx = jobs.store.begin_write().await?;
        let keys = match kind {
            Kind::Files => store::file::delete_older(&mut tx, before_ms, BATCH).await?,
            Kind::Checkpoints => store::checkpoint::delete_older(&mut tx, before_ms, BATCH).await?,
            Kind::Artifacts => store::artifact::delete_older(&mut tx, before_ms, BATCH).await?,
        };
        tx.commit().await?;
        if keys.is_empty() {
            return Ok(count);
        }
        count += keys.len();
        jobs.remove_objects(keys).await;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::jobs::add_file::add_file;
    use crate::jobs::testing;
    use crate::storage::{artifact_key, checkpoint_key, file_key};
    use crate::types::artifact::{Artifact, ArtifactRequest, ArtifactType};
    use crate::types::attempt::Attempt;
    use crate::types::checkpoint::Checkpoint;
    use crate::types::file::{File, FileStatus, Purpose};
    use crate::types::ids::{ArtifactId, CheckpointId, FileId, JobId};
    use crate::types::job::Status;

    async fn file(jobs: &Jobs, created_at_ms: i64) -> File {
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
            created_at_ms,
            expires_at_ms: None,
        };
        jobs.storage.put_bytes(&file.object_key, Bytes::from("rows")).await.expect("a put");
        add_file(jobs, &file).await.expect("a row");
        file
    }

    /// A job with a listed checkpoint and an adapter, and the keys of both.
    async fn job(jobs: &Jobs) -> (JobId, ArtifactId, [String; 2]) {
        let id = testing::add_job(jobs).await;
        let attempt: Attempt = testing::claim_next(jobs).await.expect("a job to validate").attempt;
        let (checkpoint_id, artifact_id) = (CheckpointId::new(), ArtifactId::new());
        let keys = [
            checkpoint_key(&id.to_string(), &checkpoint_id.to_string()),
            artifact_key(&id.to_string(), &artifact_id.to_string()),
        ];
        for key in &keys {
            jobs.storage.put_bytes(key, Bytes::from("bytes")).await.expect("a put");
        }
        let checkpoint = Checkpoint {
            id: checkpoint_id,
            job_id: id,
            attempt_id: attempt.id,
            step: 1,
            listed: true,
            model_name: format!("ft:{id}:ckpt-step-1"),
            object_key: keys[0].clone(),
            size_bytes: 5,
            sha256: String::new(),
            metrics: json!({}),
            created_at_ms: 0,
        };
        let artifact = Artifact {
            id: artifact_id,
            job_id: id,
            attempt_id: attempt.id,
            kind: ArtifactType::Adapter,
            quantization: None,
            filename: "adapter.tar".into(),
            object_key: keys[1].clone(),
            size_bytes: 5,
            sha256: String::new(),
            parity: None,
            created_at_ms: 0,
        };
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        store::checkpoint::insert(&mut tx, &checkpoint).await.expect("a row");
        store::artifact::replace(&mut tx, &artifact).await.expect("a row");
        tx.commit().await.expect("a commit");
        (id, artifact_id, keys)
    }

    async fn finish(jobs: &Jobs, id: JobId, at_ms: i64) {
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        let done = store::job::transition(&mut tx, id, Status::ValidatingFiles, Status::Failed, at_ms).await;
        assert!(done.expect("a transition"));
        tx.commit().await.expect("a commit");
    }

    async fn keys(jobs: &Jobs) -> Vec<String> {
        let mut conn = jobs.store.read().await.expect("a connection");
        let mut keys = store::object::named(&mut conn).await.expect("keys");
        drop(conn);
        let mut there = Vec::new();
        for folder in crate::storage::FOLDERS {
            there.extend(jobs.storage.keys_older_than(folder, std::time::Duration::ZERO).await.expect("a list"));
        }
        keys.sort();
        there.sort();
        assert_eq!(keys, there, "rows and objects go together");
        keys
    }

    #[tokio::test]
    async fn without_rules_everything_is_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        file(&jobs, 0).await;
        let (id, ..) = job(&jobs).await;
        finish(&jobs, id, 0).await;
        assert_eq!(apply(&jobs, &Retention::default(), i64::MAX).await.expect("rules"), 0);
        assert_eq!(keys(&jobs).await.len(), 3);
    }

    #[tokio::test]
    async fn files_go_by_their_age_unless_an_unfinished_job_needs_them() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (used, young) = (file(&jobs, 0).await, file(&jobs, DAY_MS + 1).await);
        for _ in 0..BATCH + 1 {
            file(&jobs, DAY_MS).await;
        }
        testing::add_job_with_files(&jobs, used.id, None).await;
        let rules = Retention { files_days: Some(2), ..Retention::default() };
        assert_eq!(apply(&jobs, &rules, 3 * DAY_MS - 1).await.expect("rules"), 0);
        assert_eq!(apply(&jobs, &rules, 3 * DAY_MS).await.expect("rules"), usize::try_from(BATCH).expect("few") + 1);
        let mut kept = [used.object_key, young.object_key];
        kept.sort();
        assert_eq!(keys(&jobs).await, kept);
    }

    #[tokio::test]
    async fn checkpoints_and_artifacts_go_by_the_end_of_their_job() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (old, _, [checkpoint, artifact]) = job(&jobs).await;
        let (young, _, young_keys) = job(&jobs).await;
        let (_, _, unfinished_keys) = job(&jobs).await;
        finish(&jobs, old, DAY_MS).await;
        finish(&jobs, young, 2 * DAY_MS).await;
        let mut kept: Vec<String> = young_keys.into_iter().chain(unfinished_keys).collect();
        kept.push(artifact);
        kept.sort();
        let rules = Retention { checkpoints_days: Some(1), ..Retention::default() };
        assert_eq!(apply(&jobs, &rules, 2 * DAY_MS).await.expect("rules"), 1);
        assert!(!kept.contains(&checkpoint));
        assert_eq!(keys(&jobs).await, kept);
        let rules = Retention { artifacts_days: Some(1), ..Retention::default() };
        assert_eq!(apply(&jobs, &rules, 2 * DAY_MS).await.expect("rules"), 1);
        assert_eq!(keys(&jobs).await.len(), 4);
    }

    #[tokio::test]
    async fn an_adapter_that_an_unfinished_job_begins_with_is_kept() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (first, adapter, _) = job(&jobs).await;
        finish(&jobs, first, 0).await;
        let second = testing::add_job(&jobs).await;
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        let sql = sqlx::query(
            "update job set spec = json_set(spec, '$.init_from', json_object('artifact_id', ?)) where id = ?",
        );
        sql.bind(adapter).bind(second).execute(&mut *tx).await.expect("an update");
        tx.commit().await.expect("a commit");
        let rules = Retention { artifacts_days: Some(1), ..Retention::default() };
        assert_eq!(apply(&jobs, &rules, 9 * DAY_MS).await.expect("rules"), 0);
        finish(&jobs, second, 0).await;
        assert_eq!(apply(&jobs, &rules, 9 * DAY_MS).await.expect("rules"), 1);
    }

    #[tokio::test]
    async fn an_export_keeps_what_it_is_made_of_and_has_days_of_its_own() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let (id, _, _) = job(&jobs).await;
        finish(&jobs, id, 0).await;
        let export = ArtifactId::new();
        let request = ArtifactRequest { kind: ArtifactType::GgufLora, quantization: None };
        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        store::export::insert(&mut tx, export, id, &request, 0).await.expect("a row");
        tx.commit().await.expect("a commit");
        let rules = Retention { artifacts_days: Some(1), ..Retention::default() };
        assert_eq!(apply(&jobs, &rules, 9 * DAY_MS).await.expect("rules"), 0);

        let mut tx = jobs.store.begin_write().await.expect("a transaction");
        store::export::delete(&mut tx, export).await.expect("a row");
        sqlx::query("update artifact set created_at_ms = ?")
            .bind(8 * DAY_MS + 1)
            .execute(&mut *tx)
            .await
            .expect("a row");
        tx.commit().await.expect("a commit");
        assert_eq!(apply(&jobs, &rules, 9 * DAY_MS).await.expect("rules"), 0);
        assert_eq!(apply(&jobs, &rules, 10 * DAY_MS).await.expect("rules"), 1);
    }
}
