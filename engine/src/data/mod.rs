//! Training rows out of a file: read, judge every row, render, tokenize, mask.

mod batch;
mod cache;
mod encode;
mod error;
mod format;
mod jinja;
mod judge;
mod reader;
mod report;
mod template;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use rayon::prelude::*;

pub use batch::{Loader, MicroBatch, NO_LABEL};
pub use cache::Rows;
pub use encode::chat_prompt;
pub use error::DatasetError;
pub use report::{BadRow, BadRowCode, Format, LISTED_BAD_ROWS, Report};
pub use template::{ChatTemplate, Message, Role};

use crate::spec::{DatasetFormat, TrainSpec};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use cache::RowWriter;
use encode::EncodeError;
use judge::{Judge, JudgedRow, ParsedRow};
use reader::{RawRow, RowReader};

/// Rows that a training needs, as OpenAI has it.
pub const MIN_ROWS: u64 = 10;
/// Rows that are judged at once, and the bytes after which a batch of them is full before that.
const BATCH_ROWS: usize = 256;
const BATCH_BYTES: usize = 32 << 20;

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
/// [`Error::Io`] where the rows cannot be kept, [`Error::Dataset`] where it cannot be trained on, [`Error::Template`] and [`Error::Tokenizer`] where the model's own
/// template or tokenizer is at fault, [`Error::Spec`] for a row length above the model's.
pub fn prepare(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    scratch: &Path,
    on_progress: &mut dyn FnMut(),
) -> Result<Dataset> {
    let mut rows = RowWriter::new(scratch, tokenizer.vocab_size())?;
    let report = read(path, spec, tokenizer, context_length, &mut |row| rows.push(row), on_progress)?;
    Ok(Dataset { rows: rows.finish()?, report: check(report)? })
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
    check(read(path, spec, tokenizer, context_length, &mut |_| Ok(()), on_progress)?)
}

fn read(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    keep: &mut dyn FnMut(&Row) -> Result<()>,
    on_progress: &mut dyn FnMut(),
) -> Result<Report> {
    let max_seq_length = spec.max_seq_length(context_length)?;
    let template = ChatTemplate::for_model(spec.dataset.template, tokenizer)?;
    let judge = Judge { template, tokenizer, train_on: spec.dataset.train_on, max_seq_length };
    let io_error = |error: std::io::Error| DatasetError::Io { path: path.to_owned(), message: error.to_string() };
    let file = File::open(path).map_err(io_error)?;
    let mut reader = RowReader::new(BufReader::with_capacity(1 << 18, file));

    let mut format = match spec.dataset.format {
        DatasetFormat::Auto => None,
        DatasetFormat::Alpaca => Some(Format::Alpaca),
        DatasetFormat::Chat => Some(Format::Chat),
    };
    let mut report = Report::default();
    loop {
        let raw = next_rows(&mut reader).map_err(io_error)?;
        if raw.is_empty() {
            break;
        }
        let parsed: Vec<ParsedRow> = raw.into_par_iter().map(ParsedRow::new).collect();
        if format.is_none() {
            let objects = parsed.iter().filter_map(|row| row.object.as_ref().ok());
            format = format::detect(objects).transpose().map_err(|found| DatasetError::UnknownFormat { found })?;
        }
        report.format = format;
        let judged: Vec<JudgedRow> = parsed.into_par_iter().map(|row| judge.judge(row, format)).collect();
        for row in judged {
            add_row(&mut report, row, max_seq_length, keep)?;
        }
        on_progress();
    }
    Ok(report)
}

/// The next rows of a file, some at a time so that the file is never in memory as a whole.
fn next_rows<R: std::io::BufRead>(reader: &mut RowReader<R>) -> std::io::Result<Vec<RawRow>> {
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while rows.len() < BATCH_ROWS && bytes < BATCH_BYTES {
        let Some(row) = reader.next().transpose()? else { break };
        bytes += row.text.as_ref().map_or(0, Vec::len);
        rows.push(row);
    }
    Ok(rows)
}

fn add_row(
    report: &mut Report,
    judged: JudgedRow,
    max_seq_length: usize,
    keep: &mut dyn FnMut(&Row) -> Result<()>,
) -> Result<()> {
    let JudgedRow { line, row, ignored, tokens } = judged;
    report.rows += 1;
    for name in ignored {
        report.add_ignored_field(name);
    }
    let mut tokens = match tokens {
        Ok(tokens) => tokens,
        Err(EncodeError::Row(problem)) => {
            report.add_bad_row(problem.at(line, row));
            return Ok(());
        }
        Err(EncodeError::Fatal(Error::Template(message))) => {
            return Err(Error::Template(format!("{message} (seen at line {line} of the data set)")));
        }
        Err(EncodeError::Fatal(error)) => return Err(error),
    };
    report.longest = report.longest.max(tokens.tokens.len() as u64);
    if tokens.tokens.len() > max_seq_length {
        report.truncated_rows += 1;
        tokens.truncate(max_seq_length);
    }
    let trained = tokens.trained_tokens() as u64;
    if trained == 0 {
        report.dropped_rows += 1;
        return Ok(());
    }
    report.tokens += tokens.tokens.len() as u64;
    report.trained_tokens += trained;
    // Nothing is trained on a file with a bad row.
    if report.bad_row_count == 0 { keep(&tokens) } else { Ok(()) }
}

/// The verdict on the whole file.
fn check(report: Report) -> Result<Report> {
    if report.rows == 0 {
        return Err(DatasetError::Empty.into());
    }
    if report.bad_row_count > 0 {
        return Err(DatasetError::BadRows(Box::new(report)).into());
    }
    if report.rows < MIN_ROWS {
        return Err(DatasetError::TooFewRows { rows: report.rows, needed: MIN_ROWS }.into());
    }
    if report.trained_tokens == 0 {
        return Err(DatasetError::NothingToTrain(Box::new(report)).into());
    }
    if report.dropped_rows > 0 {
        tracing::warn!(
            rows = report.dropped_rows,
            max_seq_length_cut = report.truncated_rows,
            "rows left out, their answer lies beyond max_seq_length"
        );
    }
    Ok(report)
}
