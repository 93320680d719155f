//! A worker hands in an artifact: first the bytes, then the row that names them.

use std::error::Error as StdError;

use bytes::Bytes;
use futures::Stream;

use super::append_events::working_job;
use super::{Error, Jobs, Result, exports};
use crate::storage::artifact_key;
use crate::store;
use crate::types::artifact::{Artifact, ArtifactRequest};
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::ids::ArtifactId;
use crate::types::now_ms;
use crate::types::worker_protocol::ArtifactQuery;

/// Stores an artifact in the place of what an earlier attempt handed in.
///
/// # Errors
/// The attempt has ended, nobody asked for this artifact, the body breaks off or has another hash than was said.
pub async fn put_artifact<S, E>(jobs: &Jobs, attempt: &Attempt, query: ArtifactQuery, body: S) -> Result<()>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: Into<Box<dyn StdError + Send + Sync>>,
{
    let parity = query.parity.as_deref().map(str::parse).transpose().map_err(Error::Worker)?;
    let id = ArtifactId::new();
    let object_key = artifact_key(&attempt.job_id.to_string(), &id.to_string());
    let stored = jobs.storage.put(&object_key, body, None).await?;
    let mut artifact = Artifact {
        id,
        job_id: attempt.job_id,
        attempt_id: attempt.id,
        kind: query.kind,
        quantization: query.quantization,
        filename: query.filename,
        object_key: object_key.clone(),
        size_bytes: i64::try_from(stored.size_bytes).unwrap_or(i64::MAX),
        sha256: stored.sha256,
        parity,
        created_at_ms: now_ms(),
    };
    let added = if artifact.sha256 == query.sha256 {
        add(jobs, attempt, &mut artifact).await
    } else {
        Err(Error::Worker(format!("the body has sha256 {}, announced was {}", artifact.sha256, query.sha256)))
    };
    match added {
        Ok(replaced) => {
            jobs.remove_objects(replaced).await;
            Ok(())
        }
        Err(error) => {
            jobs.remove_objects([object_key]).await;
            Err(error)
        }
    }
}

async fn add(jobs: &Jobs, attempt: &Attempt, artifact: &mut Artifact) -> Result<Option<String>> {
    let mut tx = jobs.store.begin_write().await?;
    if attempt.task == TaskKind::Export {
        let added = exports::add_artifact(&mut tx, attempt, artifact).await?;
        tx.commit().await?;
        return Ok((!added).then(|| artifact.object_key.clone()));
    }
    let job = working_job(&mut tx, attempt.id).await?;
    let request = ArtifactRequest { kind: artifact.kind, quantization: artifact.quantization };
    if !job.spec.artifacts.contains(&request) {
        let message = format!("job {} asks for no artifact of type {} like this", job.id, artifact.kind);
        return Err(Error::Worker(message));
    }
    let replaced = store::artifact::replace(&mut tx, artifact).await?;
    tx.commit().await?;
    Ok(replaced)
}
