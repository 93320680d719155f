//! The table `job`.

use sqlx::SqliteConnection;

use super::{Error, Result, to_json};
use crate::types::ids::{FileId, JobId};
use crate::types::job::{Job, JobError, Metadata, Status};

struct Row {
    id: JobId,
    owner: String,
    status: Status,
    spec: String,
    model_name: String,
    trained_tokens: Option<i64>,
    total_steps: Option<i64>,
    result_file_id: Option<FileId>,
    error_code: Option<String>,
    error_message: Option<String>,
    error_param: Option<String>,
    attempts_without_progress: i64,
    created_at_ms: i64,
    validated_at_ms: Option<i64>,
    started_at_ms: Option<i64>,
    finished_at_ms: Option<i64>,
}

impl TryFrom<Row> for Job {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self> {
        let error = match (row.error_code, row.error_message) {
            (Some(code), Some(message)) => Some(JobError { code, message, param: row.error_param }),
            _ => None,
        };
        let spec = serde_json::from_str(&row.spec);
        Ok(Self {
            id: row.id,
            owner: row.owner,
            status: row.status,
            spec: spec.map_err(|source| Error::UnreadableJob { id: row.id, status: row.status, source })?,
            model_name: row.model_name,
            trained_tokens: row.trained_tokens,
            total_steps: row.total_steps,
            result_file_id: row.result_file_id,
            error,
            attempts_without_progress: row.attempts_without_progress,
            created_at_ms: row.created_at_ms,
            validated_at_ms: row.validated_at_ms,
            started_at_ms: row.started_at_ms,
            finished_at_ms: row.finished_at_ms,
        })
    }
}

/// A request as it came.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its body.
    pub body: &'a str,
    /// Its `Idempotency-Key`: the same key and body are the same job.
    pub idempotency_key: Option<&'a str>,
    /// The client says that it sent it before.
    pub is_retry: bool,
}

/// Adds a job, with the request that asked for it.
///
/// # Errors
/// The database failed.
pub async fn insert(conn: &mut SqliteConnection, job: &Job, request: Request<'_>) -> Result<()> {
    let spec = to_json("job.spec", &job.spec)?;
    sqlx::query!(
        "insert into job (id, owner, status, base_model, request, idempotency_key, spec, training_file_id, validation_file_id,
                          model_name, priority, created_at_ms)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        job.id,
        job.owner,
        job.status,
        job.spec.model,
        request.body,
        request.idempotency_key,
        spec,
        job.spec.training_file,
        job.spec.validation_file,
        job.model_name,
        job.spec.priority,
        job.created_at_ms,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The job.
///
/// # Errors
/// The database failed.
pub async fn get(conn: &mut SqliteConnection, id: JobId) -> Result<Option<Job>> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: JobId", owner, status as "status: Status", spec, model_name, trained_tokens, total_steps,
                  result_file_id as "result_file_id: FileId", error_code, error_message, error_param,
                  attempts_without_progress, created_at_ms, validated_at_ms, started_at_ms, finished_at_ms
             from job where id = ?"#,
        id,
    )
    .fetch_optional(conn)
    .await?;
    row.map(Job::try_from).transpose()
}

/// The job, if this owner has it.
///
/// # Errors
/// The database failed.
pub async fn find(conn: &mut SqliteConnection, id: JobId, owner: &str) -> Result<Option<Job>> {
    Ok(get(conn, id).await?.filter(|job| job.owner == owner))
}

/// The state of the job, if this owner has it: also of one that this build cannot read.
///
/// # Errors
/// The database failed.
pub async fn status(conn: &mut SqliteConnection, id: JobId, owner: &str) -> Result<Option<Status>> {
    let status =
        sqlx::query_scalar!(r#"select status as "status: Status" from job where id = ? and owner = ?"#, id, owner,)
            .fetch_optional(conn)
            .await?;
    Ok(status)
}

/// The job whose model of this owner has that name.
///
/// # Errors
/// The database failed.
pub async fn by_model_name(conn: &mut SqliteConnection, owner: &str, name: &str) -> Result<Option<Job>> {
    match id_by_model_name(conn, owner, name).await? {
        Some(id) => get(conn, id).await,
        None => Ok(None),
    }
}

/// The id of the job whose model of this owner has that name, unless the model was deleted.
///
/// # Errors
/// The database failed.
pub async fn id_by_model_name(conn: &mut SqliteConnection, owner: &str, name: &str) -> Result<Option<JobId>> {
    let id = sqlx::query_scalar!(
        r#"select id as "id: JobId" from job
            where owner = ? and model_name = ? and status = 'succeeded' and model_deleted_at_ms is null"#,
        owner,
        name,
    )
    .fetch_optional(conn)
    .await?;
    Ok(id)
}

/// The model of a job is not there any more.
///
/// # Errors
/// The database failed.
pub async fn set_model_deleted(conn: &mut SqliteConnection, id: JobId, now_ms: i64) -> Result<()> {
    sqlx::query!("update job set model_deleted_at_ms = ? where id = ?", now_ms, id).execute(conn).await?;
    Ok(())
}

/// The job that this owner asked for under that key, and the body that asked for it.
///
/// # Errors
/// The database failed.
pub async fn by_idempotency_key(
    conn: &mut SqliteConnection,
    owner: &str,
    key: &str,
) -> Result<Option<(JobId, String)>> {
    let row = sqlx::query!(
        r#"select id as "id: JobId", request from job where owner = ? and idempotency_key = ?"#,
        owner,
        key,
    )
    .fetch_optional(conn)
    .await?;
    Ok(row.map(|row| (row.id, row.request)))
}

/// This owner's newest job that the same body asked for since then.
///
/// # Errors
/// The database failed.
pub async fn by_body(conn: &mut SqliteConnection, owner: &str, body: &str, since_ms: i64) -> Result<Option<JobId>> {
    let id = sqlx::query_scalar!(
        r#"select id as "id: JobId" from job
            where owner = ? and created_at_ms >= ? and request = ? order by created_at_ms desc limit 1"#,
        owner,
        since_ms,
        body,
    )
    .fetch_optional(conn)
    .await?;
    Ok(id)
}

/// Which jobs a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only those older than this one.
    pub after: Option<JobId>,
    /// Only those with all of these labels.
    pub metadata: Metadata,
    /// Only those without labels.
    pub without_metadata: bool,
    /// At most so many.
    pub limit: i64,
}

/// This owner's jobs, newest first; one that cannot be read hides none of the others.
///
/// # Errors
/// The database failed.
pub async fn list(conn: &mut SqliteConnection, owner: &str, filter: &Filter) -> Result<Vec<Job>> {
    let mut filter = filter.clone();
    let mut jobs = Vec::new();
    while filter.limit > 0 {
        let rows = rows(conn, owner, &filter).await?;
        let Some(last) = rows.last().map(|row| row.id) else { break };
        filter.after = Some(last);
        for row in rows {
            match Job::try_from(row) {
                Ok(job) => {
                    filter.limit -= 1;
                    jobs.push(job);
                }
                Err(error) => tracing::error!(%error, "a list leaves out a job"),
            }
        }
    }
    Ok(jobs)
}

async fn rows(conn: &mut SqliteConnection, owner: &str, filter: &Filter) -> Result<Vec<Row>> {
    let labels = to_json("job.spec", &filter.metadata)?;
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: JobId", owner, status as "status: Status", spec, model_name, trained_tokens, total_steps,
                  result_file_id as "result_file_id: FileId", error_code, error_message, error_param,
                  attempts_without_progress, created_at_ms, validated_at_ms, started_at_ms, finished_at_ms
             from job
            where owner = ?1 and (?2 is null or id < ?2)
              and (not ?3 or json_extract(spec, '$.metadata') is null)
              and not exists (select 1 from json_each(?4) as wanted
                               where not exists (select 1 from json_each(spec, '$.metadata') as label
                                                  where label.key = wanted.key and label.value = wanted.value))
            order by id desc limit ?5"#,
        owner,
        filter.after,
        filter.without_metadata,
        labels,
        filter.limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows)
}

/// The name of a fine-tuned model, or of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// `ft:…`.
    pub name: String,
    /// When it was made.
    pub created_at_ms: i64,
}

/// The models that this owner's jobs made, and their listed checkpoints, newest first.
///
/// # Errors
/// The database failed.
pub async fn models(conn: &mut SqliteConnection, owner: &str) -> Result<Vec<Model>> {
    let models = sqlx::query_as!(
        Model,
        r#"select name, created_at_ms as "created_at_ms!"
             from (select model_name as name, finished_at_ms as created_at_ms
                     from job where owner = ?1 and status = 'succeeded' and model_deleted_at_ms is null
                   union all
                   select checkpoint.model_name as name, checkpoint.created_at_ms as created_at_ms
                     from checkpoint join job on job.id = checkpoint.job_id
                    where job.owner = ?1 and checkpoint.listed = 1)
            order by created_at_ms desc, name"#,
        owner,
    )
    .fetch_all(conn)
    .await?;
    Ok(models)
}

/// The base model of this owner's newest job on a file.
///
/// # Errors
/// The database failed.
pub async fn model_of_file(conn: &mut SqliteConnection, owner: &str, file_id: FileId) -> Result<Option<String>> {
    let model = sqlx::query_scalar!(
        "select base_model from job where training_file_id = ? and owner = ? order by id desc limit 1",
        file_id,
        owner,
    )
    .fetch_optional(conn)
    .await?;
    Ok(model)
}

/// The next job in that state that no attempt works for: by priority, then the oldest. One state, so that the index gives them in
/// this order and a long queue costs nothing.
///
/// # Errors
/// The database failed.
pub async fn next_in(conn: &mut SqliteConnection, status: Status) -> Result<Option<Job>> {
    let row = sqlx::query_as!(
        Row,
        r#"select id as "id: JobId", owner, status as "status: Status", spec, model_name, trained_tokens, total_steps,
                  result_file_id as "result_file_id: FileId", error_code, error_message, error_param,
                  attempts_without_progress, created_at_ms, validated_at_ms, started_at_ms, finished_at_ms
             from job
            where status = ?
              and not exists (select 1 from attempt where attempt.job_id = job.id and attempt.state <> 'ended')
            order by priority desc, id limit 1"#,
        status,
    )
    .fetch_optional(conn)
    .await?;
    row.map(Job::try_from).transpose()
}

/// Takes a job from one state to the next; `false`: it was not in that state any more.
///
/// # Errors
/// The database failed.
pub async fn transition(conn: &mut SqliteConnection, id: JobId, from: Status, to: Status, now_ms: i64) -> Result<bool> {
    debug_assert!(from.may_become(to), "{from} may not become {to}");
    let is_final = to.is_final();
    let done = sqlx::query!(
        "update job
            set status = ?2,
                validated_at_ms = case when ?1 = 'validating_files' and ?2 = 'queued' then ?3 else validated_at_ms end,
                started_at_ms = case when ?2 = 'running' then coalesce(started_at_ms, ?3) else started_at_ms end,
                finished_at_ms = case when ?4 then ?3 else finished_at_ms end
          where id = ?5 and status = ?1",
        from,
        to,
        now_ms,
        is_final,
        id,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Writes down why a job failed.
///
/// # Errors
/// The database failed.
pub async fn set_error(conn: &mut SqliteConnection, id: JobId, error: &JobError) -> Result<()> {
    sqlx::query!(
        "update job set error_code = ?, error_message = ?, error_param = ? where id = ?",
        error.code,
        error.message,
        error.param,
        id,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes down what a training came to.
///
/// # Errors
/// The database failed.
pub async fn set_result(
    conn: &mut SqliteConnection,
    id: JobId,
    result_file_id: FileId,
    trained_tokens: Option<i64>,
) -> Result<()> {
    sqlx::query!(
        "update job set result_file_id = ?, trained_tokens = ? where id = ?",
        result_file_id,
        trained_tokens,
        id
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Writes down how many steps the run has.
///
/// # Errors
/// The database failed.
pub async fn set_total_steps(conn: &mut SqliteConnection, id: JobId, total_steps: i64) -> Result<()> {
    sqlx::query!("update job set total_steps = ? where id = ?", total_steps, id).execute(conn).await?;
    Ok(())
}

/// Counts attempts in a row that left nothing: 0 begins anew.
///
/// # Errors
/// The database failed.
pub async fn set_attempts_without_progress(conn: &mut SqliteConnection, id: JobId, count: i64) -> Result<()> {
    sqlx::query!("update job set attempts_without_progress = ? where id = ?", count, id).execute(conn).await?;
    Ok(())
}

/// An unfinished job that needs this file.
///
/// # Errors
/// The database failed.
pub async fn unfinished_with_file(conn: &mut SqliteConnection, file_id: FileId) -> Result<Option<JobId>> {
    let id = sqlx::query_scalar!(
        r#"select id as "id: JobId" from job
            where (training_file_id = ?1 or validation_file_id = ?1)
              and status not in ('succeeded', 'failed', 'cancelled') limit 1"#,
        file_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(id)
}

/// An unfinished job whose training begins with an adapter of this one.
///
/// # Errors
/// The database failed.
pub async fn unfinished_with_adapter_of(conn: &mut SqliteConnection, id: JobId) -> Result<Option<JobId>> {
    let id = sqlx::query_scalar!(
        r#"select id as "id: JobId" from job
            where status not in ('succeeded', 'failed', 'cancelled')
              and json_extract(spec, '$.init_from.artifact_id') in (select artifact.id from artifact where artifact.job_id = ?)
            limit 1"#,
        id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(id)
}

/// Removes a job, after everything that belongs to it.
///
/// # Errors
/// The database failed.
pub async fn delete(conn: &mut SqliteConnection, id: JobId) -> Result<()> {
    sqlx::query!("delete from job where id = ?", id).execute(conn).await?;
    Ok(())
}
