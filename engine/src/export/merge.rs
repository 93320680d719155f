//! One tensor of the base with its LoRA merged in, band of rows by band: W + scale · (B A), then the blocks of every type asked
//! for.
//!
//! Shapes: W (out, in), A (R, in), B (out, R). A band is cut into tasks by the shape alone, and a task is one thread's from
//! reading to blocks: the bytes do not depend on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::Delta;
use crate::model::weights::{StoredRows, Weight, dequantize_blocks};
use crate::ops::matmul::{Matrix, gemm_values};
use crate::quant::{BlockType, Directions, Unfit, quantize_blocks, quantize_merged};
use crate::{Error, Result};

/// Values of a band, so that a tensor of any size takes little memory.
const BAND_VALUES: usize = 1 << 22;
/// Values of a task: they stay in the processor's cache between the steps.
const TASK_VALUES: usize = 1 << 17;

/// A tensor of the base, and what is added to it.
pub(super) struct MergedTensor<'a> {
    name: String,
    weight: Weight,
    delta: Option<Delta<'a>>,
    /// Of the delta's A.
    directions: Option<Directions>,
    scale: f32,
}

/// The rows of a task, and where each type's blocks go.
struct Task<'a> {
    rows: Range<usize>,
    outs: Vec<&'a mut [u8]>,
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    stored: StoredRows,
    values: Vec<f32>,
}

impl<'a> MergedTensor<'a> {
    /// Checks that the LoRA, of rank `rank`, fits the weight.
    pub(super) fn new(
        name: &str,
        weight: Weight,
        delta: Option<Delta<'a>>,
        (rank, scale): (usize, f32),
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
        let directions = delta.as_ref().map(|delta| Directions::new(&delta.lora_a, weight.columns()));
        Ok(Self { name: name.to_owned(), weight, delta, directions, scale })
    }

    /// Whether a LoRA is merged in.
    pub(super) fn has_delta(&self) -> bool {
        self.delta.is_some()
    }

    /// The bands of rows, in order.
    pub(super) fn bands(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, task) = (self.weight.rows(), self.task_rows());
        let band = (BAND_VALUES / self.weight.columns() / task).max(1) * task;
        (0..rows).step_by(band).map(move |start| start..rows.min(start + band))
    }

    /// The stored bytes of those rows, which must be a band, in each of the types.
    ///
    /// # Errors
    /// [`Error::Adapter`], or [`Error::Model`] for a tensor without LoRA, naming the first value that a type cannot hold;
    /// [`Error::Io`].
    pub(super) fn stored(&self, band: Range<usize>, dtypes: &[BlockType]) -> Result<Vec<Vec<u8>>> {
        let (columns, task_rows) = (self.weight.columns(), self.task_rows());
        let mut stored: Vec<Vec<u8>> =
            dtypes.iter().map(|dtype| vec![0; band.len() * dtype.row_bytes(columns)]).collect();
        let mut parts: Vec<_> = stored
            .iter_mut()
            .zip(dtypes)
            .map(|(stored, dtype)| stored.chunks_mut(task_rows * dtype.row_bytes(columns)))
            .collect();
        let starts = band.clone().step_by(task_rows);
        let tasks: Vec<Task<'_>> = starts
            .map(|start| Task {
                rows: start..band.end.min(start + task_rows),
                outs: parts.iter_mut().filter_map(Iterator::next).collect(),
            })
            .collect();
        drop(parts);
        let first_error = tasks
            .into_par_iter()
            .map_init(Scratch::default, |scratch, task| self.run(task, dtypes, scratch).err())
            .find_map_first(|error| error);
        first_error.map_or(Ok(stored), Err)
    }

    /// Rows that one task takes.
    fn task_rows(&self) -> usize {
        (TASK_VALUES / self.weight.columns()).max(1)
    }

    fn run(&self, task: Task<'_>, dtypes: &[BlockType], scratch: &mut Scratch) -> Result<()> {
        let columns = self.weight.columns();
        let stored = scratch.stored.read(&self.weight, task.rows.clone())?;
        scratch.values.resize(task.rows.len() * columns, 0.0);
        let values = &mut scratch.values[..];
        dequantize_blocks(self.weight.dtype(), stored, values)?;
        if let Some(Delta { lora_a, lora_b }) = &self.delta {
            let rank = lora_a.len() / columns;
            let a = Matrix::rows(lora_a, rank, columns, columns);
            let b = Matrix::rows(&lora_b[task.rows.start * rank..], task.rows.len(), rank, rank);
            gemm_values(values, (columns, 1), (self.scale, b, a, 1.0), false);
        }
        for (&dtype, out) in dtypes.iter().zip(task.outs) {
            let rounded = match &self.directions {
                Some(directions) if dtype.is_quantized() => quantize_merged(dtype, values, out, directions),
                None if dtype.is_quantized() && dtype == self.weight.dtype() => {
                    // Nothing is gained by rounding once more what is rounded already.
                    out.copy_from_slice(stored);
                    Ok(())
                }
                _ => quantize_blocks(dtype, values, out),
            };
            rounded.map_err(|unfit| self.refuse(unfit, task.rows.start, dtype))?;
        }
        Ok(())
    }

    fn refuse(&self, unfit: Unfit, first_row: usize, dtype: BlockType) -> Error {
        let (row, value) = (first_row + unfit.index / self.weight.columns(), unfit.value);
        let (name, dtype) = (&self.name, dtype.name());
        let message = format!("tensor `{name}` has the value {value} in row {row}, {dtype} cannot hold it");
        match self.has_delta() {
            true => Error::Adapter(format!("merged, {message}")),
            false => Error::Model(message),
        }
    }
}
