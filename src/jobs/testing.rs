//! Rows to test with.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::Jobs;
use super::claim::{Claimed, claim};
use super::finish_attempt::finish_attempt;
use crate::storage::Storage;
use crate::store::Store;
use crate::store::export;
use crate::store::job::{self, Request};
use crate::types::artifact::{ArtifactRequest, ArtifactType};
use crate::types::attempt::TaskKind;
use crate::types::device::Device;
use crate::types::ids::{ArtifactId, FileId, JobId};
use crate::types::job::{Job, Status};
use crate::types::job_spec::JobSpec;
use crate::types::worker_protocol::Finish;

/// The use cases over an empty database in `folder` and a storage in memory.
pub(super) async fn jobs(folder: &Path) -> Jobs {
    let store = Store::open(&folder.join("lorad.db")).await.expect("a database");
    Jobs::new(store, Storage::memory())
}

/// Adds a job whose data set has to be read.
pub(super) async fn add_job(jobs: &Jobs) -> JobId {
    add_job_with_files(jobs, FileId::new(), None).await
}

/// Adds a job with those files.
pub(super) async fn add_job_with_files(jobs: &Jobs, training: FileId, validation: Option<FileId>) -> JobId {
    let body = json!({"model": "tiny", "training_file": training, "validation_file": validation}).to_string();
    let id = JobId::new();
    let job = Job {
        id,
        owner: "default".into(),
        status: Status::ValidatingFiles,
        model_name: format!("ft:tiny:lorad::{id}"),
        spec: JobSpec::parse(body.as_bytes(), None).expect("a good request"),
        trained_tokens: None,
        total_steps: None,
        result_file_id: None,
        error: None,
        attempts_without_progress: 0,
        created_at_ms: 0,
        validated_at_ms: None,
        started_at_ms: None,
        finished_at_ms: None,
    };
    let mut tx = jobs.store.begin_write().await.expect("a transaction");
    job::insert(&mut tx, &job, Request { body: &body, idempotency_key: None, is_retry: false }).await.expect("a job");
    tx.commit().await.expect("a commit");
    id
}

/// Takes up the next job to validate.
pub(super) async fn claim_next(jobs: &Jobs) -> Option<Claimed> {
    claim(jobs, TaskKind::Validate, Device::Cpu, Duration::from_secs(30)).await.expect("a claim")
}

/// Adds a job that waits to be trained.
pub(super) async fn add_queued_job(jobs: &Jobs) -> JobId {
    let id = add_job(jobs).await;
    let attempt = claim_next(jobs).await.expect("a job to validate").attempt;
    let valid = Finish::Succeeded { trained_tokens: None, events: Vec::new() };
    finish_attempt(jobs, &attempt, valid).await.expect("a job that was being validated");
    id
}

/// Adds a job that was trained, and asks for one more artifact of it.
pub(super) async fn add_export(jobs: &Jobs) -> JobId {
    let job = add_queued_job(jobs).await;
    let request = ArtifactRequest { kind: ArtifactType::Merged, quantization: None };
    let mut tx = jobs.store.begin_write().await.expect("a transaction");
    for (from, to) in [(Status::Queued, Status::Running), (Status::Running, Status::Succeeded)] {
        assert!(job::transition(&mut tx, job, from, to, 0).await.expect("an update"));
    }
    export::insert(&mut tx, ArtifactId::new(), job, &request, 0).await.expect("an export");
    tx.commit().await.expect("a commit");
    job
}

/// Makes a job one whose `spec` this build cannot read, as if another build had written it.
pub(super) async fn make_unreadable(jobs: &Jobs, id: JobId) {
    let mut tx = jobs.store.begin_write().await.expect("a transaction");
    let sql = sqlx::query("update job set spec = '{}' where id = ?").bind(id);
    sql.execute(&mut *tx).await.expect("an update");
    tx.commit().await.expect("a commit");
}

/// The state and the error code of a job, readable or not.
pub(super) async fn state(jobs: &Jobs, id: JobId) -> (String, Option<String>) {
    let mut conn = jobs.store.read().await.expect("a connection");
    let sql = sqlx::query_as("select status, error_code from job where id = ?").bind(id);
    sql.fetch_one(&mut *conn).await.expect("a job")
}
