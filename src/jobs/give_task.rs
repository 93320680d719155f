//! A worker asks what it is to do.

use std::time::Duration;

use sqlx::SqliteConnection;

use super::exports::working_export;
use super::{Error, Jobs, Result};
use crate::config::{Config, Workers};
use crate::store;
use crate::types::artifact::{Artifact, ArtifactType};
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::device::Device;
use crate::types::file::File;
use crate::types::job::Job;
use crate::types::job_spec::InitFrom;
use crate::types::worker_protocol::{BaseModel, DataFile, Resume, StartAdapter, Task};

/// What every task says of how to work.
#[derive(Debug, Clone, Copy)]
pub struct WorkerSettings {
    /// How long the server bears silence.
    pub lease: Duration,
    /// Longest time between two checkpoints.
    pub checkpoint_seconds: u64,
    /// Memory that a training may have; all that the machine has where none is given.
    pub memory_bytes: Option<u64>,
    /// The device that a training is judged by which has none yet: that with the least memory, for any may get it.
    pub device: Device,
}

impl WorkerSettings {
    /// The configuration's; trainings run on those devices, those with most memory first.
    pub fn new(config: &Config, devices: &[Device]) -> Self {
        let Workers { checkpoint_seconds, memory_bytes, .. } = config.workers;
        let memory_bytes = (memory_bytes > 0).then_some(memory_bytes);
        let device = devices.last().copied().unwrap_or_default();
        Self { lease: config.workers.lease(), checkpoint_seconds: checkpoint_seconds.into(), memory_bytes, device }
    }
}

/// The task of an attempt, with everything that its worker needs; the attempt is running from now on.
///
/// # Errors
/// The attempt has ended.
pub async fn give_task(jobs: &Jobs, attempt: &Attempt, settings: WorkerSettings) -> Result<Task> {
    let WorkerSettings { lease, checkpoint_seconds, memory_bytes, device } = settings;
    let device = match attempt.task {
        TaskKind::Validate => device,
        TaskKind::Train | TaskKind::Export => attempt.device.parse().map_err(Error::Worker)?,
    };
    let mut tx = jobs.store.begin_write().await?;
    store::attempt::set_running(&mut tx, attempt.id).await?;
    let (job, artifacts) = match attempt.task {
        TaskKind::Export => {
            let export = working_export(&mut tx, attempt.id).await?;
            (store::job::get(&mut tx, export.job_id).await?.ok_or(Error::AttemptEnded)?, vec![export.request()])
        }
        TaskKind::Validate | TaskKind::Train => {
            let job = super::append_events::working_job(&mut tx, attempt.id).await?;
            let artifacts = job.spec.artifacts.clone();
            (job, artifacts)
        }
    };
    let (training_file, validation_file) = data_files(&mut tx, &job, attempt.task).await?;
    let init_from = start_adapter(&mut tx, &job, attempt).await?;
    let resume = match attempt.task {
        TaskKind::Validate | TaskKind::Export => None,
        TaskKind::Train => store::checkpoint::latest(&mut tx, job.id).await?,
    };
    tx.commit().await?;
    Ok(Task {
        attempt_id: attempt.id,
        job_id: job.id,
        kind: attempt.task,
        base_model: BaseModel { name: job.spec.model },
        spec: job.spec.train,
        artifacts,
        training_file: training_file.map(data_file),
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
        device,
        memory_bytes,
    })
}

fn data_file(file: File) -> DataFile {
    let File { id, filename, size_bytes, sha256, .. } = file;
    DataFile { id, filename, size_bytes: size_bytes.unsigned_abs(), sha256 }
}

/// The data sets that a task reads; an export reads none, and they may be gone.
async fn data_files(conn: &mut SqliteConnection, job: &Job, task: TaskKind) -> Result<(Option<File>, Option<File>)> {
    if task == TaskKind::Export {
        return Ok((None, None));
    }
    let id = job.spec.training_file;
    let training = store::file::get(conn, id).await?.ok_or(Error::NoSuchTrainingFile(id))?;
    let Some(id) = job.spec.validation_file else { return Ok((Some(training), None)) };
    let validation = store::file::get(conn, id).await?.ok_or(Error::NoSuchValidationFile(id))?;
    Ok((Some(training), Some(validation)))
}

/// The adapter that an attempt's training begins with, or that its export is made of.
async fn start_adapter(conn: &mut SqliteConnection, job: &Job, attempt: &Attempt) -> Result<Option<Artifact>> {
    match (&job.spec.init_from, attempt.task) {
        (_, TaskKind::Export) => {
            let made = store::artifact::list(conn, job.id).await?;
            let adapter = made.into_iter().find(|artifact| artifact.kind == ArtifactType::Adapter);
            adapter.map(Some).ok_or_else(|| Error::NoSuchAdapter(job.model_name.clone()))
        }
        (None, _) | (_, TaskKind::Validate) => Ok(None),
        (Some(InitFrom { name, artifact_id, .. }), TaskKind::Train) => {
            let artifact = store::artifact::find(conn, *artifact_id, &job.owner).await?;
            artifact.map(Some).ok_or_else(|| Error::NoSuchAdapter(name.clone()))
        }
    }
}

/// The adapter that an attempt begins with.
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
