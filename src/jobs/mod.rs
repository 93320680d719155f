//! Use cases: everything that changes a job, a file or an attempt, each in one short write transaction.

pub mod add_file;
pub mod append_events;
pub mod cancel;
pub mod claim;
pub mod create;
pub mod delete_file;
pub mod delete_job;
pub mod delete_model;
pub mod devices;
pub mod exports;
pub mod find_adapter;
pub mod finish_attempt;
pub mod give_task;
pub mod heartbeat;
pub mod inspector;
pub mod keys;
pub mod launcher;
pub mod pause;
pub mod put_artifact;
pub mod put_checkpoint;
pub mod rerun;
pub mod resume;
mod retention;
pub mod scheduler;
pub mod sweep;
#[cfg(test)]
mod testing;
pub mod uploads;

use std::sync::Arc;
use std::time::Duration;

use sqlx::SqliteConnection;
use tokio::sync::{Notify, watch};

use crate::hub;
use crate::storage::{self, Storage};
use crate::store::{self, Store};
use crate::types::file::Purpose;
use crate::types::ids::{FileId, JobId};
use crate::types::inspection::Refusal;
use crate::types::job::{Job, Status};

/// How long the removal of an object that nobody needs may hold up what it belongs to.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(5);
/// Objects that could not be removed after which the others are left for later.
const MOST_REMOVAL_FAILURES: u32 = 5;

/// Why a use case did not come about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This owner has no such file.
    #[error("No such File object: {0}")]
    NoSuchFile(String),
    /// The file that a job is to train on is not there.
    #[error("training_file `{0}` does not exist")]
    NoSuchTrainingFile(FileId),
    /// The file that a job is to evaluate is not there.
    #[error("validation_file `{0}` does not exist")]
    NoSuchValidationFile(FileId),
    /// This owner has no such upload.
    #[error("No such Upload object: {0}")]
    NoSuchUpload(String),
    /// An upload cannot go on like that.
    #[error("{message}")]
    Upload {
        /// The request's field.
        param: &'static str,
        /// Names the field and the value, and what would be right.
        message: String,
    },
    /// No adapter has this id, and no finished model with an adapter this name.
    #[error(
        "lora.init_from must be the id of an adapter artifact or the name of a fine-tuned model with one, got `{0}`"
    )]
    NoSuchAdapter(String),
    /// This owner has no such job.
    #[error("Could not find fine tune: {0}")]
    NoSuchJob(String),
    /// The file is not one to train on.
    #[error("{field} must have purpose fine-tune, got `{purpose}`")]
    WrongPurpose {
        /// The request's field.
        field: &'static str,
        /// The file's purpose.
        purpose: Purpose,
    },
    /// The file is needed.
    #[error("file {file} is used by unfinished job {job}: cancel the job, or wait for its end")]
    FileInUse {
        /// The file.
        file: FileId,
        /// The job that needs it.
        job: JobId,
    },
    /// The job has come to its end already.
    #[error("job {job} cannot be {done}: its status is {status}")]
    JobHasEnded {
        /// The job.
        job: JobId,
        /// What was asked for, as a participle.
        done: &'static str,
        /// Its state.
        status: Status,
    },
    /// The job, or something of it, is needed.
    #[error("job {job} cannot be deleted: {reason}")]
    NotDeletable {
        /// The job.
        job: JobId,
        /// Who needs it.
        reason: String,
    },
    /// An artifact cannot be made of the job.
    #[error("no artifact can be made of job {job}: {reason}")]
    NotExportable {
        /// The job.
        job: JobId,
        /// What is missing.
        reason: String,
    },
    /// The model is needed.
    #[error("model `{model}` cannot be deleted: {reason}")]
    ModelInUse {
        /// Its name.
        model: String,
        /// Who needs it.
        reason: String,
    },
    /// Another request had this key.
    #[error("Idempotency-Key `{key}` was used for job {job} with another body")]
    IdempotencyKeyReused {
        /// The key.
        key: String,
        /// The job that it made.
        job: JobId,
    },
    /// The base model cannot be used.
    #[error(transparent)]
    Model(#[from] hub::Error),
    /// The attempt is over, or its job is: nothing of it is wanted any more.
    #[error("the attempt has ended")]
    AttemptEnded,
    /// The worker sent something that cannot be.
    #[error("{0}")]
    Worker(String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Object storage failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// As many data sets are being looked into as may be.
    #[error("other data sets are being looked into, try again in a few seconds")]
    TooManyInspections,
    /// Looking into a data set takes too long.
    #[error("the answer takes longer than {seconds} s (limits.inspection_seconds)")]
    InspectionTooLong {
        /// The limit.
        seconds: u64,
    },
    /// This machine refused what looking into a data set takes.
    #[error("a process that looks into data failed: {0:#}")]
    Inspector(anyhow::Error),
    /// A data set cannot be looked into.
    #[error("the data cannot be looked into: {0}")]
    Inspection(String),
    /// Looking into a data set found that it cannot be used.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// A thread of the server's own died.
    #[error("a background task failed: {0}")]
    Background(#[from] tokio::task::JoinError),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// The use cases' result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// This owner's job.
async fn find_job(conn: &mut SqliteConnection, owner: &str, id: JobId) -> Result<Job> {
    let job = store::job::find(conn, id, owner).await?;
    job.ok_or_else(|| Error::NoSuchJob(id.to_string()))
}

/// What the use cases work with; clones share it.
#[derive(Debug, Clone)]
pub struct Jobs {
    /// The database.
    pub store: Store,
    /// Object storage.
    pub storage: Storage,
    events: Arc<watch::Sender<u64>>,
    scheduler: Arc<Notify>,
}

impl Jobs {
    /// The use cases over this database and this object storage.
    pub fn new(store: Store, storage: Storage) -> Self {
        Self { store, storage, events: Arc::new(watch::Sender::new(0)), scheduler: Arc::default() }
    }

    /// Changes whenever some job's story has grown; it saves waiting and carries no facts.
    pub fn event_news(&self) -> watch::Receiver<u64> {
        self.events.subscribe()
    }

    /// Resolves once the scheduler may find something to do; it saves waiting and carries no facts.
    pub async fn scheduler_news(&self) {
        self.scheduler.notified().await;
    }

    fn tell_readers(&self) {
        self.events.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn tell_scheduler(&self) {
        self.scheduler.notify_one();
    }

    /// Removes objects that no row names any more, and counts them. One that stays behind does no harm but its size, and the sweep
    /// finds it; so nobody waits for the rest once storage takes its time or has failed a few times.
    async fn remove_objects(&self, keys: impl IntoIterator<Item = String>) -> usize {
        let (mut keys, mut count, mut failures) = (keys.into_iter(), 0, 0);
        while let Some(key) = keys.next() {
            let deleted = tokio::time::timeout(REMOVAL_PATIENCE, self.storage.delete(&key)).await;
            let Err(error) = deleted.unwrap_or(Err(storage::Error::Silent(REMOVAL_PATIENCE))) else {
                count += 1;
                continue;
            };
            tracing::warn!(key, %error, "an object that nobody needs could not be removed, a later sweep will");
            failures += 1;
            if failures == MOST_REMOVAL_FAILURES || matches!(error, storage::Error::Silent(_)) {
                let left = keys.count();
                tracing::warn!(left, "other objects that nobody needs are left to a later sweep");
                break;
            }
        }
        count
    }
}
