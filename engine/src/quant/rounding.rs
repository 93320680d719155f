//! Which of a block's levels a value gets: the nearest one, or one whose error makes up for those of its row as a LoRA sees them.
//!
//! A LoRA that is merged changes most weights by far less than half the distance of two levels. Where the base is stored in about the
//! same levels, each weight's nearest one is the one that it has, and little of the training is left. So of a merged row w + s·b A with
//! the errors e, not only e is kept small but A e too, a vector of the LoRA's rank: what is wrong with the row's output for
//! inputs that the LoRA reads. (docs/decisions/020)
//!
//! The rows are rounded twice: once to the nearest levels, for their A e, and once more from left to right, where each value takes its
//! nearest level or one beside it, so that A e shrinks by the same amount in every column.
//!
//! Source: after Lybrand and Saab, "A Greedy Algorithm for Quantizing Neural Networks" (2021), which follows a row's error in the same
//! way, with the network's inputs in place of A.

/// Chooses levels, value after value and row after row.
pub(super) trait Rounding {
    /// Moves the levels of the next values, which are the nearest ones. `value`: what a level, up to `top`, stands for.
    fn settle(&mut self, x: &[f32], levels: &mut [u8], top: u8, value: impl Fn(u8) -> f32);
}

/// The nearest levels.
pub(super) struct Nearest;

impl Rounding for Nearest {
    #[inline(always)]
    fn settle(&mut self, _: &[f32], _: &mut [u8], _: u8, _: impl Fn(u8) -> f32) {}
}

/// Values that are multiplied at once; sums are made in this order on every processor.
const LANES: usize = 8;
/// What the squares of the values' own errors weigh beside that of A e, in parts of the mean square of a column of A: where the values
/// lie on levels before the change, and where they lie anywhere between them.
const OWN_ERROR: (f32, f32) = (0.5, 8.0);

/// A of a LoRA, column by column.
pub(crate) struct Directions {
    /// (columns, lanes): a column of A after the other, zeros behind the rank.
    values: Vec<[f32; LANES]>,
    /// Of each column the square of its norm.
    squares: Vec<f32>,
    lanes: usize,
}

impl Directions {
    /// Of A (rank, columns).
    pub(crate) fn new(a: &[f32], columns: usize) -> Self {
        let lanes = (a.len() / columns).div_ceil(LANES);
        let mut values = vec![[0.0; LANES]; columns * lanes];
        for (index, row) in a.chunks_exact(columns).enumerate() {
            for (column, &value) in row.iter().enumerate() {
                values[column * lanes + index / LANES][index % LANES] = value;
            }
        }
        let squares = values.chunks(lanes.max(1)).map(|a| dot(a, a)).collect();
        Self { values, squares, lanes }
    }

    /// Values of a row.
    pub(super) fn columns(&self) -> usize {
        self.squares.len()
    }

    #[inline(always)]
    fn column(&self, column: usize) -> &[[f32; LANES]] {
        &self.values[column * self.lanes..][..self.lanes]
    }
}

/// Leaves the nearest levels, and adds up A e of each row.
pub(super) struct Measuring<'a> {
    directions: &'a Directions,
    /// (rows so far, lanes)
    errors: Vec<[f32; LANES]>,
    /// Sums of squares: of the errors, and of the distances from one level to the next.
    sums: (f64, f64),
    column: usize,
}

impl<'a> Measuring<'a> {
    /// At the beginning of a row.
    pub(super) fn new(directions: &'a Directions) -> Self {
        Self { directions, errors: Vec::new(), sums: (0.0, 0.0), column: 0 }
    }

    /// For the same rows once more.
    pub(super) fn compensating(self) -> Compensating<'a> {
        let Self { directions, errors: mut drifts, sums: (squares, distances), .. } = self;
        let columns = directions.columns() as f32;
        drifts.iter_mut().flatten().for_each(|sum| *sum /= columns);
        // Errors of values anywhere between levels have a twelfth of the squared distance.
        let between = if distances > 0.0 { (12.0 * squares / distances).min(1.0) as f32 } else { 1.0 };
        let own = OWN_ERROR.0 + (OWN_ERROR.1 - OWN_ERROR.0) * between;
        let own = own * directions.squares.iter().sum::<f32>() / columns;
        let gain = |&square: &f32| if square + own > 0.0 { 1.0 / (square + own) } else { 0.0 };
        let gains = directions.squares.iter().map(gain).collect();
        Compensating { directions, gains, drifts, ahead: vec![[0.0; LANES]; directions.lanes], row: 0, column: 0 }
    }
}

impl Rounding for &mut Measuring<'_> {
    #[inline(always)]
    fn settle(&mut self, x: &[f32], levels: &mut [u8], top: u8, value: impl Fn(u8) -> f32) {
        for (&x, &mut level) in x.iter().zip(levels) {
            let error = value(level) - x;
            let distance = value(level) - value(if level < top { level + 1 } else { level - 1 });
            self.sums.0 += f64::from(error * error);
            self.sums.1 += f64::from(distance * distance);
            let lanes = self.directions.lanes;
            if self.column == 0 {
                self.errors.resize(self.errors.len() + lanes, [0.0; LANES]);
            }
            let row = self.errors.len() - lanes;
            add(&mut self.errors[row..], error, self.directions.column(self.column));
            self.column = (self.column + 1) % self.directions.columns();
        }
    }
}

/// Makes up for the errors of the nearest levels.
pub(super) struct Compensating<'a> {
    directions: &'a Directions,
    /// One over each column's square and what a value's own error weighs; 0 where both are 0.
    gains: Vec<f32>,
    /// (rows, lanes): what has to be made up for in each column of a row.
    drifts: Vec<[f32; LANES]>,
    /// What was to be made up for in the columns so far and was not.
    ahead: Vec<[f32; LANES]>,
    row: usize,
    column: usize,
}

impl Rounding for Compensating<'_> {
    #[inline(always)]
    fn settle(&mut self, x: &[f32], levels: &mut [u8], top: u8, value: impl Fn(u8) -> f32) {
        let Directions { squares, lanes, .. } = self.directions;
        for (&x, level) in x.iter().zip(levels) {
            let a = self.directions.column(self.column);
            add(&mut self.ahead, 1.0, &self.drifts[self.row * lanes..][..*lanes]);
            let nearest = (*level, value(*level));
            // The y with the least |ahead + a (y - nearest)|² + own · (y - x)².
            let wanted = match self.gains[self.column] {
                0.0 => nearest.1,
                gain => x + gain * (squares[self.column] * (nearest.1 - x) - dot(&self.ahead, a)),
            };
            let mut chosen = nearest;
            for beside in [nearest.0.saturating_sub(1), nearest.0.saturating_add(1).min(top)] {
                let value = value(beside);
                if (value - wanted).abs() < (chosen.1 - wanted).abs() {
                    chosen = (beside, value);
                }
            }
            if chosen.0 != nearest.0 {
                *level = chosen.0;
                add(&mut self.ahead, chosen.1 - nearest.1, a);
            }
            self.column += 1;
            if self.column == self.directions.columns() {
                (self.row, self.column) = (self.row + 1, 0);
                self.ahead.fill([0.0; LANES]);
            }
        }
    }
}

/// to += factor · values
#[inline(always)]
fn add(to: &mut [[f32; LANES]], factor: f32, values: &[[f32; LANES]]) {
    for (to, values) in to.iter_mut().zip(values) {
        for (to, value) in to.iter_mut().zip(values) {
            *to += factor * value;
        }
    }
}

#[inline(always)]
fn dot(x: &[[f32; LANES]], y: &[[f32; LANES]]) -> f32 {
    let mut sums = [0.0; LANES];
    for (x, y) in x.iter().zip(y) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
