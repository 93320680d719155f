//! Operands of a product in the order in which the kernel reads them, converted to its lanes on the way.
//!
//! [`Left`]: rows of the left matrix in panels of up to 12, each `[k][row]`. [`Panel`]: up to 32 columns of the right matrix,
//! `[k][column]`, put together segment by segment along k. A lane is one f32 or a pair of bf16 (see `kernel`); a segment of odd
//! depth ends in a pair with a zero.

use std::cell::Cell;

use rayon::prelude::*;

use super::kernel::{COLUMNS, ROWS, VECTOR};
use super::{Compute, Matrix};

/// Lanes behind a panel of a [`Left`]: whole vectors are stored, and the last one reaches beyond.
const SLACK: usize = VECTOR - ROWS;

/// A left operand, packed once and used with many right ones.
#[derive(Debug)]
pub(crate) struct Left {
    lanes: Vec<u32>,
    rows: usize,
    depth: usize,
    compute: Compute,
}

thread_local! {
    /// The lanes of the last [`Left`] that this thread dropped, for the next one: what stands in them is overwritten.
    static SPARE: Cell<Option<Vec<u32>>> = const { Cell::new(None) };
}

impl Drop for Left {
    fn drop(&mut self) {
        SPARE.set(Some(std::mem::take(&mut self.lanes)));
    }
}

impl Left {
    /// Packs scale · x, x being row-major: its columns become the depth.
    ///
    /// # Panics
    /// If x reaches beyond its values or its columns do not lie side by side.
    pub(crate) fn pack(x: Matrix<'_>, scale: f32, compute: Compute) -> Self {
        let (rows, columns) = x.shape;
        assert!(x.strides.1 == 1 || columns <= 1, "columns do not lie side by side");
        assert!(super::span(x.shape, x.strides) <= x.values.len(), "left matrix reaches beyond its values");
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
        Self { lanes, rows, depth, compute }
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

    /// The panel that begins with row `panel` · 12: exactly `depth` · 12 lanes.
    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        &self.lanes[panel * (self.depth * ROWS + SLACK)..][..self.depth * ROWS]
    }
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

    /// Appends a segment whose columns are the rows of `values` (columns, k), row-major.
    pub(crate) fn push_rows(&mut self, values: &[f32], k: usize) {
        assert_eq!(values.len(), self.columns * k, "one row a column");
        for half in 0..self.width / VECTOR {
            let mut sources = [&[][..]; VECTOR];
            let rows = values[(half * VECTOR * k).min(values.len())..].chunks_exact(k.max(1));
            for (source, row) in sources.iter_mut().zip(rows) {
                *source = row;
            }
            let lanes = &mut self.lanes[self.filled * self.width + half * VECTOR..];
            transpose(&sources, k, 1.0, self.compute, lanes, self.width);
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
        self.with_scratch(count, fill, |panel, values| panel.push_rows(values, k))
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

/// # Panics
/// For bf16 on a processor without its instructions.
fn check_bf16(compute: Compute) {
    assert!(compute == Compute::F32 || Compute::bf16().is_some(), "this processor has no products of bf16");
}

/// A row's values, and 0 behind them.
fn copy_row(row: &[f32], lanes: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if super::kernel::level() >= super::kernel::Level::Avx512 {
        return avx512::copy_row(row, lanes);
    }
    for (lane, value) in lanes.iter_mut().zip(row) {
        *lane = value.to_bits();
    }
    lanes[row.len()..].fill(0);
}

/// `lanes[k · step + row] = scale · rows[row][k]`, 0 for rows that are not there; writes 16 lanes at each k.
fn transpose(rows: &[&[f32]; VECTOR], k: usize, scale: f32, compute: Compute, lanes: &mut [u32], step: usize) {
    if k == 0 {
        return;
    }
    assert!(lanes.len() >= (compute.lanes(k) - 1) * step + VECTOR, "no room for the last vector");
    #[cfg(target_arch = "x86_64")]
    if super::kernel::level() >= super::kernel::Level::Avx512 {
        return avx512::transpose(rows, k, scale, compute, lanes, step);
    }
    debug_assert_eq!(compute, Compute::F32, "bf16 needs AVX-512");
    for (k, lanes) in lanes.chunks_mut(step).enumerate().take(k) {
        for (lane, row) in lanes.iter_mut().zip(rows) {
            *lane = row.get(k).map_or(0, |value| (scale * value).to_bits());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Compute, VECTOR};

    /// As `super::transpose`, which checked the room for it.
    pub(super) fn transpose(
        rows: &[&[f32]; VECTOR],
        k: usize,
        scale: f32,
        compute: Compute,
        lanes: &mut [u32],
        step: usize,
    ) {
        assert!(rows.iter().all(|row| row.is_empty() || row.len() >= k), "a row is too short");
        super::check_bf16(compute);
        // SAFETY: the processor has AVX-512 (and bf16 where `compute` asks for it: checked above); the
        // rows have k values or none, the lanes have room for the last vector.
        unsafe {
            match compute {
                Compute::F32 => f32_lanes(rows, k, scale, lanes.as_mut_ptr(), step),
                Compute::Bf16 => bf16_lanes(rows, k, scale, lanes.as_mut_ptr(), step),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn f32_lanes(rows: &[&[f32]; VECTOR], k: usize, scale: f32, lanes: *mut u32, step: usize) {
        for first in (0..k).step_by(VECTOR) {
            let count = VECTOR.min(k - first);
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (vector, row) in block.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
                // SAFETY: the row has k values.
                *vector = _mm512_castps_si512(unsafe { load(row.as_ptr().add(first), count, scale) });
            }
            // SAFETY: see `transpose`.
            unsafe { store(block, lanes.add(first * step), step, count) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_lanes(rows: &[&[f32]; VECTOR], k: usize, scale: f32, lanes: *mut u32, step: usize) {
        for first in (0..k).step_by(2 * VECTOR) {
            let count = (2 * VECTOR).min(k - first);
            let mut block = [_mm512_setzero_si512(); VECTOR];
            for (vector, row) in block.iter_mut().zip(rows).filter(|(_, row)| !row.is_empty()) {
                // SAFETY: the row has k values.
                unsafe {
                    let at = row.as_ptr().add(first);
                    let low = load(at, count.min(VECTOR), scale);
                    let high = load(at.wrapping_add(VECTOR), count.saturating_sub(VECTOR), scale);
                    *vector = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                }
            }
            // SAFETY: see `transpose`.
            unsafe { store(block, lanes.add(first / 2 * step), step, count.div_ceil(2)) };
        }
    }

    /// scale times the first `count` values, 0 behind them.
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const f32, count: usize, scale: f32) -> __m512 {
        // SAFETY: masked elements are not read; the caller has `count` values.
        _mm512_mul_ps(unsafe { _mm512_maskz_loadu_ps(mask(count), from) }, _mm512_set1_ps(scale))
    }

    /// Stores the columns of a 16 × 16 block, the first `count` of them, one vector every `step` lanes.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(rows: [__m512i; VECTOR], lanes: *mut u32, step: usize, count: usize) {
        // Pairs of rows, then fours, then eights and all sixteen: after each stage a vector holds that many rows' lanes.
        let mut pairs = rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = pairs;
        for i in 0..4 {
            for half in 0..2 {
                let (low, high) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
                fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(low, high);
                fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(low, high);
            }
        }
        // fours[4 i + j] holds, in its four quarters q, column 4 q + j of rows 4 i to 4 i + 3.
        let mut columns = fours;
        for j in 0..4 {
            let even = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            let odd = |a, b| _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
            let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
            let (ab_even, ab_odd, cd_even, cd_odd) = (even(a, b), odd(a, b), even(c, d), odd(c, d));
            columns[j] = even(ab_even, cd_even);
            columns[8 + j] = odd(ab_even, cd_even);
            columns[4 + j] = even(ab_odd, cd_odd);
            columns[12 + j] = odd(ab_odd, cd_odd);
        }
        for (k, column) in columns.iter().enumerate().take(count) {
            // SAFETY: the caller has room for a vector at each of `count` steps.
            unsafe { _mm512_storeu_si512(lanes.add(k * step).cast(), *column) };
        }
    }

    /// As `super::copy_row`.
    pub(super) fn copy_row(row: &[f32], lanes: &mut [u32]) {
        for (at, lanes) in lanes.chunks_exact_mut(VECTOR).enumerate() {
            let rest = row.get(at * VECTOR..).unwrap_or_default();
            // SAFETY: the processor has AVX-512; no more values are read than there are, sixteen lanes are written.
            unsafe { copy(rest.as_ptr(), rest.len().min(VECTOR), lanes.as_mut_ptr()) };
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn copy(from: *const f32, count: usize, to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to.cast(), _mm512_maskz_loadu_ps(mask(count), from)) };
    }

    /// The first `count` of sixteen.
    fn mask(count: usize) -> __mmask16 {
        (((1u32 << count) - 1) & 0xffff) as __mmask16
    }

    /// Pairs `(low[c], high[c])` as bf16 for each c, 0 behind the last; no `high` is zeros.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn pair_rows(low: &[f32], high: &[f32], lanes: &mut [u32]) {
        for (at, lanes) in lanes.chunks_exact_mut(VECTOR).enumerate() {
            let part = |row: &[f32]| {
                let rest = row.get(at * VECTOR..).unwrap_or_default();
                // SAFETY: no more values than there are.
                unsafe { load(rest.as_ptr(), rest.len().min(VECTOR), 1.0) }
            };
            let widen = |x: __m512| {
                // SAFETY: both are 32 bytes without invalid values.
                let narrow = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x)) };
                _mm512_cvtepu16_epi32(narrow)
            };
            let both = _mm512_or_si512(_mm512_slli_epi32::<16>(widen(part(high))), widen(part(low)));
            // SAFETY: sixteen lanes.
            unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), both) };
        }
    }
}

mod bf16 {
    /// Pairs of two rows' values.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn pair_rows(low: &[f32], high: &[f32], lanes: &mut [u32]) {
        super::check_bf16(super::Compute::Bf16);
        // SAFETY: the processor has the instructions, as was just checked.
        unsafe { super::avx512::pair_rows(low, high, lanes) }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn pair_rows(_: &[f32], _: &[f32], _: &mut [u32]) {
        super::check_bf16(super::Compute::Bf16);
    }
}
