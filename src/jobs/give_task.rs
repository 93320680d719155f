//! A worker asks what it is to do.

use std::time::Duration;

use sqlx::SqliteConnection;

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::artifact::Artifact;
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::file::File;
use crate::types::job::Job;
use crate::types::job_spec::InitFrom;
use crate::types::worker_protocol::{BaseModel, DataFile, Resume, StartAdapter, Task};

/// The task of an attempt, with everything that its worker needs; the attempt is running from now on.
///
/// # Errors
/// The attempt has ended.
pub async fn give_task(jobs: &Jobs, attempt: &Attempt, lease: Duration, checkpoint_seconds: u64) -> Result<Task> {
    let mut tx = jobs.store.begin_write().await?;
    store::attempt::set_running(&mut tx, attempt.id).await?;
    let job = super::append_events::working_job(&mut tx, attempt.id).await?;
    let file = store::file::get(&mut tx, job.spec.training_file).await?;
    let file = file.ok_or(Error::NoSuchTrainingFile(job.spec.training_file))?;
    let validation_file = match job.spec.validation_file {
        None => None,
        Some(id) => Some(store::file::get(&mut tx, id).await?.ok_or(Error::NoSuchValidationFile(id))?),
    };
    let init_from = start_adapter(&mut tx, &job, attempt).await?;
    let resume = match attempt.task {
        TaskKind::Validate => None,
        TaskKind::Train => store::checkpoint::latest(&mut tx, job.id).await?,
    };
    tx.commit().await?;
    Ok(Task {
        attempt_id: attempt.id,
        job_id: job.id,
        kind: attempt.task,
        base_model: BaseModel { name: job.spec.model },
        spec: job.spec.train,
        artifacts: job.spec.artifacts,
        training_file: data_file(file),
        validation_file: validation_file.map(data_file),
        init_from: init_from.map(|artifact| StartAdapter {
            id: artifact.id,
            size_bytes: artifact.size_bytes.unsigned_abs(),
            sha256: artifact.sha256,
        }),
        resume: resume.map(|checkpoint| Resume {
            step: u32::try_from(checkpoint.step).unwrap_or(u32::MAX),
            size_bytes: checkpoint.size_bytes.unsigned_abs(),
            sha256: checkpoint.sha256,
            train_loss: checkpoint.metrics["train_loss"].as_f64(),
        }),
        model_name: job.model_name,
        lease_seconds: lease.as_secs(),
        heartbeat_seconds: (lease.as_secs() / 3).clamp(1, 5),
        checkpoint_seconds,
    })
}

fn data_file(file: File) -> DataFile {
    let File { id, filename, size_bytes, sha256, .. } = file;
    DataFile { id, filename, size_bytes: size_bytes.unsigned_abs(), sha256 }
}

/// The adapter that an attempt's training begins with.
async fn start_adapter(conn: &mut SqliteConnection, job: &Job, attempt: &Attempt) -> Result<Option<Artifact>> {
    match (&job.spec.init_from, attempt.task) {
        (None, _) | (_, TaskKind::Validate) => Ok(None),
        (Some(InitFrom { name, artifact_id, .. }), TaskKind::Train) => {
            let artifact = store::artifact::find(conn, *artifact_id, &job.owner).await?;
            artifact.map(Some).ok_or_else(|| Error::NoSuchAdapter(name.clone()))
        }
    }
}

/// The adapter that an attempt's training begins with.
///
/// # Errors
/// The job or its adapter is not there.
pub async fn init_from(jobs: &Jobs, attempt: &Attempt) -> Result<Artifact> {
    let mut conn = jobs.store.read().await?;
    let job = store::job::get(&mut conn, attempt.job_id).await?;
    let job = job.ok_or_else(|| Error::NoSuchJob(attempt.job_id.to_string()))?;
    let artifact = start_adapter(&mut conn, &job, attempt).await?;
    artifact.ok_or_else(|| Error::NoSuchAdapter("null".to_owned()))
}

/// The data set of an attempt's job whose loss is watched.
///
/// # Errors
/// The job has none, or it is not there.
pub async fn validation_file(jobs: &Jobs, attempt: &Attempt) -> Result<File> {
    let mut conn = jobs.store.read().await?;
    let job = store::job::get(&mut conn, attempt.job_id).await?;
    let job = job.ok_or_else(|| Error::NoSuchJob(attempt.job_id.to_string()))?;
    let id = job.spec.validation_file.ok_or_else(|| Error::Worker(format!("job {} has no validation file", job.id)))?;
    store::file::get(&mut conn, id).await?.ok_or(Error::NoSuchValidationFile(id))
}

/// The data set of an attempt's job.
///
/// # Errors
/// The job or its file is not there.
pub async fn training_file(jobs: &Jobs, attempt: &Attempt) -> Result<File> {
    let mut conn = jobs.store.read().await?;
    let job = store::job::get(&mut conn, attempt.job_id).await?;
    let id = job.ok_or_else(|| Error::NoSuchJob(attempt.job_id.to_string()))?.spec.training_file;
    store::file::get(&mut conn, id).await?.ok_or(Error::NoSuchTrainingFile(id))
}
