//! The k-quants: super-blocks of 256 values in groups of 16 or 32, whose scales are quantized once more against one f16.
//!
//! Layouts: Q2_K scales (4 bits, minimum in the upper 4), levels, scale, minimum scale; Q3_K high bits, low bits, scales (6
//! bits), scale; Q4_K scale, minimum scale, scales and minima (6 bits), levels; Q5_K the same with fifth bits before the
//! levels; Q6_K low bits, high bits, scales (i8), scale.

use std::array;

use pulp::Simd;

use super::lanes::{Lanes, nearest};
use super::search::{Found, Grid, affine, symmetric, symmetric_by_descent};
use super::small::put;

/// Values of a super-block.
pub(super) const VALUES: usize = 256;

type Levels = [u8; VALUES];

/// 2-bit levels in groups of 16.
#[inline(always)]
pub(super) fn q2_k<S: Simd>(simd: S, values: &[f32], out: &mut [u8]) {
    const GRID: Grid = Grid { top: 3.0, first: -0.5, step: 0.1, last: 15 };
    const SCALE_TOP: f32 = 15.0;
    let search = |values: &[f32]| {
        let x = Lanes::<S>::gather::<16>(simd, values);
        affine(&x, &x.map(Lanes::abs), GRID, true)
    };
    for_each_super_block::<S, 84, 16, 16>(search, values, out, |x, block, Groups { scales, mins, mut levels }| {
        let (scale_inverse, top_scale) = inverse_of_top(&scales, SCALE_TOP);
        let (min_inverse, top_min) = inverse_of_top(&mins, SCALE_TOP);
        let d = put(block, 80, top_scale);
        let d_min = put(block, 82, top_min);
        for group in 0..16 {
            let scale = nearest(scale_inverse * scales[group], 0, 15) as u8;
            let min = nearest(min_inverse * mins[group], 0, 15) as u8;
            block[group] = scale | min << 4;
            let range = 16 * group..16 * group + 16;
            let (d, d_min) = (d * f32::from(scale), d_min * f32::from(min));
            requantize(&mut levels[range.clone()], &x[range], (d, d_min), (0, 3));
        }
        put_two_bits(&mut block[16..80], &levels);
    });
}

/// 3-bit levels around zero in groups of 16.
#[inline(always)]
pub(super) fn q3_k<S: Simd>(simd: S, values: &[f32], out: &mut [u8]) {
    let search = |values: &[f32]| symmetric_by_descent(&Lanes::<S>::gather::<16>(simd, values), 4.0);
    for_each_super_block::<S, 110, 16, 16>(search, values, out, |x, block, Groups { scales, mut levels, .. }| {
        let extreme = first_extreme(&scales);
        let scale_inverse = if extreme == 0.0 { 0.0 } else { -32.0 / extreme };
        let d = put(block, 108, if extreme == 0.0 { 0.0 } else { 1.0 / scale_inverse });
        let mut packed = [0u8; 12];
        for group in 0..16 {
            let scale = match extreme == 0.0 {
                // Six zero bits stand for −32, as all of the block's scales do then; its scale is zero.
                true => -32,
                false => nearest(scale_inverse * scales[group], -32, 31),
            };
            let bits = (scale + 32) as u8;
            packed[group % 8] |= (bits & 15) << (4 * (group / 8));
            packed[8 + group % 4] |= (bits >> 4) << (2 * (group / 4));
            let range = 16 * group..16 * group + 16;
            requantize(&mut levels[range.clone()], &x[range], (d * scale as f32, 0.0), (-4, 3));
        }
        block[96..108].copy_from_slice(&packed);
        for (place, byte) in block[..32].iter_mut().enumerate() {
            *byte = (0..8).fold(0, |bits, group| bits | (levels[32 * group + place] >> 2) << group);
        }
        put_two_bits(&mut block[32..96], &levels);
    });
}

/// 4-bit levels in groups of 32.
#[inline(always)]
pub(super) fn q4_k<S: Simd>(simd: S, values: &[f32], out: &mut [u8]) {
    const GRID: Grid = Grid { top: 15.0, first: -1.0, step: 0.1, last: 20 };
    let search = |values: &[f32]| weighted_affine(simd, values, GRID);
    for_each_super_block::<S, 144, 8, 32>(search, values, out, |x, block, mut groups| {
        scales_of_six_bits(x, block, &mut groups, 15);
        put_four_bits(&mut block[16..], &groups.levels);
    });
}

/// 5-bit levels in groups of 32.
#[inline(always)]
pub(super) fn q5_k<S: Simd>(simd: S, values: &[f32], out: &mut [u8]) {
    const GRID: Grid = Grid { top: 31.0, first: -0.5, step: 0.1, last: 15 };
    let search = |values: &[f32]| weighted_affine(simd, values, GRID);
    for_each_super_block::<S, 176, 8, 32>(search, values, out, |x, block, mut groups| {
        scales_of_six_bits(x, block, &mut groups, 31);
        for (place, byte) in block[16..48].iter_mut().enumerate() {
            *byte = (0..8).fold(0, |bits, group| bits | (groups.levels[32 * group + place] >> 4) << group);
        }
        put_four_bits(&mut block[48..], &groups.levels);
    });
}

/// 6-bit levels around zero in groups of 16.
#[inline(always)]
pub(super) fn q6_k<S: Simd>(simd: S, values: &[f32], out: &mut [u8]) {
    let search = |values: &[f32]| symmetric(&Lanes::<S>::gather::<16>(simd, values), 32.0);
    for_each_super_block::<S, 210, 16, 16>(search, values, out, |x, block, Groups { scales, mut levels, .. }| {
        let extreme = first_extreme(&scales);
        if extreme.abs() < 1e-15 {
            return block.fill(0);
        }
        let scale_inverse = -128.0 / extreme;
        let d = put(block, 208, 1.0 / scale_inverse);
        for group in 0..16 {
            let scale = nearest(scale_inverse * scales[group], -128, 127);
            block[192 + group] = scale as u8;
            let range = 16 * group..16 * group + 16;
            requantize(&mut levels[range.clone()], &x[range], (d * scale as f32, 0.0), (-32, 31));
        }
        let (low, high) = block[..192].split_at_mut(128);
        let halves = levels.chunks_exact(128).zip(low.chunks_exact_mut(64)).zip(high.chunks_exact_mut(32));
        for ((levels, low), high) in halves {
            for place in 0..32 {
                let [a, b, c, d] = [0, 32, 64, 96].map(|from| levels[from + place]);
                low[place] = a & 15 | c << 4;
                low[place + 32] = b & 15 | d << 4;
                high[place] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
            }
        }
    });
}

/// What the search left for the groups of one super-block.
struct Groups<const G: usize> {
    scales: [f32; G],
    mins: [f32; G],
    levels: Levels,
}

/// Searches the scales of as many super-blocks as fill the lanes, and has each packed. `G` groups of `N` values a super-block
/// of `BYTES` bytes.
#[inline(always)]
fn for_each_super_block<S: Simd, const BYTES: usize, const G: usize, const N: usize>(
    search: impl Fn(&[f32]) -> Found<N>,
    values: &[f32],
    out: &mut [u8],
    pack: impl Fn(&[f32], &mut [u8], Groups<G>),
) {
    if S::F32_LANES < G {
        // Fewer lanes than groups: the groups of a super-block are searched in several turns.
        for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(BYTES)) {
            let mut groups = Groups { scales: [0.0; G], mins: [0.0; G], levels: [0; VALUES] };
            for (turn, x) in x.chunks(S::F32_LANES * N).enumerate() {
                let found = search(x);
                (0..S::F32_LANES).for_each(|lane| take_group(&found, lane, &mut groups, turn * S::F32_LANES + lane));
            }
            pack(x, block, groups);
        }
        return;
    }
    let together = S::F32_LANES / G;
    for (values, out) in values.chunks(VALUES * together).zip(out.chunks_mut(BYTES * together)) {
        let found = search(values);
        for (index, (x, block)) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(BYTES)).enumerate() {
            let mut groups = Groups { scales: [0.0; G], mins: [0.0; G], levels: [0; VALUES] };
            (0..G).for_each(|group| take_group(&found, index * G + group, &mut groups, group));
            pack(x, block, groups);
        }
    }
}

#[inline(always)]
fn take_group<const G: usize, const N: usize>(found: &Found<N>, lane: usize, groups: &mut Groups<G>, group: usize) {
    groups.scales[group] = found.scale[lane];
    groups.mins[group] = found.min[lane];
    for (level, row) in groups.levels[N * group..][..N].iter_mut().zip(&found.levels) {
        *level = row[lane] as i32 as u8;
    }
}

/// The search of Q4_K and Q5_K: large values weigh more.
#[inline(always)]
fn weighted_affine<S: Simd>(simd: S, values: &[f32], grid: Grid) -> Found<32> {
    let x = Lanes::<S>::gather::<32>(simd, values);
    let zero = Lanes::splat(simd, 0.0);
    let mean_square = x.iter().fold(zero, |sum, &x| sum + x * x) / zero.constant(32.0);
    let typical = mean_square.sqrt();
    affine(&x, &x.map(|x| typical + x.abs()), grid, false)
}

/// Writes the first 16 bytes of Q4_K and Q5_K, and moves the levels to where the rounded scales want them.
#[inline(always)]
fn scales_of_six_bits(x: &[f32], block: &mut [u8], groups: &mut Groups<8>, top_level: i32) {
    const TOP: f32 = 63.0;
    let Groups { scales, mins, levels } = groups;
    let (scale_inverse, top_scale) = inverse_of_top(scales, TOP);
    let (min_inverse, top_min) = inverse_of_top(mins, TOP);
    let d = put(block, 0, top_scale);
    let d_min = put(block, 2, top_min);
    let packed = &mut block[4..16];
    let scales: [u8; 8] = array::from_fn(|group| nearest(scale_inverse * scales[group], 0, 63) as u8);
    let mins: [u8; 8] = array::from_fn(|group| nearest(min_inverse * mins[group], 0, 63) as u8);
    for group in 0..4 {
        packed[group] = scales[group] | (scales[group + 4] >> 4) << 6;
        packed[group + 4] = mins[group] | (mins[group + 4] >> 4) << 6;
        packed[group + 8] = scales[group + 4] & 15 | mins[group + 4] << 4;
    }
    for group in 0..8 {
        let range = 32 * group..32 * group + 32;
        let (d, d_min) = (d * f32::from(scales[group]), d_min * f32::from(mins[group]));
        requantize(&mut levels[range.clone()], &x[range], (d, d_min), (0, top_level));
    }
}

/// What maps the largest of them (at least zero) to `top`, and what one step of the mapped values is worth.
#[inline(always)]
fn inverse_of_top(values: &[f32], top: f32) -> (f32, f32) {
    let largest = values.iter().fold(0f32, |largest, &value| if value > largest { value } else { largest });
    (if largest > 0.0 { top / largest } else { 0.0 }, largest / top)
}

/// The value of largest magnitude, the first of several.
#[inline(always)]
fn first_extreme(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |extreme, &value| if value.abs() > extreme.abs() { value } else { extreme })
}

/// The levels, counted from `low`, that lie nearest to x for the scale that is stored; where that is zero the search's stay.
#[inline(always)]
fn requantize(levels: &mut [u8], x: &[f32], (scale, min): (f32, f32), (low, high): (i32, i32)) {
    if scale == 0.0 {
        return;
    }
    for (level, &x) in levels.iter_mut().zip(x) {
        *level = (nearest((x + min) / scale, low, high) - low) as u8;
    }
}

/// The low two bits of four levels that are 32 apart, a byte; 128 levels after each other.
#[inline(always)]
fn put_two_bits(out: &mut [u8], levels: &Levels) {
    for (levels, out) in levels.chunks_exact(128).zip(out.chunks_exact_mut(32)) {
        for (place, byte) in out.iter_mut().enumerate() {
            let [a, b, c, d] = [0, 32, 64, 96].map(|from| levels[from + place] & 3);
            *byte = a | b << 2 | c << 4 | d << 6;
        }
    }
}

/// The low four bits of two levels that are 32 apart, a byte; 64 levels after each other.
#[inline(always)]
fn put_four_bits(out: &mut [u8], levels: &Levels) {
    for (levels, out) in levels.chunks_exact(64).zip(out.chunks_exact_mut(32)) {
        for (place, byte) in out.iter_mut().enumerate() {
            *byte = levels[place] & 15 | levels[place + 32] << 4;
        }
    }
}
