//! Operands of a product in the order in which the kernel reads them, converted to its lanes on the way.
//!
//! [`Left`]: rows of the left matrix in panels of up to 12, each `[k][row]`, or as they lie, where the kernel can read them so. [`Panel`]: up to 32 columns of the right matrix,
//! `[k][column]`, put together segment by segment along k. A lane is one f32 or a pair of bf16 (see `kernel`); a segment of odd
//! depth ends in a pair with a zero.

use std::cell::Cell;

use rayon::prelude::*;

use super::kernel::{COLUMNS, Operands, ROWS, VECTOR};
use super::transpose::{bf16, copy_row, transpose};
use super::{Compute, Matrix};

/// Lanes behind a panel of a [`Left`]: whole vectors are stored, and the last one reaches beyond.
const SLACK: usize = VECTOR - ROWS;

/// A left operand, made once and used with many right ones.
#[derive(Debug)]
pub(crate) struct Left<'a> {
    lanes: Lanes<'a>,
    rows: usize,
    depth: usize,
    compute: Compute,
}

#[derive(Debug)]
enum Lanes<'a> {
    Packed(Vec<u32>),
    /// As they lie in a row-major matrix of f32: the lanes from its first value on, and how many it is from row to row.
    InPlace(&'a [u32], usize),
}

/// Rows of a left operand for one tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct LeftPanel<'a> {
    /// From the first row's first lane to the last row's last.
    pub(super) lanes: &'a [u32],
    /// As [`super::kernel::Tile`] has it.
    pub(super) step: usize,
    pub(super) operands: Operands,
}

thread_local! {
    /// The lanes of the last [`Left`] that this thread dropped, for the next one: what stands in them is overwritten.
    static SPARE: Cell<Option<Vec<u32>>> = const { Cell::new(None) };
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if let Lanes::Packed(lanes) = &mut self.lanes {
            SPARE.set(Some(std::mem::take(lanes)));
        }
    }
}

impl<'a> Left<'a> {
    /// x, being row-major; its columns become the depth. It is packed where the kernel cannot read it as it lies.
    ///
    /// # Panics
    /// As [`Left::pack`].
    pub(crate) fn of(x: Matrix<'a>, compute: Compute) -> Self {
        let ((rows, depth), (stride, _)) = (x.shape, x.strides);
        if compute != Compute::F32 || !super::kernel::reads_rows() || !spreads(stride) {
            return Self::pack(x, 1.0, compute);
        }
        check_rows(x);
        Self { lanes: Lanes::InPlace(bits(x.values), stride), rows, depth, compute }
    }

    /// Packs scale · x, x being row-major: its columns become the depth.
    ///
    /// # Panics
    /// If x reaches beyond its values or its columns do not lie side by side.
    pub(crate) fn pack(x: Matrix<'_>, scale: f32, compute: Compute) -> Self {
        check_rows(x);
        let (rows, columns) = x.shape;
        let depth = compute.lanes(columns);
        let count = rows.div_ceil(ROWS) * (depth * ROWS + SLACK);
        let mut lanes = SPARE.take().unwrap_or_default();
        if lanes.len() < count {
            lanes.resize(count, 0);
        }
        lanes[..count].par_chunks_mut(depth * ROWS + SLACK).enumerate().for_each(|(panel, lanes)| {
            let first = panel * ROWS;
            let mut sources = [&[][..]; VECTOR];
            for (row, source) in sources.iter_mut().enumerate().take(ROWS.min(rows - first)) {
                *source = &x.values[(first + row) * x.strides.0..][..columns];
            }
            transpose(&sources, columns, scale, compute, lanes, ROWS);
        });
        Self { lanes: Lanes::Packed(lanes), rows, depth, compute }
    }

    /// Rows of the matrix.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Lanes along k.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    pub(super) fn compute(&self) -> Compute {
        self.compute
    }

    /// The rows from `panel` · 12 on, up to 12 of them.
    pub(super) fn panel(&self, panel: usize) -> LeftPanel<'_> {
        match &self.lanes {
            Lanes::Packed(lanes) => LeftPanel {
                lanes: &lanes[panel * (self.depth * ROWS + SLACK)..][..self.depth * ROWS],
                step: ROWS,
                operands: if self.compute == Compute::Bf16 { Operands::Bf16 } else { Operands::F32 },
            },
            Lanes::InPlace(lanes, step) => {
                let last = ROWS.min(self.rows - panel * ROWS) - 1;
                let lanes = &lanes[panel * ROWS * step..][..last * step + self.depth];
                LeftPanel { lanes, step: *step, operands: Operands::F32OnRows }
            }
        }
    }
}

/// # Panics
/// If the matrix reaches beyond its values or its columns do not lie side by side.
fn check_rows(x: Matrix<'_>) {
    assert!(x.strides.1 == 1 || x.shape.1 <= 1, "columns do not lie side by side");
    assert!(super::span(x.shape, x.strides) <= x.values.len(), "left matrix reaches beyond its values");
}

/// Whether rows so far apart fall into different sets of a first-level cache of 8 ways with 4 KiB each, so that a tile's rows do
/// not displace one another.
fn spreads(stride: usize) -> bool {
    const WAY: usize = 4096 / size_of::<f32>();
    let apart = WAY >> stride.trailing_zeros().min(WAY.trailing_zeros());
    apart >= 2
}

/// The values' bits.
fn bits(values: &[f32]) -> &[u32] {
    // SAFETY: f32 and u32 have one size and alignment, and any bits are a valid u32.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// Up to 32 columns of a right operand, filled by the caller from the first to the last k.
#[derive(Debug)]
pub(crate) struct Panel {
    lanes: Vec<u32>,
    /// 16 or 32.
    width: usize,
    columns: usize,
    filled: usize,
    compute: Compute,
    /// For the caller: values on their way into the panel.
    scratch: Vec<f32>,
}

thread_local! {
    /// The buffers of the last panel that this thread dropped, for the next one.
    static SPARE_PANEL: Cell<(Vec<u32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

impl Drop for Panel {
    fn drop(&mut self) {
        SPARE_PANEL.set((std::mem::take(&mut self.lanes), std::mem::take(&mut self.scratch)));
    }
}

impl Panel {
    pub(super) fn new(compute: Compute) -> Self {
        let (lanes, scratch) = SPARE_PANEL.take();
        Self { lanes, width: COLUMNS, columns: COLUMNS, filled: 0, compute, scratch }
    }

    /// Makes the panel ready for so many columns of that depth in lanes.
    pub(super) fn begin(&mut self, columns: usize, depth: usize) {
        self.width = columns.next_multiple_of(VECTOR);
        self.columns = columns;
        self.filled = 0;
        if self.lanes.len() < depth * self.width {
            self.lanes.resize(depth * self.width, 0);
        }
    }

    /// The filled lanes and their width.
    pub(super) fn lanes(&self, depth: usize) -> (&[u32], usize) {
        assert_eq!(self.filled, depth, "the right operand is as deep as the left ones");
        (&self.lanes[..depth * self.width], self.width)
    }

    /// Appends a segment whose columns are the rows of scale · `values` (columns, k), row-major.
    pub(crate) fn push_rows(&mut self, values: &[f32], k: usize, scale: f32) {
        assert_eq!(values.len(), self.columns * k, "one row a column");
        for half in 0..self.width / VECTOR {
            let mut sources = [&[][..]; VECTOR];
            let rows = values[(half * VECTOR * k).min(values.len())..].chunks_exact(k.max(1));
            for (source, row) in sources.iter_mut().zip(rows) {
                *source = row;
            }
            let lanes = &mut self.lanes[self.filled * self.width + half * VECTOR..];
            transpose(&sources, k, scale, self.compute, lanes, self.width);
        }
        self.filled += self.compute.lanes(k);
    }

    /// As [`Panel::push_rows`], from rows that `fill` writes.
    pub(crate) fn push_rows_with<E>(
        &mut self,
        k: usize,
        fill: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let count = self.columns * k;
        self.with_scratch(count, fill, |panel, values| panel.push_rows(values, k, 1.0))
    }

    /// As [`Panel::push_columns`], from a matrix (k, columns of this panel) that `fill` writes.
    pub(crate) fn push_columns_with<E>(
        &mut self,
        k: usize,
        fill: impl FnOnce(&mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (columns, count) = (self.columns, self.columns * k);
        self.with_scratch(count, fill, |panel, values| panel.push_columns(values, columns, k, 0))
    }

    fn with_scratch<E>(
        &mut self,
        count: usize,
        fill: impl FnOnce(&mut [f32]) -> Result<(), E>,
        push: impl FnOnce(&mut Self, &[f32]),
    ) -> Result<(), E> {
        let mut scratch = std::mem::take(&mut self.scratch);
        if scratch.len() < count {
            scratch.resize(count, 0.0);
        }
        let filled = fill(&mut scratch[..count]);
        if filled.is_ok() {
            push(self, &scratch[..count]);
        }
        self.scratch = scratch;
        filled
    }

    /// Appends a segment of columns `first_column..` of a row-major matrix (k, columns).
    pub(crate) fn push_columns(&mut self, values: &[f32], stride: usize, k: usize, first_column: usize) {
        let (width, columns) = (self.width, self.columns);
        let lanes = &mut self.lanes[self.filled * width..][..self.compute.lanes(k) * width];
        let row = |k: usize| &values[k * stride + first_column..][..columns];
        for (at, lanes) in lanes.chunks_exact_mut(width).enumerate() {
            match self.compute {
                Compute::F32 => copy_row(row(at), lanes),
                Compute::Bf16 => {
                    bf16::pair_rows(row(2 * at), if 2 * at + 1 < k { row(2 * at + 1) } else { &[] }, lanes)
                }
            }
        }
        self.filled += self.compute.lanes(k);
    }
}
