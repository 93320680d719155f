//! A tuned model goes: its artifacts, or the checkpoint that it is.

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::now_ms;

/// Removes this owner's fine-tuned model, with all artifacts of its job, or the checkpoint of that name. The job stays, with its
/// story. `false`: there is no such model.
///
/// # Errors
/// A model that an unfinished job begins with, or that an export is made of now; a checkpoint whose job is not finished.
pub async fn delete_model(jobs: &Jobs, owner: &str, name: &str) -> Result<bool> {
    let refused = |reason: String| Err(Error::ModelInUse { model: name.to_owned(), reason });
    let mut tx = jobs.store.begin_write().await?;
    let keys = if let Some(id) = store::job::id_by_model_name(&mut tx, owner, name).await? {
        if let Some(user) = store::job::unfinished_with_adapter_of(&mut tx, id).await? {
            return refused(format!("the unfinished job {user} begins with its adapter (lora.init_from)"));
        }
        let attempts = store::attempt::of_job(&mut tx, id).await?;
        if let Some(attempt) = attempts.iter().find(|attempt| attempt.ended_at_ms.is_none()) {
            return refused(format!("attempt {} works with it, try again when it has ended", attempt.id));
        }
        store::export::delete_of_job(&mut tx, id).await?;
        store::job::set_model_deleted(&mut tx, id, now_ms()).await?;
        store::artifact::delete_of_job(&mut tx, id).await?
    } else if let Some((id, job_id, status)) = store::checkpoint::by_model_name(&mut tx, owner, name).await? {
        if !status.is_final() {
            return refused(format!("its job {job_id} is not finished, and may go on from it"));
        }
        store::checkpoint::delete(&mut tx, id).await?
    } else {
        return Ok(false);
    };
    tx.commit().await?;
    tracing::info!(model = name, "model deleted");
    jobs.remove_objects(keys).await;
    Ok(true)
}
