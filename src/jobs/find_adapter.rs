//! What a request's `lora.init_from` names: an adapter that an earlier job made.

use super::{Error, Jobs, Result};
use crate::store;
use crate::types::artifact::{Artifact, ArtifactType};
use crate::types::job::Job;
use crate::types::job_spec::InitFrom;

/// This owner's adapter of that artifact id, or of the fine-tuned model of that name.
///
/// # Errors
/// No such adapter, or one whose job is not finished.
pub async fn find_adapter(jobs: &Jobs, owner: &str, name: String) -> Result<InitFrom> {
    let mut conn = jobs.store.read().await?;
    let found: Option<(Artifact, Job)> = match name.parse() {
        Ok(id) => match store::artifact::find(&mut conn, id, owner).await? {
            Some(artifact) => store::job::get(&mut conn, artifact.job_id).await?.map(|job| (artifact, job)),
            None => None,
        },
        Err(_) => match store::job::by_model_name(&mut conn, owner, &name).await? {
            Some(job) => {
                let made = store::artifact::list(&mut conn, job.id).await?;
                made.into_iter().find(|artifact| artifact.kind == ArtifactType::Adapter).map(|artifact| (artifact, job))
            }
            None => None,
        },
    };
    // An unfinished job may still put another one in its place.
    let adapter = found.filter(|(artifact, job)| artifact.kind == ArtifactType::Adapter && job.status.is_final());
    let (artifact, job) = adapter.ok_or_else(|| Error::NoSuchAdapter(name.clone()))?;
    Ok(InitFrom { name, artifact_id: artifact.id, lora: job.spec.train.lora })
}
