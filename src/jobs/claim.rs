//! A job is taken up: the scheduler gets an attempt to start, and no other scheduler gets the same.

use std::time::Duration;

use secrecy::SecretString;
use sha2::{Digest, Sha256};

use super::{Jobs, Result};
use crate::store;
use crate::store::attempt::NewAttempt;
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::event::NewEvent;
use crate::types::ids::AttemptId;
use crate::types::job::{Job, Status};
use crate::types::now_ms;

/// An attempt to start, and the token that its worker shows.
#[derive(Debug)]
pub struct Claimed {
    /// The attempt, in state `starting`.
    pub attempt: Attempt,
    /// Its job.
    pub job: Job,
    /// What the worker proves with that it is this attempt's; the database has only its hash.
    pub token: SecretString,
}

/// The hash by which the database knows a token.
pub fn token_sha256(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

/// Takes up the next job that has to be validated, or trained, on `device`. `None`: there is none.
///
/// # Errors
/// The database failed.
pub async fn claim(jobs: &Jobs, task: TaskKind, device: &str, lease: Duration) -> Result<Option<Claimed>> {
    let now_ms = now_ms();
    let mut tx = jobs.store.begin_write().await?;
    let next = match task {
        TaskKind::Validate => store::job::next_to_validate(&mut tx).await?,
        TaskKind::Train => store::job::next_to_train(&mut tx).await?,
    };
    let Some(mut job) = next else { return Ok(None) };
    if job.status == Status::Queued {
        store::job::transition(&mut tx, job.id, Status::Queued, Status::Running, now_ms).await?;
        store::event::append(&mut tx, job.id, &NewEvent::started(), now_ms).await?;
        job.status = Status::Running;
    }
    let token = hex::encode(rand::random::<[u8; 32]>());
    let attempt = NewAttempt {
        id: AttemptId::new(),
        task,
        device: device.to_owned(),
        token_sha256: token_sha256(&token),
        lease_expires_at_ms: now_ms + i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 2),
    };
    let inserted = store::attempt::insert(&mut tx, job.id, &attempt, now_ms).await?;
    let attempt = store::attempt::find(&mut tx, attempt.id).await?;
    let Some(attempt) = attempt.filter(|_| inserted) else { return Ok(None) };
    tx.commit().await?;
    tracing::info!(job.id = %job.id, attempt = %attempt.id, number = attempt.number, %task, device, "attempt claimed");
    jobs.tell_readers();
    Ok(Some(Claimed { attempt, job, token: SecretString::from(token) }))
}
