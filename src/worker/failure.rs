//! Which errors fail a job for good, and what the job's owner is told; every other error ends only the attempt.

use std::path::PathBuf;

use crate::hub;
use crate::types::event::{EventType, Level};
use crate::types::worker_protocol::{Finish, INIT_FROM_PATH, TRAINING_FILE_PATH, VALIDATION_FILE_PATH, WorkerEvent};
use lorad_engine::data::Report;
use lorad_engine::train::Fit;

/// How serious it is, a sentence, figures.
type Finding = (Level, String, Option<serde_json::Value>);

/// Paths of this machine that an error may name and the job's owner must not see.
pub(super) struct Ours {
    /// The base model's file.
    pub(super) base: PathBuf,
    /// What the owner calls it.
    pub(super) base_name: String,
    /// Folder of this attempt's files.
    pub(super) scratch: PathBuf,
}

impl Ours {
    /// The message for the owner: the model goes by the name that the request gave it, a file of ours by its own.
    fn hide(&self, message: &str) -> String {
        let base = self.base.display().to_string();
        let scratch = format!("{}/", self.scratch.display());
        message.replace(&base, &self.base_name).replace(&scratch, "")
    }
}

/// What went wrong on the engine's thread.
pub(super) enum Fault {
    /// While the validation file was read.
    OfValidationFile(lorad_engine::Error),
    /// The training needs more memory than it may have.
    DoesNotFit(Fit),
    /// The GPU's memory ran out though the training has enough of what is free there: others had it, or took it.
    MemoryOfOthers(lorad_engine::Error),
    /// At any other time.
    Other(lorad_engine::Error),
}

impl From<lorad_engine::Error> for Fault {
    fn from(error: lorad_engine::Error) -> Self {
        Self::Other(error)
    }
}

/// The engine's error as the end of the job, if trying again could not help.
///
/// # Errors
/// The error itself, where another attempt may fare better (a full disk, a damaged download).
pub(super) fn of_engine(fault: Fault, ours: &Ours) -> anyhow::Result<Finish> {
    use lorad_engine::Error;
    use lorad_engine::data::DatasetError;
    let (error, param) = match fault {
        Fault::DoesNotFit(fit) => return Ok(failed("does_not_fit", fit.to_string(), Some("training"))),
        Fault::MemoryOfOthers(error) => return Err(error.into()),
        Fault::OfValidationFile(error) => (error, "validation_file"),
        Fault::Other(error) => (error, "training_file"),
    };
    let message = ours.hide(&error.to_string());
    match error {
        Error::Dataset(DatasetError::Io { .. })
        | Error::Io { .. }
        | Error::Tensor(_)
        | Error::Checkpoint(_)
        | Error::Device(_) => Err(error.into()),
        Error::Dataset(error) => {
            let events = error.report().map(|report| findings((report, &[]), None)).unwrap_or_default();
            let code = error.code().replace("training_file", param);
            Ok(Finish::Failed { code, message, param: Some(param.to_owned()), events })
        }
        Error::Model(_) | Error::UnsupportedArchitecture(_) | Error::Tokenizer(_) | Error::Template(_) => {
            tracing::info!(base = %ours.base.display(), "this base model cannot be used");
            Ok(failed("invalid_model", message, Some("model")))
        }
        Error::Spec(error) => Ok(failed("invalid_hyperparameters", message, Some(error.field))),
        Error::ReadBack(_) | Error::Adapter(_) => Ok(failed("export_failed", message, None)),
        Error::Training { .. } => Ok(failed("training_failed", message, None)),
        Error::DeviceMemory { .. } => Ok(failed("does_not_fit", message, Some("training"))),
    }
}

/// The hub's error as the end of the job, if trying again could not help.
///
/// # Errors
/// The error itself, where another attempt may fare better.
pub(super) fn of_hub(error: hub::Error) -> anyhow::Result<Finish> {
    let code = match error {
        hub::Error::NotFound { .. } | hub::Error::Unsupported { .. } => "model_not_found",
        hub::Error::WrongHash { .. } => "invalid_model",
        hub::Error::Download { .. } => "model_download_failed",
        hub::Error::Io { .. } => return Err(error.into()),
    };
    Ok(failed(code, error.to_string(), Some("model")))
}

/// The end of the job where the server does not have any more what the download `path` is to give.
pub(super) fn of_damaged(path: &str, how: &str) -> Finish {
    let (what, param) = match path {
        TRAINING_FILE_PATH => ("the training file", Some("training_file")),
        VALIDATION_FILE_PATH => ("the validation file", Some("validation_file")),
        INIT_FROM_PATH => ("the adapter to begin with", Some("lora.init_from")),
        _ => ("the checkpoint to go on from", None),
    };
    failed("object_damaged", format!("{what} cannot be read back from the server's storage: {how}"), param)
}

/// What the owner of the data sets should know about them; `untrained` are special tokens that the base model never learnt.
pub(super) fn findings((training, untrained): (&Report, &[String]), validation: Option<&Report>) -> Vec<WorkerEvent> {
    let of_validation = validation.map(|report| of_report(report, &[])).unwrap_or_default().into_iter();
    let of_validation =
        of_validation.map(|(level, message, data)| (level, format!("validation file: {message}"), data));
    let event = |(worker_seq, (level, message, data))| WorkerEvent {
        worker_seq,
        level,
        kind: EventType::Message,
        message,
        data,
    };
    (1..).zip(of_report(training, untrained).into_iter().chain(of_validation)).map(event).collect()
}

/// Every listed bad row, what was cut or left out, and which of its special tokens the base model never learnt.
fn of_report(report: &Report, untrained_tokens: &[String]) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        report.bad_rows.iter().map(|row| (Level::Error, row.to_string(), serde_json::to_value(row).ok())).collect();
    let unlisted = report.bad_row_count - report.bad_rows.len() as u64;
    if report.bad_row_count > 0 {
        let rest = if unlisted > 0 { format!(", {unlisted} of them not listed") } else { String::new() };
        let message = format!("{} of {} rows cannot be used{rest}", report.bad_row_count, report.rows);
        findings.push((Level::Error, message, None));
    }
    for (count, what) in [
        (report.truncated_rows, "row(s) are longer than max_seq_length and were cut"),
        (report.dropped_rows, "row(s) were left out: nothing to train on was left of them after the cut"),
        (report.duplicates.rows, "row(s) repeat an earlier one"),
        (report.lost_characters, "character(s) of the rows are lost: the model's tokenizer has no token for them"),
    ] {
        if count > 0 {
            findings.push((Level::Warn, format!("{count} {what}"), None));
        }
    }
    for (field, count) in &report.ignored_fields {
        findings.push((Level::Warn, format!("the field `{field}` of {count} row(s) was not looked at"), None));
    }
    if !untrained_tokens.is_empty() {
        let message = format!(
            "the base model never learnt {}, which the rows use: with a base that is no chat model, take dataset.template alpaca",
            untrained_tokens.join(", ")
        );
        findings.push((Level::Warn, message, None));
    }
    findings
}

fn failed(code: &str, message: String, param: Option<&str>) -> Finish {
    Finish::Failed { code: code.to_owned(), message, param: param.map(str::to_owned), events: Vec::new() }
}

#[cfg(test)]
mod tests {
    use lorad_engine::train::Change;

    use super::*;

    #[test]
    fn a_gpu_without_enough_memory_ends_the_job_and_one_that_others_used_only_the_attempt() {
        let ours = Ours { base: "/models/base.gguf".into(), base_name: "tiny".to_owned(), scratch: "/scratch".into() };
        let ran_out = || lorad_engine::Error::DeviceMemory { needed_bytes: 3 << 30, free_bytes: 1 << 30 };
        let change = |field: &str, value| Change { field: field.to_owned(), value };
        let mut fit = Fit { least_bytes: 3 << 30, memory_bytes: 2 << 30, fits: false, nearest: None };
        let told = |fit: &Fit| match of_engine(Fault::DoesNotFit(fit.clone()), &ours) {
            Ok(Finish::Failed { code, message, param, .. }) => {
                assert_eq!((code.as_str(), param.as_deref()), ("does_not_fit", Some("training")));
                message
            }
            other => panic!("{other:?}"),
        };
        let least = "the training needs at least 3072 MiB of memory and may have 2048 MiB: ";
        assert_eq!(told(&fit), format!("{least}no settings make it fit, take a smaller base model"));
        fit.nearest = Some(vec![
            change("training.gradient_checkpointing", "full".into()),
            change("training.micro_batch_size", 1.into()),
        ]);
        let settings = "it fits with training.gradient_checkpointing \"full\", training.micro_batch_size 1";
        assert_eq!(told(&fit), format!("{least}{settings}"));

        let error = of_engine(Fault::MemoryOfOthers(ran_out()), &ours).expect_err("another attempt");
        assert!(error.to_string().contains("out of GPU memory"), "{error}");
        // Where the model itself has no room, no setting of the training helps.
        let loading = of_engine(Fault::Other(ran_out()), &ours);
        assert!(matches!(loading, Ok(Finish::Failed { code, .. }) if code == "does_not_fit"));
    }
}
