//! A worker asks what it is to do.

use std::time::Duration;

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::file::File;
use crate::types::worker_protocol::{BaseModel, Resume, Task, TrainingFile};

/// The task of an attempt, with everything that its worker needs; the attempt is running from now on.
///
/// # Errors
/// The attempt has ended.
pub async fn give_task(jobs: &Jobs, attempt: &Attempt, lease: Duration, checkpoint_seconds: u64) -> Result<Task> {
    let mut tx = jobs.store.begin_write().await?;
    store::attempt::set_running(&mut tx, attempt.id).await?;
    let job = super::append_events::working_job(&mut tx, attempt.id).await?;
    let file = store::file::get(&mut tx, job.spec.training_file).await?;
    let resume = match attempt.task {
        TaskKind::Validate => None,
        TaskKind::Train => store::checkpoint::latest(&mut tx, job.id).await?,
    };
    tx.commit().await?;
    let file = file.ok_or_else(|| Error::NoSuchTrainingFile(job.spec.training_file))?;
    Ok(Task {
        attempt_id: attempt.id,
        job_id: job.id,
        kind: attempt.task,
        base_model: BaseModel { name: job.spec.model },
        spec: job.spec.train,
        artifacts: job.spec.artifacts,
        training_file: TrainingFile {
            id: file.id,
            filename: file.filename,
            size_bytes: file.size_bytes.unsigned_abs(),
            sha256: file.sha256,
        },
        resume: resume.map(|checkpoint| Resume {
            step: u32::try_from(checkpoint.step).unwrap_or(u32::MAX),
            size_bytes: checkpoint.size_bytes.unsigned_abs(),
            sha256: checkpoint.sha256,
            train_loss: checkpoint.metrics["train_loss"].as_f64(),
        }),
        model_name: job.model_name,
        lease_seconds: lease.as_secs(),
        heartbeat_seconds: (lease.as_secs() / 3).max(1),
        checkpoint_seconds,
    })
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
