//! One tensor of the base with its LoRA merged in, band of rows by band: W + scale · (B A), then the target's blocks.
//!
//! Shapes: W (out, in), A (R, in), B (out, R). All sums are f32 and run over R in order, so that a row's bits depend on
//! nothing but that row's inputs.

use std::ops::Range;

use rayon::prelude::*;

use super::Delta;
use crate::model::weights::Weight;
use crate::quant::{BlockType, quantize};
use crate::{Error, Result};

/// Values of a band: 16 MiB of f32, so that a tensor of any size takes little memory.
const BAND_VALUES: usize = 1 << 22;

/// A tensor of the base, what is added to it, and the type it gets.
pub(super) struct MergedTensor<'a> {
    name: String,
    weight: Weight,
    delta: Option<Delta<'a>>,
    scale: f32,
    dtype: BlockType,
}

impl<'a> MergedTensor<'a> {
    /// Checks that the LoRA, of rank `rank`, fits the weight.
    pub(super) fn new(
        name: &str,
        weight: Weight,
        delta: Option<Delta<'a>>,
        (rank, scale): (usize, f32),
        dtype: BlockType,
    ) -> Result<Self> {
        if let Some(Delta { lora_a, lora_b }) = &delta {
            let (rows, columns) = (weight.rows(), weight.columns());
            for (what, length, wanted) in [("A", lora_a.len(), (rank, columns)), ("B", lora_b.len(), (rows, rank))] {
                if length != wanted.0 * wanted.1 {
                    return Err(Error::Adapter(format!(
                        "LoRA {what} of tensor `{name}` has {length} values, must have {} × {}",
                        wanted.0, wanted.1
                    )));
                }
            }
        }
        Ok(Self { name: name.to_owned(), weight, delta, scale, dtype })
    }

    /// Whether a LoRA is merged in.
    pub(super) fn has_delta(&self) -> bool {
        self.delta.is_some()
    }

    /// The bands of rows, in order.
    pub(super) fn bands(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.weight.rows();
        let band = (BAND_VALUES / self.weight.columns()).max(1);
        (0..rows).step_by(band).map(move |start| start..rows.min(start + band))
    }

    /// The stored bytes of those rows.
    pub(super) fn stored(&self, rows: Range<usize>) -> Result<Vec<u8>> {
        let values = self.merged(rows.clone())?;
        self.check_range(&values, rows.start)?;
        quantize(self.dtype, self.weight.columns(), &values)
    }

    fn merged(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let columns = self.weight.columns();
        let mut values = vec![0.0; rows.len() * columns];
        self.weight.dequantize_rows(rows.clone(), &mut values)?;
        let Some(Delta { lora_a, lora_b }) = &self.delta else { return Ok(values) };
        let rank = lora_a.len() / columns;
        let rows_of_b = lora_b[rows.start * rank..rows.end * rank].par_chunks(rank);
        values.par_chunks_mut(columns).zip(rows_of_b).for_each_init(
            || vec![0.0f32; columns],
            |sum, (row, row_of_b)| {
                sum.fill(0.0);
                for (&b, row_of_a) in row_of_b.iter().zip(lora_a.chunks_exact(columns)) {
                    for (sum, &a) in sum.iter_mut().zip(row_of_a) {
                        *sum += b * a;
                    }
                }
                for (value, &sum) in row.iter_mut().zip(sum.iter()) {
                    *value += self.scale * sum;
                }
            },
        );
        Ok(values)
    }

    /// A value that the type cannot hold would be stored as infinity, or as anything.
    fn check_range(&self, values: &[f32], first_row: usize) -> Result<()> {
        let largest = match self.dtype {
            BlockType::F32 => return Ok(()),
            BlockType::F16 => F16_MAX,
            _ => F16_MAX * 127.0,
        };
        let Some(index) = values.iter().position(|value| value.is_nan() || value.abs() > largest) else {
            return Ok(());
        };
        let (row, value) = (first_row + index / self.weight.columns(), values[index]);
        let message =
            format!("tensor `{}` has the value {value} in row {row}, {:?} cannot hold it", self.name, self.dtype);
        Err(if self.has_delta() { Error::Adapter(format!("merged, {message}")) } else { Error::Model(message) })
    }
}

/// The largest value that is finite in f16; Q8_0 holds 127 times its f16 scale.
const F16_MAX: f32 = 65504.0;
