//! What was found in a data set: counts, and every row that cannot be used.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::DatasetError;
use crate::spec::DatasetFormat;

/// Bad rows that a report lists; all are counted.
pub const LISTED_BAD_ROWS: usize = 100;
/// Repeated rows that a report lists; all are counted.
const LISTED_REPEATS: usize = 100;
/// Names of ignored fields that a report lists.
const LISTED_FIELDS: usize = 100;

/// How rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `instruction`, optional `input` and `system`, `output`.
    Alpaca,
    /// `conversations: [{from, value}]`, optional `system` and `tools`.
    Sharegpt,
    /// OpenAI's `messages: [{role, content}]`, optional `tools`.
    Chat,
    /// `prompt`, `completion`.
    Completion,
    /// `text`.
    Text,
}

impl Format {
    /// The name that the API uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alpaca => "alpaca",
            Self::Sharegpt => "sharegpt",
            Self::Chat => "chat",
            Self::Completion => "completion",
            Self::Text => "text",
        }
    }

    /// The format that a caller named; `None` where it is to be found out.
    pub(super) fn named(format: DatasetFormat) -> Option<Self> {
        match format {
            DatasetFormat::Auto => None,
            DatasetFormat::Alpaca => Some(Self::Alpaca),
            DatasetFormat::Sharegpt => Some(Self::Sharegpt),
            DatasetFormat::Chat => Some(Self::Chat),
            DatasetFormat::Completion => Some(Self::Completion),
            DatasetFormat::Text => Some(Self::Text),
        }
    }
}

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRowCode {
    /// The text is no UTF-8.
    InvalidUtf8,
    /// The text is no JSON.
    InvalidJson,
    /// The row is longer than a row may be; what follows was not read.
    RowTooLong,
    /// The row is JSON, but no object.
    NotAnObject,
    /// A field that must be there is not.
    MissingField,
    /// A field holds another type than it must.
    WrongType,
    /// A text that must say something is empty.
    EmptyField,
    /// A field holds a value that it cannot have.
    InvalidValue,
    /// A field asks for something that is not supported.
    UnsupportedField,
    /// The row is of another format than the rows before it.
    MixedFormat,
    /// A message's role is none that the format knows.
    UnknownRole,
    /// No assistant message is to be trained on.
    NoAssistantMessage,
    /// The conversation begins with the assistant, so that there is nothing to answer.
    NoPrompt,
    /// The last message is not the assistant's.
    LastMessageNotAssistant,
    /// The chat template refuses the row, or leaves some of it out.
    TemplateRefused,
    /// The tokenizer gives up on a text of the row.
    TokenizerRefused,
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRow {
    /// Line of the file, from 1; where the row begins, or where its JSON breaks.
    pub line: u64,
    /// The row's number, from 1; blank lines are no rows.
    pub row: u64,
    /// JSON pointer to the field within the row; empty for the row itself.
    pub pointer: String,
    /// What is wrong, for programs.
    pub code: BadRowCode,
    /// What is wrong, for people.
    pub message: String,
    /// What would be right.
    pub hint: String,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, " ({})", self.hint) }
    }
}

/// Rows of some length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthBin {
    /// Tokens that they do not exceed; those of the bin before are counted there.
    pub up_to: u64,
    /// How many rows.
    pub rows: u64,
}

/// Rows that were seen before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repeats {
    /// How many.
    pub rows: u64,
    /// The lines at which the first 100 of them begin.
    pub lines: Vec<u64>,
}

impl Repeats {
    pub(super) fn add(&mut self, line: u64) {
        self.rows += 1;
        if self.lines.len() < LISTED_REPEATS {
            self.lines.push(line);
        }
    }
}

/// What was found in a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The rows' format; `None` where no row could be read.
    pub format: Option<Format>,
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
    /// Tokens of the longest row before truncation.
    pub longest: u64,
    /// Rows by their tokens before truncation, up to the longest; each bin is twice as wide as the one before.
    pub histogram: Vec<LengthBin>,
    /// Rows cut at max_seq_length.
    pub truncated_rows: u64,
    /// Rows left out because nothing to train was left of them after the cut.
    pub dropped_rows: u64,
    /// Rows whose tokens are those of an earlier row.
    pub duplicates: Repeats,
    /// Rows whose tokens are those of a row of the training file; only in the report on a validation file.
    pub overlap: Option<Repeats>,
    /// Characters of the usable rows' texts that the tokenizer has no token for: the model does not see them.
    pub lost_characters: u64,
    /// Ids of the control tokens in the first 256 rows.
    pub control_tokens: Vec<u32>,
    /// Columns that the caller named and no row has: the format's name of the field, and the column's.
    pub missing_columns: BTreeMap<String, String>,
    /// Rows that cannot be used.
    pub bad_row_count: u64,
    /// The first 100 of them.
    pub bad_rows: Vec<BadRow>,
    /// Fields that no format knows, and in how many rows each was: they were not looked at. (Fields of a message stand as
    /// `messages.NAME`.) At most 100 names.
    pub ignored_fields: BTreeMap<String, u64>,
}

impl Report {
    /// The verdict on the whole file: the report itself where the file can be used.
    ///
    /// # Errors
    /// No rows, rows that cannot be used, a column that no row has, fewer rows than `needed_rows`, or nothing to train.
    pub fn verdict(self, needed_rows: u64) -> Result<Self, DatasetError> {
        if self.rows == 0 {
            return Err(DatasetError::Empty);
        }
        if self.bad_row_count > 0 {
            return Err(DatasetError::BadRows(Box::new(self)));
        }
        if let Some((field, column)) = self.missing_columns.first_key_value() {
            return Err(DatasetError::NoSuchColumn { field: field.clone(), column: column.clone() });
        }
        if self.rows < needed_rows {
            return Err(DatasetError::TooFewRows { rows: self.rows, needed: needed_rows });
        }
        if self.trained_tokens == 0 {
            return Err(DatasetError::NothingToTrain(Box::new(self)));
        }
        if self.dropped_rows > 0 {
            tracing::warn!(
                rows = self.dropped_rows,
                max_seq_length_cut = self.truncated_rows,
                "rows left out, their answer lies beyond max_seq_length"
            );
        }
        if self.lost_characters > 0 {
            tracing::warn!(
                characters = self.lost_characters,
                "characters of the rows are lost, the tokenizer has no tokens for their bytes"
            );
        }
        Ok(self)
    }

    pub(super) fn add_bad_row(&mut self, row: BadRow) {
        self.bad_row_count += 1;
        if self.bad_rows.len() < LISTED_BAD_ROWS {
            self.bad_rows.push(row);
        }
    }

    pub(super) fn add_ignored_field(&mut self, name: String) {
        if self.ignored_fields.len() < LISTED_FIELDS || self.ignored_fields.contains_key(&name) {
            *self.ignored_fields.entry(name).or_default() += 1;
        }
    }
}

/// What is wrong with a row, before it is known where the row stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) pointer: String,
    pub(super) code: BadRowCode,
    pub(super) message: String,
    pub(super) hint: String,
}

impl Problem {
    pub(super) fn new(pointer: impl Into<String>, code: BadRowCode, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), code, message: message.into(), hint: String::new() }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    pub(super) fn at(self, line: u64, row: u64) -> BadRow {
        BadRow { line, row, pointer: self.pointer, code: self.code, message: self.message, hint: self.hint }
    }
}
