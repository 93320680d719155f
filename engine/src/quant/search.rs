//! The searches for the scales of small groups of weights that lose least, as llama.cpp's reference quantization defines
//! them: same candidates, same order of every sum, so that the result is the same to the last bit.
//!
//! Source: `ggml-quants.c` of the ggml repository, `make_qkx2_quants`, `make_qx_quants`, `make_q3_quants` and
//! `quantize_row_iq4_nl_impl` without an importance matrix.

use pulp::Simd;

use super::lanes::{Lanes, MAX_LANES};

/// What a search found, by lane.
pub(super) struct Found<const N: usize> {
    /// The distance between two levels; its sign belongs to the levels of a symmetric type.
    pub(super) scale: [f32; MAX_LANES],
    /// What is taken off level × scale; 0 in a symmetric search.
    pub(super) min: [f32; MAX_LANES],
    /// The level of each value, counted from 0.
    pub(super) levels: [[f32; MAX_LANES]; N],
}

impl<const N: usize> Found<N> {
    #[inline(always)]
    fn new<S: Simd>(scale: Lanes<S>, min: Lanes<S>, levels: &[Lanes<S>; N]) -> Self {
        let mut found = Self { scale: scale.to_array(), min: min.to_array(), levels: [[0.0; MAX_LANES]; N] };
        for (row, level) in found.levels.iter_mut().zip(levels) {
            *row = level.to_array();
        }
        found
    }
}

/// Groups whose largest magnitude is below this are all zero.
const ZERO: f32 = 1e-15;

/// The candidates of an affine search: scale = (first + step · k + top) ÷ range for k in 0..=last.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    /// The highest level.
    pub(super) top: f32,
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) last: u32,
}

/// x ≈ scale · level − min with levels 0..=top, scale and min ≥ 0. The error is the sum of `weight` times the difference:
/// its magnitude with `absolute`, else its square.
#[inline(always)]
pub(super) fn affine<S: Simd, const N: usize>(
    x: &[Lanes<S>; N],
    weight: &[Lanes<S>; N],
    grid: Grid,
    absolute: bool,
) -> Found<N> {
    let zero = x[0].constant(0.0);
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weight[0], weight[0] * x[0]);
    for (&x, &w) in x.iter().zip(weight).skip(1) {
        low = low.min(x);
        high = high.max(x);
        sum_w = sum_w + w;
        sum_x = sum_x + w * x;
    }
    let mut low = low.min(zero);
    let is_constant = low.equal(high);

    let mut inverse = x[0].constant(grid.top) / (high - low);
    let mut scale = x[0].constant(1.0) / inverse;
    let mut best = zero;
    for (&x, &w) in x.iter().zip(weight) {
        let level = (inverse * (x - low)).nearest(0.0, grid.top);
        best = best + w * penalty(scale * level + low - x, absolute);
    }
    // The levels are those that these two gave when the best scale was found.
    let (mut level_inverse, mut level_low) = (inverse, low);

    let mut levels = [zero; N];
    for step in 0..=grid.last {
        inverse = x[0].constant(grid.first + grid.step * step as f32 + grid.top) / (high - low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
        for ((&x, &w), slot) in x.iter().zip(weight).zip(&mut levels) {
            let level = (inverse * (x - low)).nearest(0.0, grid.top);
            *slot = level;
            let wl = w * level;
            sum_l = sum_l + wl;
            sum_l2 = sum_l2 + wl * level;
            sum_xl = sum_xl + wl * x;
        }
        // The least squares for these levels; with a min below zero, those of a line through zero.
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        let above = this_low.positive();
        this_low = above.select(zero, this_low);
        this_scale = above.select(sum_xl / sum_l2, this_scale);
        let mut error = zero;
        for ((&x, &w), &level) in x.iter().zip(weight).zip(&levels) {
            error = error + w * penalty(this_scale * level + this_low - x, absolute);
        }
        let better = determinant.positive().and(error.less(best));
        best = better.select(error, best);
        scale = better.select(this_scale, scale);
        level_inverse = better.select(inverse, level_inverse);
        level_low = better.select(low, level_low);
        low = better.select(this_low, low);
    }
    let scale = is_constant.select(zero, scale);
    let level_inverse = is_constant.select(zero, level_inverse);
    for (level, &x) in levels.iter_mut().zip(x) {
        *level = (level_inverse * (x - level_low)).nearest(0.0, grid.top);
    }
    Found::new(scale, zero - low, &levels)
}

#[inline(always)]
fn penalty<S: Simd>(difference: Lanes<S>, absolute: bool) -> Lanes<S> {
    if absolute { difference.abs() } else { difference * difference }
}

/// The value of largest magnitude (the first of several), and that magnitude.
#[inline(always)]
fn extreme<S: Simd, const N: usize>(x: &[Lanes<S>; N]) -> (Lanes<S>, Lanes<S>) {
    let zero = x[0].constant(0.0);
    let (mut extreme, mut largest) = (zero, zero);
    for &x in x {
        let larger = largest.less(x.abs());
        extreme = larger.select(x, extreme);
        largest = larger.select(x.abs(), largest);
    }
    (extreme, largest)
}

/// Sums of x² · x · level and x² · level², the terms of a least-squares scale.
#[inline(always)]
fn level_sums<S: Simd, const N: usize>(x: &[Lanes<S>; N], inverse: Lanes<S>, half: f32) -> (Lanes<S>, Lanes<S>) {
    let zero = inverse.constant(0.0);
    let (mut sum_lx, mut sum_l2) = (zero, zero);
    for &x in x {
        let level = (inverse * x).nearest(-half, half - 1.0);
        let w = x * x;
        sum_lx = sum_lx + w * x * level;
        sum_l2 = sum_l2 + w * level * level;
    }
    (sum_lx, sum_l2)
}

/// x ≈ scale · (level − half) with levels 0..2 · half: 19 scales around the one that maps the extreme to −half.
#[inline(always)]
pub(super) fn symmetric<S: Simd, const N: usize>(x: &[Lanes<S>; N], half: f32) -> Found<N> {
    let zero = x[0].constant(0.0);
    let (extreme, largest) = extreme(x);
    let is_zero = largest.less(zero.constant(ZERO));

    let mut level_inverse = zero.constant(-half) / extreme;
    let (sum_lx, sum_l2) = level_sums(x, level_inverse, half);
    let mut scale = sum_l2.equal(zero).select(zero, sum_lx / sum_l2);
    let mut best = scale * sum_lx;
    for step in -9..=9 {
        if step == 0 {
            continue;
        }
        let inverse = zero.constant(-(half + 0.1f32 * step as f32)) / extreme;
        let (sum_lx, sum_l2) = level_sums(x, inverse, half);
        let better = sum_l2.positive().and((best * sum_l2).less(sum_lx * sum_lx));
        scale = better.select(sum_lx / sum_l2, scale);
        best = better.select(scale * sum_lx, best);
        level_inverse = better.select(inverse, level_inverse);
    }
    let offset = is_zero.select(zero, zero.constant(half));
    let level_inverse = is_zero.select(zero, level_inverse);
    let mut levels = *x;
    for level in &mut levels {
        *level = (level_inverse * *level).nearest(-half, half - 1.0) + offset;
    }
    Found::new(is_zero.select(zero, scale), zero, &levels)
}

/// As [`symmetric`], but by descent: each level in turn moves to where the others' best scale puts it, at most five times
/// over.
#[inline(always)]
pub(super) fn symmetric_by_descent<S: Simd, const N: usize>(x: &[Lanes<S>; N], half: f32) -> Found<N> {
    let zero = x[0].constant(0.0);
    let (extreme, largest) = extreme(x);
    let is_zero = largest.less(zero.constant(ZERO));

    let inverse = zero.constant(-half) / extreme;
    let mut levels = *x;
    for level in &mut levels {
        *level = (inverse * *level).nearest(-half, half - 1.0);
    }
    let (mut sum_lx, mut sum_l2) = level_sums(x, inverse, half);
    for _ in 0..5 {
        let mut changed = false;
        for (&x, level) in x.iter().zip(&mut levels) {
            let w = x * x;
            let other_lx = sum_lx - w * x * *level;
            let other_l2 = sum_l2 - w * *level * *level;
            let moved = (x * other_l2 / other_lx).nearest(-half, half - 1.0);
            let new_lx = other_lx + w * x * moved;
            let new_l2 = other_l2 + w * moved * moved;
            let better = (sum_lx * sum_lx * new_l2).less(new_lx * new_lx * sum_l2);
            let moves = other_lx.positive().and(moved.equal(*level).not()).and(new_l2.positive()).and(better);
            *level = moves.select(moved, *level);
            sum_lx = moves.select(new_lx, sum_lx);
            sum_l2 = moves.select(new_l2, sum_l2);
            changed |= moves.any();
        }
        if !changed {
            break;
        }
    }
    let scale = is_zero.not().and(sum_l2.positive()).select(sum_lx / sum_l2, zero);
    let offset = zero.constant(half);
    for level in &mut levels {
        *level = is_zero.select(zero, *level + offset);
    }
    Found::new(scale, zero, &levels)
}

/// The sixteen values of IQ4_NL's levels.
pub(super) const NON_LINEAR: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// The value of [`NON_LINEAR`] that is nearest to x, the upper one where two are.
#[inline(always)]
fn nearest_non_linear<S: Simd>(x: Lanes<S>) -> Lanes<S> {
    let mut nearest = x.constant(NON_LINEAR[0]);
    for pair in NON_LINEAR.windows(2) {
        nearest = x.less(x.constant((pair[0] + pair[1]) / 2.0)).select(nearest, x.constant(pair[1]));
    }
    nearest
}

/// The index in [`NON_LINEAR`] of the value that is nearest to x, the upper one where two are.
#[inline(always)]
pub(super) fn non_linear_index(x: f32) -> u8 {
    NON_LINEAR.windows(2).map(|pair| u8::from(x >= (pair[0] + pair[1]) / 2.0)).sum()
}

/// x ≈ scale · one of [`NON_LINEAR`], in f32: 16 scales around the one that maps the extreme to the lowest value.
#[inline(always)]
pub(super) fn non_linear<S: Simd, const N: usize>(x: &[Lanes<S>; N]) -> [f32; MAX_LANES] {
    let zero = x[0].constant(0.0);
    let (extreme, largest) = extreme(x);
    let is_zero = largest.less(zero.constant(ZERO));

    let lowest = zero.constant(NON_LINEAR[0]);
    let (sum_qx, sum_q2) = non_linear_sums(x, zero.constant(1.0) / ((zero - extreme) / lowest));
    let mut scale = sum_q2.positive().select(sum_qx / sum_q2, zero);
    let mut best = scale * sum_qx;
    for step in -7..=7 {
        let (sum_qx, sum_q2) = non_linear_sums(x, zero.constant(step as f32 + NON_LINEAR[0]) / extreme);
        let better = sum_q2.positive().and((best * sum_q2).less(sum_qx * sum_qx));
        scale = better.select(sum_qx / sum_q2, scale);
        best = better.select(scale * sum_qx, best);
    }
    is_zero.select(zero, scale).to_array()
}

/// As [`level_sums`], of the nearest values of [`NON_LINEAR`].
#[inline(always)]
fn non_linear_sums<S: Simd, const N: usize>(x: &[Lanes<S>; N], inverse: Lanes<S>) -> (Lanes<S>, Lanes<S>) {
    let zero = inverse.constant(0.0);
    let (mut sum_qx, mut sum_q2) = (zero, zero);
    for &x in x {
        let (q, w) = (nearest_non_linear(inverse * x), x * x);
        sum_qx = sum_qx + w * q * x;
        sum_q2 = sum_q2 + w * q * q;
    }
    (sum_qx, sum_q2)
}
