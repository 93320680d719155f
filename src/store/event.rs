//! The table `job_event`: append-only, numbered without gaps within a job.

use sqlx::SqliteConnection;

use super::{Error, Result, from_json, to_json};
use crate::types::event::{Event, EventType, Level, NewEvent};
use crate::types::ids::{AttemptId, EventId, JobId};

/// Appends one of the server's own events.
///
/// # Errors
/// The database failed.
pub async fn append(conn: &mut SqliteConnection, job_id: JobId, event: &NewEvent, now_ms: i64) -> Result<()> {
    insert(conn, job_id, event, None, now_ms).await?;
    Ok(())
}

/// Appends a worker's event, unless this attempt's event of that number is there already.
///
/// # Errors
/// The database failed.
pub async fn append_from_worker(
    conn: &mut SqliteConnection,
    job_id: JobId,
    event: &NewEvent,
    (attempt_id, worker_seq): (AttemptId, i64),
    now_ms: i64,
) -> Result<bool> {
    insert(conn, job_id, event, Some((attempt_id, worker_seq)), now_ms).await
}

async fn insert(
    conn: &mut SqliteConnection,
    job_id: JobId,
    event: &NewEvent,
    source: Option<(AttemptId, i64)>,
    now_ms: i64,
) -> Result<bool> {
    let id = EventId::new();
    let (attempt_id, worker_seq) = (source.map(|source| source.0), source.map(|source| source.1));
    let data = event.data.as_ref().map(|data| to_json("job_event.data", data)).transpose()?;
    let done = sqlx::query!(
        "insert into job_event (job_id, seq, id, level, type, message, data, attempt_id, worker_seq, created_at_ms)
         values (?1, (select coalesce(max(seq), 0) + 1 from job_event where job_id = ?1), ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         on conflict (attempt_id, worker_seq) do nothing",
        job_id,
        id,
        event.level,
        event.kind,
        event.message,
        data,
        attempt_id,
        worker_seq,
        now_ms,
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

struct Row {
    id: EventId,
    seq: i64,
    level: Level,
    kind: EventType,
    message: String,
    data: Option<String>,
    created_at_ms: i64,
}

impl TryFrom<Row> for Event {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self> {
        let Row { id, seq, level, kind, message, data, created_at_ms } = row;
        let data = data.as_deref().map(|data| from_json("job_event.data", data)).transpose()?;
        Ok(Self { id, seq, level, kind, message, data, created_at_ms })
    }
}

/// The events after number `seq`, oldest first.
///
/// # Errors
/// The database failed.
pub async fn newer_than(conn: &mut SqliteConnection, job_id: JobId, seq: i64, limit: i64) -> Result<Vec<Event>> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: EventId", seq, level as "level: Level", type as "kind: EventType", message, data, created_at_ms
             from job_event where job_id = ? and seq > ? order by seq limit ?"#,
        job_id,
        seq,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter().map(Event::try_from).collect()
}

/// The events before number `seq`, newest first.
///
/// # Errors
/// The database failed.
pub async fn older_than(conn: &mut SqliteConnection, job_id: JobId, seq: i64, limit: i64) -> Result<Vec<Event>> {
    let rows = sqlx::query_as!(
        Row,
        r#"select id as "id: EventId", seq, level as "level: Level", type as "kind: EventType", message, data, created_at_ms
             from job_event where job_id = ? and seq < ? order by seq desc limit ?"#,
        job_id,
        seq,
        limit,
    )
    .fetch_all(conn)
    .await?;
    rows.into_iter().map(Event::try_from).collect()
}

/// The number of an event of this job.
///
/// # Errors
/// The database failed.
pub async fn seq_of(conn: &mut SqliteConnection, job_id: JobId, id: EventId) -> Result<Option<i64>> {
    let seq = sqlx::query_scalar!("select seq from job_event where job_id = ? and id = ?", job_id, id)
        .fetch_optional(conn)
        .await?;
    Ok(seq)
}

/// Removes the events of a job.
///
/// # Errors
/// The database failed.
pub async fn delete_of_job(conn: &mut SqliteConnection, job_id: JobId) -> Result<()> {
    sqlx::query!("delete from job_event where job_id = ?", job_id).execute(conn).await?;
    Ok(())
}
