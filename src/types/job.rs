//! A job: its states, the one function that says which may follow which, and its row.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ids::{FileId, JobId};
use super::job_spec::JobSpec;
use super::text::text_enum;

text_enum! {
    /// OpenAI's states of a job.
    pub enum Status {
        /// The data set is being read.
        ValidatingFiles = "validating_files",
        /// It waits for a device.
        Queued = "queued",
        /// It trains, or waits for the next attempt after a crash.
        Running = "running",
        /// It was put aside.
        Paused = "paused",
        /// The model is there.
        Succeeded = "succeeded",
        /// It could not be done.
        Failed = "failed",
        /// The caller did not want it any more.
        Cancelled = "cancelled",
    }
}

impl Status {
    /// Whether a job in this state may go over to `next`: the only place that says so.
    pub const fn may_become(self, next: Self) -> bool {
        match self {
            Self::ValidatingFiles => {
                matches!(next, Self::Queued | Self::Paused | Self::Failed | Self::Cancelled)
            }
            Self::Queued => matches!(next, Self::Running | Self::Paused | Self::Failed | Self::Cancelled),
            Self::Running => matches!(next, Self::Succeeded | Self::Paused | Self::Failed | Self::Cancelled),
            Self::Paused => matches!(next, Self::ValidatingFiles | Self::Queued | Self::Failed | Self::Cancelled),
            Self::Succeeded | Self::Failed | Self::Cancelled => false,
        }
    }

    /// Whether nothing can happen to the job any more.
    pub const fn is_final(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::ValidatingFiles | Self::Queued | Self::Running | Self::Paused => false,
        }
    }
}

/// Why a job failed, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct JobError {
    /// A word that programs can tell failures apart by.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// The request's field that is to blame.
    pub param: Option<String>,
}

/// A row of the table `job`.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Whose it is.
    pub owner: String,
    /// How far it is.
    pub status: Status,
    /// What the request asked for, resolved.
    pub spec: JobSpec,
    /// Name of the model that it makes, `ft:…`; the API shows it once the job has succeeded.
    pub model_name: String,
    /// Tokens that had a loss, over the whole run.
    pub trained_tokens: Option<i64>,
    /// Steps of the whole run, once the first is done.
    pub total_steps: Option<i64>,
    /// The file with the metrics of every step.
    pub result_file_id: Option<FileId>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// Attempts in a row that ended badly and left no new checkpoint.
    pub attempts_without_progress: i64,
    /// When it was made.
    pub created_at_ms: i64,
    /// When the data set was found good.
    pub validated_at_ms: Option<i64>,
    /// When it was first claimed for training.
    pub started_at_ms: Option<i64>,
    /// When it came to its end.
    pub finished_at_ms: Option<i64>,
}

/// OpenAI's free-form labels of a job.
pub type Metadata = BTreeMap<String, String>;

/// Name of a model that is made from `base_name`: `ft:{base}:lorad:{suffix}:{8 characters}`.
pub fn model_name(base_name: &str, suffix: Option<&str>, unique: &str) -> String {
    let base = base_name.replace(['/', ':'], "-");
    format!("ft:{base}:{}:{}:{unique}", super::ORGANIZATION, suffix.unwrap_or_default())
}

/// Name of the model as it was after `step`.
pub fn checkpoint_name(model_name: &str, step: i64) -> String {
    format!("{model_name}:ckpt-step-{step}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_follows_a_final_state_and_everything_can_be_cancelled_before() {
        for &from in Status::ALL {
            assert_eq!(from.may_become(Status::Cancelled), !from.is_final(), "{from}");
            assert_eq!(from.may_become(Status::Failed), !from.is_final(), "{from}");
            assert!(!from.may_become(from), "{from} is not its own successor");
            for &to in Status::ALL {
                assert!(!(from.is_final() && from.may_become(to)), "{from} → {to}");
            }
        }
    }

    #[test]
    fn only_a_running_job_succeeds_and_only_a_queued_one_runs() {
        for &from in Status::ALL {
            assert_eq!(from.may_become(Status::Succeeded), from == Status::Running);
            assert_eq!(from.may_become(Status::Running), from == Status::Queued);
        }
    }

    #[test]
    fn model_names_have_four_colons_whatever_the_base_is() {
        assert_eq!(model_name("org/a:b", None, "abcd1234"), "ft:org-a-b:lorad::abcd1234");
        assert_eq!(model_name("a", Some("x"), "abcd1234"), "ft:a:lorad:x:abcd1234");
        assert_eq!(checkpoint_name("ft:a:lorad::b", 7), "ft:a:lorad::b:ckpt-step-7");
    }
}
