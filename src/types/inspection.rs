//! What a process that looks into data sets is asked (`lorad inspect`, on stdin), and what it answers (on stdout).

use std::collections::BTreeMap;
use std::path::PathBuf;

use lorad_engine::spec::{Columns, DatasetOptions, TrainOptions, TrainSpec, TrainingOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::artifact::{ArtifactRequest, ArtifactType, Quantization};
use super::device::Device;
use super::file::File;
use super::job_spec::Invalid;

/// What is asked about, in the caller's words.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The base model.
    pub model: &'a str,
    /// Every hyperparameter.
    pub spec: &'a TrainSpec,
    /// The data set.
    pub training_file: &'a File,
    /// The data set whose loss is watched.
    pub validation_file: Option<&'a File>,
}

/// What is asked, and of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// The question.
    pub question: Question,
    /// The base model, as the request named it.
    pub model: String,
    /// Every hyperparameter.
    pub spec: TrainSpec,
    /// The data set's file.
    pub training_file: PathBuf,
    /// The file of the data set whose loss is watched.
    pub validation_file: Option<PathBuf>,
    /// Seconds after which nobody waits for the answer any more.
    pub seconds: u64,
}

/// What to find out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Question {
    /// What the data sets hold.
    Report,
    /// The first rows as the model will see them.
    Preview {
        /// How many.
        rows: usize,
    },
    /// What the training will need.
    Estimate {
        /// Files that it is to leave behind.
        artifacts: Vec<ArtifactRequest>,
        /// Memory that it may have; all that the machine has where none is given.
        memory_bytes: Option<u64>,
        /// What it will run on.
        device: Device,
    },
}

/// What was found out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Question::Report`].
    Report(Box<DatasetReports>),
    /// To [`Question::Preview`].
    Preview(DatasetPreview),
    /// To [`Question::Estimate`].
    Estimate(Estimate),
    /// The question has no answer, now or ever.
    Failed(Refusal),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// A word that programs can tell refusals apart by.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// The job request's field that is to blame.
    pub param: Option<String>,
}

/// The reports on a data set and on the one whose loss is watched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DatasetReports {
    /// The report on the file.
    pub training: DatasetReport,
    /// The report on the validation file.
    pub validation: Option<DatasetReport>,
    /// Special tokens that the rows use and the base model never learnt.
    pub untrained_tokens: Vec<String>,
    /// Why the file cannot be trained on.
    pub training_error: Option<String>,
    /// Why the validation file cannot be evaluated.
    pub validation_error: Option<String>,
}

/// What was found in a data set; lengths are in tokens of the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DatasetReport {
    /// alpaca, sharegpt, chat, completion or text; null where no row could be read.
    pub format: Option<String>,
    /// Rows in the file, bad ones too.
    pub rows: u64,
    /// Tokens of the usable rows, once each, after truncation.
    pub tokens: u64,
    /// Those of them that have a loss.
    pub trained_tokens: u64,
    /// Tokens that half of the rows do not exceed, before truncation.
    pub p50: u64,
    /// Tokens that 95% of the rows do not exceed, before truncation.
    pub p95: u64,
    /// Tokens of the longest row, before truncation.
    pub longest: u64,
    /// Rows by their tokens before truncation; each bin is twice as wide as the one before.
    pub histogram: Vec<LengthBin>,
    /// Rows cut at max_seq_length.
    pub truncated_rows: u64,
    /// Rows left out because nothing to train was left of them after the cut.
    pub dropped_rows: u64,
    /// Rows whose tokens are those of an earlier row.
    pub duplicates: Repeats,
    /// Rows whose tokens are those of a row of the training file; only in the report on a validation file.
    pub overlap: Option<Repeats>,
    /// Characters of the rows that the model's tokenizer has no token for.
    pub lost_characters: u64,
    /// Ids of the control tokens in the first 256 rows.
    pub control_tokens: Vec<u32>,
    /// Columns that the caller named and no row has: the format's name of the field, and the column's.
    pub missing_columns: BTreeMap<String, String>,
    /// Rows that cannot be used.
    pub bad_row_count: u64,
    /// The first 100 of them.
    pub bad_rows: Vec<BadRow>,
    /// Fields that no format knows, and in how many rows each was.
    pub ignored_fields: BTreeMap<String, u64>,
}

/// Rows of some length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LengthBin {
    /// Tokens that they do not exceed; those of the bin before are counted there.
    pub up_to: u64,
    /// How many rows.
    pub rows: u64,
}

/// Rows that were seen before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Repeats {
    /// How many.
    pub rows: u64,
    /// The lines at which the first 100 of them begin.
    pub lines: Vec<u64>,
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BadRow {
    /// Line of the file, from 1; where the row begins, or where its JSON breaks.
    pub line: u64,
    /// The row's number, from 1; blank lines are no rows.
    pub row: u64,
    /// JSON pointer to the field within the row; empty for the row itself.
    pub pointer: String,
    /// What is wrong, for programs.
    pub code: String,
    /// What is wrong, for people.
    pub message: String,
    /// What would be right.
    pub hint: String,
}

/// The first rows of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DatasetPreview {
    /// alpaca, sharegpt, chat, completion or text; null where no row could be read.
    pub format: Option<String>,
    /// The rows, bad ones too.
    pub rows: Vec<PreviewRow>,
}

/// A row as the model will see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PreviewRow {
    /// Line of the file, from 1, at which it begins.
    pub line: u64,
    /// The row's number, from 1.
    pub row: u64,
    /// What is wrong with it; such a row has no tokens.
    pub problem: Option<BadRow>,
    /// The whole text, special tokens included.
    pub text: String,
    /// Its tokens up to max_seq_length.
    pub tokens: Vec<PreviewToken>,
    /// Tokens that lie beyond max_seq_length.
    pub cut_tokens: u64,
}

/// A token of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PreviewToken {
    /// Its id.
    pub id: u32,
    /// Its text; bytes that are no whole character are U+FFFD.
    pub text: String,
    /// Whether it has a loss.
    pub trained: bool,
}

/// What a training will need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Estimate {
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Tokens that go through the model in training, prompts and padding included.
    pub tokens: u64,
    /// Tokens that go through it in evaluations.
    pub evaluated_tokens: u64,
    /// Tokens of the largest micro-batch.
    pub largest_micro_batch: u64,
    /// Blocks that keep their activations.
    pub kept_layers: u64,
    /// Blocks of the model.
    pub layers: u64,
    /// Values that are trained.
    pub trainable_parameters: u64,
    /// Tokens a second of the first micro-batch, measured now beside whatever else this machine does; null where it does not fit, and
    /// where it will run on a GPU, which others may be using.
    pub tokens_per_second: Option<f64>,
    /// Wall time of the steps and evaluations in seconds, at that rate.
    pub seconds: Option<f64>,
    /// Most memory that the worker will hold, in bytes, the base model's file included.
    pub peak_host_bytes: u64,
    /// What it will run on: `cpu`, or a GPU like `cuda:0`. Of several GPUs, that with the least memory.
    #[schema(value_type = String)]
    pub device: Device,
    /// Most memory of the GPU that it will hold, in bytes; null on the CPU.
    pub peak_device_bytes: Option<u64>,
    /// Memory that the GPU has, in bytes; null on the CPU.
    pub device_total_bytes: Option<u64>,
    /// Least memory of the device, this machine's for the CPU, that these settings can do with: below the peak where
    /// `gradient_checkpointing` is `auto`.
    pub least_bytes: u64,
    /// Memory of the device that a training may have.
    pub memory_bytes: u64,
    /// Whether least_bytes is within it.
    pub fits: bool,
    /// What to change so that it fits: empty where it does, null where no settings make it fit.
    pub nearest: Option<Vec<Change>>,
    /// Bytes of one checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of each artifact.
    pub artifacts: Vec<ArtifactBytes>,
}

/// A setting, and the value that would fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// Path of the field in the request.
    pub field: String,
    /// Its value.
    pub value: serde_json::Value,
}

/// How large an artifact will be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ArtifactBytes {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    pub quantization: Option<Quantization>,
    /// Its bytes; those of archives and of LoRA files without their headers, some kilobytes.
    pub bytes: u64,
}

/// How a data set is to be read, each setting as text where the caller gave it.
#[derive(Debug, Clone, Default)]
pub struct DatasetSettings {
    /// Row layout.
    pub format: Option<String>,
    /// The file's names for the format's fields.
    pub columns: Columns,
    /// The prompt's text.
    pub template: Option<String>,
    /// Which tokens have a loss.
    pub train_on: Option<String>,
    /// Tokens a row may have.
    pub max_seq_length: Option<u32>,
}

impl DatasetSettings {
    /// Every hyperparameter, those that do not matter to the data set at their defaults.
    ///
    /// # Errors
    /// The first setting that cannot be.
    pub fn resolve(self) -> Result<TrainSpec, Invalid> {
        let dataset = DatasetOptions {
            format: named("format", self.format)?,
            columns: (!self.columns.is_empty()).then_some(self.columns),
            template: named("template", self.template)?,
            train_on: named("train_on", self.train_on)?,
        };
        let training = TrainingOptions { max_seq_length: self.max_seq_length, ..TrainingOptions::default() };
        TrainSpec::resolve(&TrainOptions { training, dataset, ..TrainOptions::default() }).map_err(|error| {
            let param = error.field.rsplit('.').next().unwrap_or(error.field).to_owned();
            Invalid { param: Some(param), message: error.message }
        })
    }
}

/// A value by the name that it has in a job's request.
fn named<T: DeserializeOwned>(param: &str, text: Option<String>) -> Result<Option<T>, Invalid> {
    let Some(text) = text else { return Ok(None) };
    serde_json::from_value(text.into())
        .map(Some)
        .map_err(|error| Invalid { param: Some(param.to_owned()), message: format!("{param}: {error}") })
}
