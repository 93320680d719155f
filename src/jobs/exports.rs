//! Artifacts that are asked for after a job has succeeded: asked for, made by an attempt of their own, or not to be made.

use std::time::Duration;

use sqlx::SqliteConnection;

use super::claim::{Claimed, begin_attempt};
use super::finish_attempt::MOST_ATTEMPTS_WITHOUT_PROGRESS;
use super::{Error, Jobs, Result, find_job};
use crate::store;
use crate::types::artifact::{Artifact, ArtifactRequest, ArtifactType};
use crate::types::attempt::{Attempt, AttemptOutcome, AttemptState, TaskKind};
use crate::types::device::Device;
use crate::types::export::Export;
use crate::types::ids::{ArtifactId, AttemptId, JobId};
use crate::types::job::Status;
use crate::types::now_ms;
use crate::types::worker_protocol::Finish;

/// An artifact that is there, or that is to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Exported {
    /// It is there.
    Made(Box<Artifact>),
    /// It is not, yet.
    Waiting(Export),
}

/// Asks for an artifact of this owner's job. One that is there, or was asked for already, is given as it is; one that failed is
/// tried once more.
///
/// # Errors
/// No such job, one that has not succeeded or has no adapter any more.
pub async fn export(jobs: &Jobs, owner: &str, job_id: JobId, request: ArtifactRequest) -> Result<Exported> {
    let mut tx = jobs.store.begin_write().await?;
    let job = find_job(&mut tx, owner, job_id).await?;
    if job.status != Status::Succeeded {
        return Err(Error::NotExportable { job: job_id, reason: format!("its status is {}", job.status) });
    }
    let made = store::artifact::list(&mut tx, job_id).await?;
    if let Some(artifact) =
        made.iter().find(|made| (made.kind, made.quantization) == (request.kind, request.quantization))
    {
        return Ok(Exported::Made(Box::new(artifact.clone())));
    }
    if !made.iter().any(|made| made.kind == ArtifactType::Adapter) {
        let reason = "it has no artifact of type adapter, from which others are made".to_owned();
        return Err(Error::NotExportable { job: job_id, reason });
    }
    let asked = store::export::list(&mut tx, job_id).await?.into_iter().find(|asked| asked.request() == request);
    let id = match asked {
        Some(asked) if asked.error_code.is_none() => return Ok(Exported::Waiting(asked)),
        Some(failed) => {
            store::export::set_queued(&mut tx, failed.id, 0).await?;
            failed.id
        }
        None => {
            let id = ArtifactId::new();
            store::export::insert(&mut tx, id, job_id, &request, now_ms()).await?;
            id
        }
    };
    let export = store::export::find(&mut tx, id, owner).await?.ok_or_else(|| Error::NoSuchJob(job_id.to_string()))?;
    tx.commit().await?;
    tracing::info!(job.id = %job_id, artifact = %id, r#type = %request.kind, "export queued");
    jobs.tell_scheduler();
    Ok(Exported::Waiting(export))
}

/// Takes up the next export on `device`. `None`: there is none.
///
/// # Errors
/// The database failed.
pub(super) async fn claim_export(jobs: &Jobs, device: Device, lease: Duration) -> Result<Option<Claimed>> {
    let mut tx = jobs.store.begin_write().await?;
    let Some(export) = store::export::next(&mut tx).await? else { return Ok(None) };
    let job = match store::job::get(&mut tx, export.job_id).await {
        Ok(Some(job)) => job,
        Ok(None) => return Ok(None),
        Err(store::Error::UnreadableJob { source, .. }) => {
            let message = format!("this version of the server cannot read the job's specification: {source}");
            store::export::set_failed(&mut tx, export.id, "unreadable_job", &message).await?;
            tx.commit().await?;
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let begun = begin_attempt(&mut tx, job.id, TaskKind::Export, device, lease).await?;
    let Some((attempt, token)) = begun else { return Ok(None) };
    store::export::set_running(&mut tx, export.id, attempt.id).await?;
    tx.commit().await?;
    tracing::info!(job.id = %job.id, attempt = %attempt.id, artifact = %export.id, %device, "export claimed");
    Ok(Some(Claimed { attempt, job, token }))
}

/// The export that an attempt is wanted to make, looked at inside the transaction that writes down what it did.
pub(super) async fn working_export(conn: &mut SqliteConnection, attempt_id: AttemptId) -> Result<Export> {
    let attempt = store::attempt::find(conn, attempt_id).await?;
    let works = attempt.is_some_and(|attempt| matches!(attempt.state, AttemptState::Starting | AttemptState::Running));
    let export = if works { store::export::of_attempt(conn, attempt_id).await? } else { None };
    export.ok_or(Error::AttemptEnded)
}

/// Puts the artifact that an attempt made in the export's place. `false`: it stands there already, its worker had no answer.
pub(super) async fn add_artifact(
    conn: &mut SqliteConnection,
    attempt: &Attempt,
    artifact: &mut Artifact,
) -> Result<bool> {
    let made = store::artifact::list(conn, attempt.job_id).await?;
    if made.iter().any(|made| made.attempt_id == attempt.id && made.sha256 == artifact.sha256) {
        return Ok(false);
    }
    let export = working_export(conn, attempt.id).await?;
    let request = ArtifactRequest { kind: artifact.kind, quantization: artifact.quantization };
    if export.request() != request {
        return Err(Error::Worker(format!("the attempt makes no artifact of type {} like this", artifact.kind)));
    }
    artifact.id = export.id;
    store::export::delete(conn, export.id).await?;
    store::artifact::replace(conn, artifact).await?;
    Ok(true)
}

/// Takes the last word of a worker that made an export.
pub(super) async fn finish(jobs: &Jobs, attempt: &Attempt, finish: Finish) -> Result<()> {
    let mut tx = jobs.store.begin_write().await?;
    let outcome = match &finish {
        Finish::Succeeded { .. } => AttemptOutcome::Succeeded,
        Finish::Failed { .. } => AttemptOutcome::Failed,
        Finish::Stopped => AttemptOutcome::Stopped,
    };
    if !store::attempt::end(&mut tx, attempt.id, outcome, now_ms()).await? {
        return Err(Error::AttemptEnded);
    }
    match (store::export::of_attempt(&mut tx, attempt.id).await?, finish) {
        (Some(_), Finish::Succeeded { .. }) => {
            return Err(Error::Worker("the artifact was not handed in".to_owned()));
        }
        (Some(export), Finish::Failed { code, message, .. }) => {
            store::export::set_failed(&mut tx, export.id, &code, &message).await?;
        }
        (Some(export), Finish::Stopped) => store::export::set_queued(&mut tx, export.id, export.crashes).await?,
        (None, _) => (),
    }
    tx.commit().await?;
    tracing::info!(job.id = %attempt.job_id, attempt = %attempt.id, %outcome, "export ended");
    jobs.tell_scheduler();
    Ok(())
}

/// What becomes of the export of an attempt whose worker is gone without a word: it waits again, unless it crashed once too often.
pub(super) async fn lost(
    conn: &mut SqliteConnection,
    attempt_id: AttemptId,
    outcome: AttemptOutcome,
    detail: &str,
) -> Result<()> {
    let Some(export) = store::export::of_attempt(conn, attempt_id).await? else { return Ok(()) };
    let crashes = export.crashes + i64::from(outcome == AttemptOutcome::Crashed);
    if crashes < MOST_ATTEMPTS_WITHOUT_PROGRESS {
        return Ok(store::export::set_queued(conn, export.id, crashes).await?);
    }
    let message = format!("the worker ended unexpectedly {crashes} times: {detail}");
    Ok(store::export::set_failed(conn, export.id, "worker_crashed", &message).await?)
}
