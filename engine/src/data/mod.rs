//! Training rows out of a file: read, judge every row, render, tokenize, mask.

mod batch;
mod cache;
mod encode;
mod error;
mod format;
mod judge;
mod preview;
mod reader;
mod report;
mod tally;
mod template;
#[cfg(test)]
mod tests;
mod tool_text;

use std::ops::ControlFlow;
use std::path::Path;

pub use batch::{Loader, MicroBatch, NO_LABEL};
pub use cache::Rows;
pub use encode::chat_prompt;
pub use error::DatasetError;
pub use preview::{Preview, PreviewRow, PreviewToken, preview};
pub use report::{BadRow, BadRowCode, Format, LISTED_BAD_ROWS, LengthBin, Repeats, Report};
pub use tally::RowHashes;
pub use template::{ChatTemplate, Message, Role};

use crate::Result;
use crate::spec::TrainSpec;
use crate::tokenizer::Tokenizer;
use cache::RowWriter;
use judge::Judge;
use tally::Tally;

/// Rows that a training needs, as OpenAI has it.
pub const MIN_ROWS: u64 = 10;

/// A row in tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Which of them are to be predicted; never the first.
    pub trained: Vec<bool>,
}

impl Row {
    fn push(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend_from_slice(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }

    fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
        self.trained.truncate(length);
    }

    /// How many of its tokens are to be predicted.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// A data set that can be trained on.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Its rows, in the file's order.
    pub rows: Rows,
    /// What was found on the way.
    pub report: Report,
}

/// Reads a data set as the model will see it; calls `on_progress` after every few hundred rows. The rows are kept in files in
/// the folder `scratch`, which have no names and go with the data set.
///
/// # Errors
/// [`crate::Error::Io`] where the rows cannot be kept, [`crate::Error::Dataset`] where it cannot be trained on,
/// [`crate::Error::Template`] and [`crate::Error::Tokenizer`] where the model's own template or tokenizer is at fault,
/// [`crate::Error::Spec`] for a row length above the model's or a template of the caller's that is at fault.
pub fn prepare(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    scratch: &Path,
    on_progress: &mut dyn FnMut(),
) -> Result<Dataset> {
    let mut rows = RowWriter::new(scratch, tokenizer.vocab_size())?;
    let mut keep = |row: &Row| rows.push(row);
    let (report, _) = read(path, spec, tokenizer, context_length, None, &mut keep, on_progress)?;
    Ok(Dataset { rows: rows.finish()?, report: report.verdict(MIN_ROWS)? })
}

/// The same reading as [`prepare`], for its report: nothing is kept in memory.
///
/// # Errors
/// As [`prepare`].
pub fn validate(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    on_progress: &mut dyn FnMut(),
) -> Result<Report> {
    Ok(survey(path, spec, tokenizer, context_length, None, on_progress)?.0.verdict(MIN_ROWS)?)
}

/// The report on a data set, also on one that cannot be trained on ([`Report::verdict`] says so), and what tells its rows
/// apart. For a validation file, `training` are the rows of the training file: the report counts those that stand in both.
///
/// # Errors
/// As [`prepare`], but for the verdict.
pub fn survey(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    training: Option<&RowHashes>,
    on_progress: &mut dyn FnMut(),
) -> Result<(Report, RowHashes)> {
    read(path, spec, tokenizer, context_length, training, &mut |_| Ok(()), on_progress)
}

fn read(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    training: Option<&RowHashes>,
    keep: &mut dyn FnMut(&Row) -> Result<()>,
    on_progress: &mut dyn FnMut(),
) -> Result<(Report, RowHashes)> {
    let max_seq_length = spec.max_seq_length(context_length)?;
    let judge = Judge::new(&spec.dataset, tokenizer, max_seq_length)?;
    let mut tally = Tally::new(tokenizer, max_seq_length, training);
    judge.judge_file(path, &mut |format, judged| {
        for row in judged {
            if let Some(row) = tally.add(row, format).map_err(|error| judge.blame(error))? {
                keep(&row)?;
            }
        }
        on_progress();
        Ok(ControlFlow::Continue(()))
    })?;
    let (mut report, rows) = tally.finish();
    report.missing_columns = judge.missing_columns();
    Ok((report, rows))
}
