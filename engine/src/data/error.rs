//! Why a data set cannot be trained on.

use std::path::PathBuf;

use super::report::Report;

/// A data set that cannot be trained on; the messages are for the one who made it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DatasetError {
    /// The file has no rows.
    #[error("the file is empty")]
    Empty,
    /// There are rows, but not enough.
    #[error("Training file has {rows} example(s), but must have at least {needed} examples")]
    TooFewRows {
        /// Rows in the file.
        rows: u64,
        /// Rows it takes.
        needed: u64,
    },
    /// Some rows cannot be used.
    #[error("{}", bad_rows_message(.0))]
    BadRows(Box<Report>),
    /// The rows are fine, but none has a token to learn.
    #[error("no row has a token to train on: {} row(s) have their answer beyond max_seq_length", .0.dropped_rows)]
    NothingToTrain(Box<Report>),
    /// The keys of the first rows are those of no format.
    #[error(
        "cannot tell the format of the rows, {found}; supported: chat (key messages), sharegpt (conversations), alpaca (instruction, output and optionally input), completion (prompt, completion), text (text)"
    )]
    UnknownFormat {
        /// What was found instead.
        found: String,
    },
    /// A column that the caller named stands in no row.
    #[error("dataset.columns names the column `{column}` for {field}, but no row has it")]
    NoSuchColumn {
        /// The format's name of the field.
        field: String,
        /// The column's name.
        column: String,
    },
    /// The file could not be read.
    #[error("{}: {message}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        message: String,
    },
}

impl DatasetError {
    /// The code that a job fails with, as OpenAI spells it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooFewRows { .. } => "invalid_n_examples",
            Self::Empty
            | Self::BadRows(_)
            | Self::NothingToTrain(_)
            | Self::UnknownFormat { .. }
            | Self::NoSuchColumn { .. }
            | Self::Io { .. } => "invalid_training_file",
        }
    }

    /// The report, where the rows were read to the end.
    pub fn report(&self) -> Option<&Report> {
        match self {
            Self::BadRows(report) | Self::NothingToTrain(report) => Some(report),
            Self::Empty
            | Self::TooFewRows { .. }
            | Self::UnknownFormat { .. }
            | Self::NoSuchColumn { .. }
            | Self::Io { .. } => None,
        }
    }
}

fn bad_rows_message(report: &Report) -> String {
    let mut message = format!("{} of {} rows cannot be used", report.bad_row_count, report.rows);
    if let Some(first) = report.bad_rows.first() {
        message.push_str(&format!(", first: {first}"));
    }
    message
}
