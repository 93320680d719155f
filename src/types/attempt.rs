//! An attempt: one worker process's try at a task of a job.

use super::ids::{AttemptId, JobId};
use super::text::text_enum;

text_enum! {
    /// What a worker process is to do.
    pub enum TaskKind {
        /// Read the data set as the training will, and report what is wrong with it.
        Validate = "validate",
        /// Train, and make the artifacts.
        Train = "train",
        /// Make one more artifact of a job that has succeeded.
        Export = "export",
    }
}

text_enum! {
    /// How far an attempt is. A device is free, and a job may be tried again, only when it is `ended`.
    pub enum AttemptState {
        /// The process is being started.
        Starting = "starting",
        /// The worker has fetched its task.
        Running = "running",
        /// The worker was told to end its step, hand in a checkpoint, and stop.
        Pausing = "pausing",
        /// The worker was told to stop at once.
        Stopping = "stopping",
        /// The process is gone, or has said its last word.
        Ended = "ended",
    }
}

text_enum! {
    /// How an attempt ended.
    pub enum AttemptOutcome {
        /// The task is done.
        Succeeded = "succeeded",
        /// The task cannot be done, and the job failed.
        Failed = "failed",
        /// The worker stopped because it was told to.
        Stopped = "stopped",
        /// The process died, or went silent.
        Crashed = "crashed",
        /// The process ended because the server did; this is not held against the job.
        ServerEnded = "server_ended",
        /// The server could not start the process; this is not held against the job.
        NotStarted = "not_started",
    }
}

/// A row of the table `attempt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Its id.
    pub id: AttemptId,
    /// The job it works for.
    pub job_id: JobId,
    /// What it is to do.
    pub task: TaskKind,
    /// Counts the attempts of the job, from 1.
    pub number: i64,
    /// How far it is.
    pub state: AttemptState,
    /// The device it holds, `cpu` or `cuda:0` for one; a validation is on the `cpu` and holds none.
    pub device: String,
    /// Process id of the worker, which is also its process group.
    pub pid: Option<i64>,
    /// Start time of the process as the kernel tells it, so that a reused pid is not taken for it.
    pub process_start_time: Option<i64>,
    /// Until when silence is no death.
    pub lease_expires_at_ms: i64,
    /// When its worker last got something done.
    pub progress_at_ms: i64,
    /// How it ended.
    pub outcome: Option<AttemptOutcome>,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
}
