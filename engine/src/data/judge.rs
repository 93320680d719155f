//! One row judged: its JSON, its messages, its tokens, or what is wrong with it.

use serde_json::{Map, Value};

use super::encode::{self, EncodeError};
use super::reader::RawRow;
use super::report::{Format, Problem};
use super::template::ChatTemplate;
use super::{Row, format};
use crate::spec::TrainOn;
use crate::tokenizer::Tokenizer;

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
    pub(super) tokens: Result<Row, EncodeError>,
}

/// Everything that judging a row takes.
pub(super) struct Judge<'a> {
    pub(super) template: ChatTemplate,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) train_on: TrainOn,
    pub(super) max_seq_length: usize,
}

impl Judge<'_> {
    pub(super) fn judge(&self, parsed: ParsedRow, format: Option<Format>) -> JudgedRow {
        let ParsedRow { line, row, object } = parsed;
        let example = object.and_then(|object| {
            // Without a format there is no object among the rows so far, and so none here.
            let format = format.unwrap_or(Format::Chat);
            format::parse_row(&object, format)
        });
        match example {
            Err(problem) => JudgedRow { line, row, ignored: Vec::new(), tokens: Err(EncodeError::Row(problem)) },
            Ok(example) => {
                let (template, train_on, max_tokens) = (&self.template, self.train_on, self.max_seq_length);
                let tokens = encode::encode_row(&example.messages, template, self.tokenizer, train_on, max_tokens);
                JudgedRow { line, row, ignored: example.ignored, tokens }
            }
        }
    }
}
