//! Rows judged: the JSON of each, what it teaches, its tokens, or what is wrong with it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::encode::{EncodeError, Encoder};
use super::reader::{RawRow, RowReader};
use super::report::{Format, Problem};
use super::template::ChatTemplate;
use super::{DatasetError, Row, format, tally};
use crate::spec::{Columns, DatasetSpec, SpecError, Template, TrainOn};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Rows that are judged at once, and the bytes after which a batch of them is full before that.
const BATCH_ROWS: usize = 256;
const BATCH_BYTES: usize = 32 << 20;

/// A row's JSON, or why it is none, and where it stands.
pub(super) struct ParsedRow {
    pub(super) line: u64,
    pub(super) row: u64,
    pub(super) object: Result<Map<String, Value>, Problem>,
}

impl ParsedRow {
    pub(super) fn new(raw: RawRow) -> Self {
        let RawRow { line, row, text } = raw;
        match text.map(|text| format::parse_json(&text)) {
            Ok(Ok(object)) => Self { line, row, object: Ok(object) },
            Ok(Err((lines_down, problem))) => Self { line: line + lines_down, row, object: Err(problem) },
            Err(problem) => Self { line, row, object: Err(problem) },
        }
    }
}

/// What came of a row.
pub(super) struct JudgedRow {
    pub(super) line: u64,
    pub(super) row: u64,
    pub(super) ignored: Vec<String>,
    /// Characters of its texts that no token stands for.
    pub(super) lost_characters: usize,
    pub(super) tokens: Result<Row, EncodeError>,
    /// The same for rows that are the same to the model.
    pub(super) hash: u64,
}

/// Everything that judging a row takes.
pub(super) struct Judge<'a> {
    /// The format that the caller named.
    format: Option<Format>,
    template: ChatTemplate,
    /// Whether the template is the caller's own.
    own_template: bool,
    tokenizer: &'a Tokenizer,
    train_on: TrainOn,
    max_seq_length: usize,
    columns: &'a Columns,
    /// Which of the named columns a row was seen to have, in their order.
    seen: Vec<AtomicBool>,
}

impl<'a> Judge<'a> {
    /// The judge of a data set's rows.
    ///
    /// # Errors
    /// A template that cannot be used with this model.
    pub(super) fn new(spec: &'a DatasetSpec, tokenizer: &'a Tokenizer, max_seq_length: usize) -> Result<Self> {
        let own_template = matches!(spec.template, Template::Jinja(_));
        let template = match ChatTemplate::for_model(&spec.template, tokenizer) {
            Err(Error::Template(message)) if own_template => return Err(own_template_error(message)),
            template => template?,
        };
        let seen = spec.columns.iter().map(|_| AtomicBool::new(false)).collect();
        let (format, train_on, columns) = (Format::named(spec.format), spec.train_on, &spec.columns);
        Ok(Self { format, template, own_template, tokenizer, train_on, max_seq_length, columns, seen })
    }

    fn encoder(&self) -> Encoder<'_> {
        let Self { template, tokenizer, train_on, max_seq_length, .. } = self;
        Encoder { template, tokenizer, train_on: *train_on, max_tokens: *max_seq_length }
    }

    pub(super) fn judge(&self, parsed: ParsedRow, format: Option<Format>) -> JudgedRow {
        let ParsedRow { line, row, object } = parsed;
        let example = object.and_then(|object| {
            for (column, seen) in self.columns.values().zip(&self.seen) {
                if object.contains_key(column) {
                    seen.store(true, Ordering::Relaxed);
                }
            }
            // Without a format there is no object among the rows so far, and so none here.
            let format = format.unwrap_or(Format::Chat);
            format::parse_row(&object, format, self.columns)
        });
        match example {
            Err(problem) => {
                let tokens = Err(EncodeError::Row(problem));
                JudgedRow { line, row, ignored: Vec::new(), lost_characters: 0, tokens, hash: 0 }
            }
            Ok(example) => {
                let tokens = self.encoder().encode(&example.content);
                let hash = tokens.as_ref().map_or(0, tally::hash);
                let lost = example.content.texts().into_iter().map(|text| self.tokenizer.lost_characters(text));
                JudgedRow { line, row, ignored: example.ignored, lost_characters: lost.sum(), tokens, hash }
            }
        }
    }

    /// Reads a file and judges its rows, a few hundred at a time and on all cores: gives each such batch to `each`, with the
    /// format as far as it is known, until there are no more or `each` breaks.
    ///
    /// # Errors
    /// A file that cannot be read or whose format cannot be told; whatever `each` fails with.
    pub(super) fn judge_file(
        &self,
        path: &Path,
        each: &mut dyn FnMut(Option<Format>, Vec<JudgedRow>) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let io_error = |error: std::io::Error| DatasetError::Io { path: path.to_owned(), message: error.to_string() };
        let file = File::open(path).map_err(io_error)?;
        let mut reader = RowReader::new(BufReader::with_capacity(1 << 18, file));
        let mut format = self.format;
        loop {
            let raw = next_rows(&mut reader).map_err(io_error)?;
            if raw.is_empty() {
                return Ok(());
            }
            let parsed: Vec<ParsedRow> = raw.into_par_iter().map(ParsedRow::new).collect();
            if format.is_none() {
                let objects = parsed.iter().filter_map(|row| row.object.as_ref().ok());
                format = format::detect(objects).transpose().map_err(|found| DatasetError::UnknownFormat { found })?;
            }
            let judged = parsed.into_par_iter().map(|row| self.judge(row, format)).collect();
            if each(format, judged)?.is_break() {
                return Ok(());
            }
        }
    }

    /// The named columns that were in no row: an optional field under a misspelt name would be missed in silence.
    pub(super) fn missing_columns(&self) -> Columns {
        let unseen = self.columns.iter().zip(&self.seen).filter(|(_, seen)| !seen.load(Ordering::Relaxed));
        unseen.map(|((field, column), _)| (field.clone(), column.clone())).collect()
    }

    /// Blames the field of the request where the template was the caller's own.
    pub(super) fn blame(&self, error: Error) -> Error {
        match error {
            Error::Template(message) if self.own_template => own_template_error(message),
            other => other,
        }
    }
}

fn own_template_error(message: String) -> Error {
    SpecError { field: "dataset.template", message: format!("dataset.template: {message}") }.into()
}

/// The next rows of a file, some at a time so that the file is never in memory as a whole.
fn next_rows<R: BufRead>(reader: &mut RowReader<R>) -> std::io::Result<Vec<RawRow>> {
    let (mut rows, mut bytes) = (Vec::new(), 0);
    while rows.len() < BATCH_ROWS && bytes < BATCH_BYTES {
        let Some(row) = reader.next().transpose()? else { break };
        bytes += row.text.as_ref().map_or(0, Vec::len);
        rows.push(row);
    }
    Ok(rows)
}
