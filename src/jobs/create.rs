//! A job comes into being.

use rand::Rng;
use rand::distr::Alphanumeric;
use sqlx::SqliteConnection;

use super::{Error, Jobs, Result};
use crate::hub::{Hub, Reference};
use crate::store;
use crate::store::job::Request;
use crate::types::event::NewEvent;
use crate::types::file::{File, Purpose};
use crate::types::ids::JobId;
use crate::types::job::{Job, Status, model_name};
use crate::types::job_spec::{InitFrom, JobSpec};
use crate::types::now_ms;

/// How long after a request a client may send it again because it got no answer, in milliseconds.
const RETRIED_WITHIN_MS: i64 = 120_000;

/// Creates this owner's job; a request that is repeated under its `Idempotency-Key`, or that says of itself that it is a repeated
/// one, gives the job that is there.
///
/// # Errors
/// No such file or adapter, a file of another purpose, a base model that is known not to be there, a key of another request.
pub async fn create(jobs: &Jobs, hub: &Hub, owner: &str, spec: JobSpec, request: Request<'_>) -> Result<Job> {
    if let Some(job) = repeated(&mut *jobs.store.read().await?, owner, request).await? {
        return Ok(job);
    }
    let base_name = check_model(hub, &spec.model).await?;
    let unique: String = rand::rng().sample_iter(Alphanumeric).take(8).map(char::from).collect();
    let now_ms = now_ms();
    let job = Job {
        id: JobId::new(),
        owner: owner.to_owned(),
        status: Status::ValidatingFiles,
        model_name: model_name(&base_name, spec.suffix.as_deref(), &unique),
        spec,
        trained_tokens: None,
        total_steps: None,
        result_file_id: None,
        error: None,
        attempts_without_progress: 0,
        created_at_ms: now_ms,
        validated_at_ms: None,
        started_at_ms: None,
        finished_at_ms: None,
    };
    let mut tx = jobs.store.begin_write().await?;
    if let Some(job) = repeated(&mut tx, owner, request).await? {
        return Ok(job);
    }
    files_of(&mut tx, owner, &job.spec, now_ms).await?;
    if let Some(InitFrom { name, artifact_id, .. }) = &job.spec.init_from
        && store::artifact::find(&mut tx, *artifact_id, owner).await?.is_none()
    {
        return Err(Error::NoSuchAdapter(name.clone()));
    }
    store::job::insert(&mut tx, &job, request).await?;
    store::event::append(&mut tx, job.id, &NewEvent::created(job.id), now_ms).await?;
    let JobSpec { training_file, validation_file, .. } = job.spec;
    store::event::append(&mut tx, job.id, &NewEvent::validating(training_file, validation_file), now_ms).await?;
    tx.commit().await?;
    tracing::info!(job.id = %job.id, model = job.spec.model, "job created");
    jobs.tell_readers();
    jobs.tell_scheduler();
    Ok(job)
}

/// Checks what can be checked of a job that is not created, and gives its files.
///
/// # Errors
/// No such file, a file of another purpose, a base model that is known not to be there.
pub async fn check(jobs: &Jobs, hub: &Hub, owner: &str, spec: &JobSpec) -> Result<(File, Option<File>)> {
    check_model(hub, &spec.model).await?;
    files_of(&mut *jobs.store.read().await?, owner, spec, now_ms()).await
}

/// The data sets that a specification names.
async fn files_of(
    conn: &mut SqliteConnection,
    owner: &str,
    spec: &JobSpec,
    now_ms: i64,
) -> Result<(File, Option<File>)> {
    let training = store::file::find(conn, spec.training_file, owner, now_ms).await?;
    let training = training.ok_or(Error::NoSuchTrainingFile(spec.training_file))?;
    check_purpose("training_file", &training)?;
    let Some(id) = spec.validation_file else { return Ok((training, None)) };
    let validation = store::file::find(conn, id, owner, now_ms).await?;
    let validation = validation.ok_or(Error::NoSuchValidationFile(id))?;
    check_purpose("validation_file", &validation)?;
    Ok((training, Some(validation)))
}

fn check_purpose(field: &'static str, file: &File) -> Result<()> {
    let purpose = file.purpose;
    if purpose == Purpose::FineTune { Ok(()) } else { Err(Error::WrongPurpose { field, purpose }) }
}

/// The job that this request made when it came before.
async fn repeated(conn: &mut SqliteConnection, owner: &str, request: Request<'_>) -> Result<Option<Job>> {
    let Some(key) = request.idempotency_key else {
        if !request.is_retry {
            return Ok(None);
        }
        let made = store::job::by_body(conn, owner, request.body, now_ms() - RETRIED_WITHIN_MS).await?;
        return Ok(match made {
            Some(id) => store::job::find(conn, id, owner).await?,
            None => None,
        });
    };
    let Some((id, body)) = store::job::by_idempotency_key(conn, owner, key).await? else { return Ok(None) };
    if body != request.body {
        return Err(Error::IdempotencyKeyReused { key: key.to_owned(), job: id });
    }
    Ok(store::job::find(conn, id, owner).await?)
}

/// The name that models made of this base get from it.
///
/// # Errors
/// A base that is known not to be there.
async fn check_model(hub: &Hub, model: &str) -> Result<String> {
    has_model(hub, model).await?;
    Ok(Reference::parse(model)?.name_base())
}

/// Whether the base model's file is on this machine; else it would have to be downloaded.
///
/// # Errors
/// A base that is known not to be there.
pub async fn has_model(hub: &Hub, model: &str) -> Result<bool> {
    let (hub, model) = (hub.clone(), model.to_owned());
    Ok(tokio::task::spawn_blocking(move || hub.locate(&model)).await??.is_some())
}
