//! A worker hands in a checkpoint: first the bytes, then the row that names them.

use std::error::Error as StdError;

use bytes::Bytes;
use futures::Stream;
use serde_json::{Value, json};
use sqlx::SqliteConnection;

use super::append_events::reporting_job;
use super::{Error, Jobs, Result};
use crate::storage::checkpoint_key;
use crate::store;
use crate::types::attempt::Attempt;
use crate::types::checkpoint::Checkpoint;
use crate::types::event::NewEvent;
use crate::types::ids::{CheckpointId, JobId};
use crate::types::job::checkpoint_name;
use crate::types::now_ms;
use crate::types::worker_protocol::CheckpointQuery;

/// Stores a checkpoint; one of the same step that is there already stays, and the other unlisted ones go.
///
/// # Errors
/// The attempt has ended, the body breaks off or has another hash than was said.
pub async fn put_checkpoint<S, E>(jobs: &Jobs, attempt: &Attempt, query: &CheckpointQuery, body: S) -> Result<()>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let id = CheckpointId::new();
    let key = checkpoint_key(&attempt.job_id.to_string(), &id.to_string());
    let stored = jobs.storage.put(&key, body, None).await?;
    let added = if stored.sha256 == query.sha256 {
        let size_bytes = i64::try_from(stored.size_bytes).unwrap_or(i64::MAX);
        add(jobs, attempt, query, (id, key.clone(), size_bytes)).await
    } else {
        Err(Error::Worker(format!("the body has sha256 {}, announced was {}", stored.sha256, query.sha256)))
    };
    match added {
        Ok(superseded) => {
            jobs.tell_readers();
            jobs.remove_objects(superseded).await;
            Ok(())
        }
        Err(error) => {
            jobs.remove_objects([key]).await;
            Err(error)
        }
    }
}

/// Writes the row and gives back the keys of objects that no row names any more.
async fn add(
    jobs: &Jobs,
    attempt: &Attempt,
    query: &CheckpointQuery,
    (id, object_key, size_bytes): (CheckpointId, String, i64),
) -> Result<Vec<String>> {
    let (step, now_ms) = (i64::from(query.step), now_ms());
    let mut tx = jobs.store.begin_write().await?;
    let (job, _) = reporting_job(&mut tx, attempt.id).await?;
    let model_name = checkpoint_name(&job.model_name, step);
    let metrics = step_metrics(&mut tx, job.id, step).await?;
    let mut unneeded = Vec::new();
    let newly_listed = match store::checkpoint::of_step(&mut tx, job.id, step).await? {
        Some(existing) => {
            unneeded.push(object_key);
            let newly_listed = query.listed && !existing.listed;
            if newly_listed {
                store::checkpoint::set_listed(&mut tx, existing.id, &metrics).await?;
            }
            newly_listed
        }
        None => {
            let checkpoint = Checkpoint {
                id,
                job_id: job.id,
                attempt_id: attempt.id,
                step,
                listed: query.listed,
                model_name: model_name.clone(),
                object_key,
                size_bytes,
                sha256: query.sha256.clone(),
                metrics,
                created_at_ms: now_ms,
            };
            store::checkpoint::insert(&mut tx, &checkpoint).await?;
            query.listed
        }
    };
    if newly_listed {
        store::event::append(&mut tx, job.id, &NewEvent::checkpoint_created(step, &model_name), now_ms).await?;
    }
    unneeded.extend(store::checkpoint::delete_superseded(&mut tx, job.id, step).await?);
    tx.commit().await?;
    Ok(unneeded)
}

async fn step_metrics(conn: &mut SqliteConnection, job_id: JobId, step: i64) -> Result<Value> {
    let metric = store::metric::find(conn, job_id, step).await?;
    Ok(metric.map_or_else(|| json!({ "step": step }), |metric| metric.figures()))
}
