//! Products over packed operands, and products that sum over tokens; all of them deterministic: each element is one sum in the
//! order of k, whatever the number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::kernel::{self, COLUMNS, Operands, ROWS, Tile, VECTOR};
use super::pack::{Left, Panel};
use super::{Matrix, span};
use crate::Result;

/// Tokens that a sum over tokens takes at once, so that what it reads stays in the second-level cache.
const TOKENS: usize = 256;

/// Where a product goes.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    /// (rows, columns), row-major without gaps.
    pub(crate) values: &'a mut [f32],
    pub(crate) columns: usize,
    /// Factor on the product.
    pub(crate) alpha: f32,
    /// Add to what stands there.
    pub(crate) keep: bool,
}

/// The output's place, for tasks that write tiles which do not overlap.
#[derive(Clone, Copy)]
struct Place(*mut f32);

// SAFETY: the tasks of one call write disjoint elements, and the caller holds the slice exclusively until all have ended.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// out (M, N) (+)= alpha · [left₀ | left₁ | …] · right, on all threads. `fill` packs columns of the right operand, the segments
/// in the order of the left operands; it may be called more than once for the same columns.
///
/// # Errors
/// What `fill` says.
///
/// # Panics
/// If the operands differ in rows, compute type or depth, or the output has another size.
pub(crate) fn product(
    lefts: &[&Left<'_>],
    out: Output<'_>,
    fill: &(dyn Fn(Range<usize>, &mut Panel) -> Result<()> + Sync),
) -> Result<()> {
    let Some(first) = lefts.first() else { return Ok(()) };
    let (rows, compute) = (first.rows(), first.compute());
    assert!(lefts.iter().all(|left| left.rows() == rows && left.compute() == compute), "left operands differ");
    let Output { values, columns, alpha, keep } = out;
    assert_eq!(values.len(), rows * columns, "the output's size");
    if values.is_empty() {
        return Ok(());
    }
    let depth = lefts.iter().map(|left| left.depth()).sum();
    let (place, tasks, next) = (Place(values.as_mut_ptr()), tasks(rows, columns), AtomicUsize::new(0));
    (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).try_for_each(|_| {
        let mut panel = Panel::new(compute);
        while let Some(Task { row_panels, columns: range }) = tasks.get(next.fetch_add(1, Ordering::Relaxed)).cloned() {
            panel.begin(range.len(), depth);
            fill(range.clone(), &mut panel)?;
            let (right, width) = panel.lanes(depth);
            for row_panel in row_panels {
                let (first_row, mut after) = (row_panel * ROWS, 0);
                for (index, left) in lefts.iter().enumerate() {
                    let (a, depth) = (left.panel(row_panel), left.depth());
                    let b = &right[after * width..(after + depth) * width];
                    let tile = Tile {
                        depth,
                        a: a.lanes.as_ptr(),
                        a_step: a.step,
                        b: b.as_ptr(),
                        b_step: width,
                        c: place.at(first_row * columns + range.start),
                        c_step: columns,
                        alpha,
                        keep: keep || index > 0,
                    };
                    // SAFETY: the left panel holds its rows over the whole depth, the right one `depth` steps of `width` lanes;
                    // the tile's rows and columns lie inside the output, and no other task has them.
                    unsafe { run(&tile, ROWS.min(rows - first_row), range.len(), a.operands) };
                    after += depth;
                }
            }
        }
        Ok(())
    })
}

/// Columns of one panel, and the panels of rows that they are multiplied with.
#[derive(Debug, Clone)]
struct Task {
    row_panels: Range<usize>,
    columns: Range<usize>,
}

/// What threads take one by one: whole panels of columns, packed once each; where they are few, and at the end, where threads
/// would wait for the last one, parts of the rows.
fn tasks(rows: usize, columns: usize) -> Vec<Task> {
    let threads = rayon::current_num_threads();
    let (row_panels, column_panels) = (rows.div_ceil(ROWS), columns.div_ceil(COLUMNS));
    let mut tasks = Vec::with_capacity(column_panels + 8 * threads);
    for panel in 0..column_panels {
        let few = (4 * threads).div_ceil(column_panels);
        let last = if threads > 1 && panel + threads >= column_panels { 4 } else { 1 };
        let part = row_panels.div_ceil((few * last).min(row_panels));
        let columns = panel * COLUMNS..columns.min((panel + 1) * COLUMNS);
        for first in (0..row_panels).step_by(part) {
            tasks.push(Task { row_panels: first..row_panels.min(first + part), columns: columns.clone() });
        }
    }
    tasks
}

/// out (M, N) += alpha · aᵀ b in f32, for a (T, M) and b (T, N), row-major: the sum over tokens of a gradient of parameters.
///
/// # Panics
/// If shapes do not fit or columns do not lie side by side.
pub(crate) fn add_transposed(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, alpha: f32) {
    let ((tokens, rows), (b_tokens, columns)) = (a.shape, b.shape);
    assert_eq!(tokens, b_tokens, "one row of each a token");
    assert_eq!(out.len(), rows * columns, "the output's size");
    for matrix in [a, b] {
        assert!(matrix.strides.1 == 1 || matrix.shape.1 <= 1, "columns do not lie side by side");
        assert!(span(matrix.shape, matrix.strides) <= matrix.values.len(), "a matrix reaches beyond its values");
    }
    if out.is_empty() || tokens == 0 {
        return;
    }
    // The longer side is cut into parts, several a thread.
    let threads = rayon::current_num_threads();
    let part = |length: usize, step: usize| length.div_ceil(4 * threads).next_multiple_of(step);
    let (row_part, column_part) =
        if rows >= columns { (part(rows, ROWS), columns) } else { (rows, part(columns, COLUMNS)) };
    let (row_parts, column_parts) = (rows.div_ceil(row_part), columns.div_ceil(column_part));
    let place = Place(out.as_mut_ptr());
    (0..row_parts * column_parts).into_par_iter().for_each(|task| {
        let (row, column) = (task / column_parts * row_part, task % column_parts * column_part);
        let part = Part { rows: row..rows.min(row + row_part), columns: column..columns.min(column + column_part) };
        add_part(place, columns, a, b, alpha, &part);
    });
}

/// The elements of an output that one task has.
struct Part {
    rows: Range<usize>,
    columns: Range<usize>,
}

fn add_part(place: Place, out_columns: usize, a: Matrix<'_>, b: Matrix<'_>, alpha: f32, part: &Part) {
    let tokens = a.shape.0;
    // As many rows a tile as spread evenly: 16 are 8 and 8, not 12 and 4.
    let count = part.rows.len();
    let tile_rows = count.div_ceil(count.div_ceil(ROWS));
    let mut tail = Vec::new();
    for first_token in (0..tokens).step_by(TOKENS) {
        let depth = TOKENS.min(tokens - first_token);
        for column in part.columns.clone().step_by(COLUMNS) {
            let wide = COLUMNS.min(part.columns.end - column);
            let whole = wide.is_multiple_of(VECTOR);
            let at = first_token * b.strides.0 + column;
            let (right, b_step) = if whole {
                (&b.values[at..], b.strides.0)
            } else {
                copy_tail(&b.values[at..], b.strides.0, depth, wide, &mut tail);
                (&tail[..], COLUMNS)
            };
            assert!(right.len() >= (depth - 1) * b_step + wide.next_multiple_of(VECTOR), "right matrix is too short");
            for row in part.rows.clone().step_by(tile_rows) {
                let high = tile_rows.min(part.rows.end - row);
                let left = &a.values[first_token * a.strides.0 + row..];
                assert!(left.len() >= (depth - 1) * a.strides.0 + high, "left matrix is too short");
                let tile = Tile {
                    depth,
                    a: left.as_ptr().cast(),
                    a_step: a.strides.0,
                    b: right.as_ptr().cast(),
                    b_step,
                    c: place.at(row * out_columns + column),
                    c_step: out_columns,
                    alpha,
                    keep: true,
                };
                // SAFETY: the lengths of both operands were just checked; the tile lies inside this task's part of the output.
                unsafe { run(&tile, high, wide, Operands::F32) };
            }
        }
    }
}

/// Columns that do not fill a vector, with zeros behind them.
fn copy_tail(values: &[f32], stride: usize, depth: usize, wide: usize, tail: &mut Vec<f32>) {
    tail.clear();
    tail.resize(depth * COLUMNS, 0.0);
    for (row, out) in tail.chunks_exact_mut(COLUMNS).enumerate() {
        out[..wide].copy_from_slice(&values[row * stride..][..wide]);
    }
}

/// Runs a tile of `rows` by `columns`; one that does not fill its vectors goes through a buffer.
///
/// # Safety
/// A reaches over `rows` rows of `depth` lanes, however they lie, B over `depth` steps of whole vectors, and the rows and columns of C are the
/// caller's alone.
unsafe fn run(tile: &Tile, rows: usize, columns: usize, operands: Operands) {
    let vectors = columns.div_ceil(VECTOR);
    let function = kernel::run(rows, vectors, operands);
    if columns == vectors * VECTOR {
        // SAFETY: the caller's.
        return unsafe { function(tile) };
    }
    let mut buffer = [0f32; ROWS * COLUMNS];
    let whole = Tile { c: buffer.as_mut_ptr(), c_step: COLUMNS, keep: false, ..*tile };
    // SAFETY: the operands are the caller's, the buffer holds the largest tile.
    unsafe { function(&whole) };
    for (row, sums) in buffer.chunks_exact(COLUMNS).enumerate().take(rows) {
        for (column, &sum) in sums.iter().enumerate().take(columns) {
            // SAFETY: inside the tile's rows and columns.
            unsafe {
                let place = tile.c.add(row * tile.c_step + column);
                *place = if tile.keep { *place + sum } else { sum };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_cover_every_tile_once() {
        for threads in [1, 2, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (rows, columns) in [(1usize, 1usize), (12, 32), (13, 33), (1024, 576), (7, 5000), (300, 16)] {
                let mut times = vec![0; rows.div_ceil(ROWS) * columns];
                for task in pool.install(|| tasks(rows, columns)) {
                    assert!(task.columns.len() <= COLUMNS && task.columns.start.is_multiple_of(COLUMNS));
                    for panel in task.row_panels {
                        task.columns.clone().for_each(|column| times[panel * columns + column] += 1);
                    }
                }
                assert!(times.iter().all(|&times| times == 1), "{threads} threads, {rows} × {columns}");
            }
        }
    }
}
