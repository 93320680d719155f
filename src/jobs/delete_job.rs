//! A job goes, with everything that it left.

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::attempt::TaskKind;
use crate::types::ids::{AttemptId, JobId};

/// Removes this owner's finished job: events, metrics, attempts, checkpoints and artifacts in one transaction, then their
/// bytes. Its result file stays, it is a file of its own. Gives the attempts, whose logs nobody can ask for any more.
///
/// # Errors
/// No such job, one that is not finished, whose worker still runs, or whose adapter an unfinished job begins with.
pub async fn delete_job(jobs: &Jobs, owner: &str, id: JobId) -> Result<Vec<AttemptId>> {
    let refused = |reason: String| Err(Error::NotDeletable { job: id, reason });
    let mut tx = jobs.store.begin_write().await?;
    // Its state alone: one that another build wrote, and this one cannot read, can be removed too.
    let Some(status) = store::job::status(&mut tx, id, owner).await? else {
        return Err(Error::NoSuchJob(id.to_string()));
    };
    if !status.is_final() {
        return refused(format!("its status is {status}, cancel it first"));
    }
    let attempts = store::attempt::of_job(&mut tx, id).await?;
    if let Some(attempt) = attempts.iter().find(|attempt| attempt.ended_at_ms.is_none()) {
        let until = if attempt.task == TaskKind::Export { "when its export is made" } else { "in a few seconds" };
        return refused(format!("attempt {} of it has not ended yet, try again {until}", attempt.id));
    }
    if let Some(user) = store::job::unfinished_with_adapter_of(&mut tx, id).await? {
        return refused(format!("the unfinished job {user} begins with its adapter (lora.init_from)"));
    }
    store::event::delete_of_job(&mut tx, id).await?;
    store::metric::delete_of_job(&mut tx, id).await?;
    store::export::delete_of_job(&mut tx, id).await?;
    let mut keys = store::checkpoint::delete_of_job(&mut tx, id).await?;
    keys.extend(store::artifact::delete_of_job(&mut tx, id).await?);
    store::attempt::delete_of_job(&mut tx, id).await?;
    store::job::delete(&mut tx, id).await?;
    tx.commit().await?;
    tracing::info!(job.id = %id, "job deleted");
    jobs.tell_readers();
    jobs.remove_objects(keys).await;
    Ok(attempts.into_iter().map(|attempt| attempt.id).collect())
}
