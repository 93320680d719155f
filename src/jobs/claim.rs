//! A job is taken up: the scheduler gets an attempt to start, and no other scheduler gets the same.

use std::time::Duration;

use secrecy::SecretString;
use sha2::{Digest, Sha256};
use sqlx::SqliteConnection;

use super::exports::claim_export;
use super::finish_attempt::fail_unreadable;
use super::{Jobs, Result};
use crate::store;
use crate::store::attempt::NewAttempt;
use crate::types::attempt::{Attempt, TaskKind};
use crate::types::device::Device;
use crate::types::event::NewEvent;
use crate::types::ids::{AttemptId, JobId};
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

/// Takes up the next job that has to be validated, or trained, or the next export, on `device`. `None`: there is none. A job that
/// cannot be read fails, so that it keeps none of the others waiting.
///
/// # Errors
/// The database failed.
pub async fn claim(jobs: &Jobs, task: TaskKind, device: Device, lease: Duration) -> Result<Option<Claimed>> {
    match task {
        TaskKind::Validate | TaskKind::Train => claim_job(jobs, task, device, lease).await,
        TaskKind::Export => claim_export(jobs, device, lease).await,
    }
}

async fn claim_job(jobs: &Jobs, task: TaskKind, device: Device, lease: Duration) -> Result<Option<Claimed>> {
    let now_ms = now_ms();
    let (mut tx, mut job) = loop {
        let mut tx = jobs.store.begin_write().await?;
        match next(&mut tx, task).await {
            Ok(Some(job)) => break (tx, job),
            Ok(None) => return Ok(None),
            Err(store::Error::UnreadableJob { id, status, source }) => {
                let keys = fail_unreadable(&mut tx, id, status, &source, now_ms).await?;
                tx.commit().await?;
                jobs.tell_readers();
                jobs.remove_objects(keys).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    if job.status == Status::Queued {
        store::job::transition(&mut tx, job.id, Status::Queued, Status::Running, now_ms).await?;
        store::event::append(&mut tx, job.id, &NewEvent::started(), now_ms).await?;
        job.status = Status::Running;
    }
    let begun = begin_attempt(&mut tx, job.id, task, device, lease).await?;
    let Some((attempt, token)) = begun else { return Ok(None) };
    tx.commit().await?;
    tracing::info!(job.id = %job.id, attempt = %attempt.id, number = attempt.number, %task, %device, "attempt claimed");
    jobs.tell_readers();
    Ok(Some(Claimed { attempt, job, token }))
}

/// Adds an attempt and gives it with its worker's token; `None`: the job has one that has not ended.
pub(super) async fn begin_attempt(
    conn: &mut SqliteConnection,
    job_id: JobId,
    task: TaskKind,
    device: Device,
    lease: Duration,
) -> Result<Option<(Attempt, SecretString)>> {
    let now_ms = now_ms();
    let token = hex::encode(rand::random::<[u8; 32]>());
    let attempt = NewAttempt {
        id: AttemptId::new(),
        task,
        device: device.to_string(),
        token_sha256: token_sha256(&token),
        lease_expires_at_ms: now_ms + i64::try_from(lease.as_millis()).unwrap_or(i64::MAX / 2),
    };
    if !store::attempt::insert(conn, job_id, &attempt, now_ms).await? {
        return Ok(None);
    }
    let attempt = store::attempt::find(conn, attempt.id).await?;
    Ok(attempt.map(|attempt| (attempt, SecretString::from(token))))
}

/// The next job that needs the task; one whose training was interrupted comes before one that waits.
async fn next(conn: &mut SqliteConnection, task: TaskKind) -> store::Result<Option<Job>> {
    match task {
        TaskKind::Validate => store::job::next_in(conn, Status::ValidatingFiles).await,
        TaskKind::Train => match store::job::next_in(conn, Status::Running).await? {
            None => store::job::next_in(conn, Status::Queued).await,
            interrupted => Ok(interrupted),
        },
        TaskKind::Export => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use crate::jobs::finish_attempt::attempt_lost;
    use crate::jobs::testing;
    use crate::store::job::{Filter, list};
    use crate::types::attempt::AttemptOutcome;

    #[tokio::test]
    async fn a_job_that_cannot_be_read_fails_and_holds_up_no_other() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let jobs = testing::jobs(folder.path()).await;
        let first = testing::add_job(&jobs).await;
        let attempt = testing::claim_next(&jobs).await.expect("the first job").attempt;
        let (second, third) = (testing::add_job(&jobs).await, testing::add_job(&jobs).await);
        testing::make_unreadable(&jobs, first).await;
        testing::make_unreadable(&jobs, second).await;

        assert_eq!(testing::claim_next(&jobs).await.expect("the third job").job.id, third);
        assert!(attempt_lost(&jobs, attempt.id, AttemptOutcome::ServerEnded, "gone").await.expect("an end"));
        for unreadable in [first, second] {
            let failed = ("failed".to_owned(), Some("unreadable_job".to_owned()));
            assert_eq!(testing::state(&jobs, unreadable).await, failed);
        }
        let last = testing::add_job(&jobs).await;
        for limit in 1..4 {
            let mut conn = jobs.store.read().await.expect("a connection");
            let listed = list(&mut conn, "default", &Filter { limit, ..Filter::default() }).await.expect("a list");
            let listed: Vec<_> = listed.iter().map(|job| job.id).collect();
            assert_eq!(listed, [last, third][..listed.len()]);
            assert_eq!(listed.len(), usize::try_from(limit.min(2)).expect("a small number"));
        }
    }
}
