//! The first rows of a data set as the model will see them.

use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::encode::EncodeError;
use super::judge::{Judge, JudgedRow};
use super::report::{BadRow, Format};
use crate::spec::TrainSpec;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// The first rows of a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// The rows' format; `None` where no row could be read.
    pub format: Option<Format>,
    /// The rows, bad ones too.
    pub rows: Vec<PreviewRow>,
}

/// A row as the model will see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewRow {
    /// Line of the file, from 1, at which it begins.
    pub line: u64,
    /// The row's number, from 1.
    pub row: u64,
    /// What is wrong with it; such a row has no tokens.
    pub problem: Option<BadRow>,
    /// The whole text, special tokens included.
    pub text: String,
    /// Its tokens up to `max_seq_length`.
    pub tokens: Vec<PreviewToken>,
    /// Tokens that lie beyond `max_seq_length`.
    pub cut_tokens: u64,
}

/// A token of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewToken {
    /// Its id.
    pub id: u32,
    /// Its text; bytes that are no whole character are U+FFFD.
    pub text: String,
    /// Whether it has a loss.
    pub trained: bool,
}

/// The first `count` rows of a data set as the model will see them.
///
/// # Errors
/// As [`super::validate`], but for what is wrong with single rows, which they say themselves.
pub fn preview(
    path: &Path,
    spec: &TrainSpec,
    tokenizer: &Tokenizer,
    context_length: usize,
    count: usize,
) -> Result<Preview> {
    let max_seq_length = spec.max_seq_length(context_length)?;
    let judge = Judge::new(&spec.dataset, tokenizer, max_seq_length)?;
    let mut preview = Preview::default();
    judge.judge_file(path, &mut |format, judged| {
        preview.format = format;
        for row in judged.into_iter().take(count - preview.rows.len()) {
            preview.rows.push(show(row, tokenizer, max_seq_length).map_err(|error| judge.blame(error))?);
        }
        Ok(if preview.rows.len() < count { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(preview)
}

fn show(judged: JudgedRow, tokenizer: &Tokenizer, max_seq_length: usize) -> Result<PreviewRow> {
    let JudgedRow { line, row, tokens, .. } = judged;
    let (encoded, problem) = match tokens {
        Ok(tokens) => (tokens, None),
        Err(EncodeError::Row(problem)) => (super::Row::default(), Some(problem.at(line, row))),
        Err(EncodeError::NoMask(message)) => return Err(Error::Template(message)),
        Err(EncodeError::Fatal(error)) => return Err(error),
    };
    let bytes: Vec<u8> = encoded.tokens.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
    let token = |(&id, &trained): (&u32, &bool)| {
        let text = String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
        PreviewToken { id, text, trained }
    };
    Ok(PreviewRow {
        line,
        row,
        problem,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        tokens: encoded.tokens.iter().zip(&encoded.trained).take(max_seq_length).map(token).collect(),
        cut_tokens: encoded.tokens.len().saturating_sub(max_seq_length) as u64,
    })
}
