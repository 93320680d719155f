//! Embedding rows of tokens, dequantized from the table's stored blocks: only those rows are touched.
//!
//! Shapes: table (V, C), output (T, C) in f32. The table is frozen, and nothing below it needs a gradient: no backward.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::model::weights::Weight;
use crate::ops::{ROWS_PER_TASK, tensor};
use crate::{Error, Result};

/// One row for every token.
///
/// # Errors
/// A token that the table does not have.
pub fn forward(table: &Weight, tokens: &[u32]) -> Result<Tensor> {
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= table.rows()) {
        return Err(Error::Model(format!("token {token} is not in the embedding table of {} rows", table.rows())));
    }
    let columns = table.columns();
    let mut rows = vec![0f32; tokens.len() * columns];
    rows.par_chunks_mut(columns).zip(tokens).with_min_len(ROWS_PER_TASK).try_for_each(|(row, &token)| {
        let token = token as usize;
        table.dequantize_rows(token..token + 1, row)
    })?;
    tensor(rows, (tokens.len(), columns))
}
