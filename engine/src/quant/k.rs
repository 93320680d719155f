//! The k-quants: super-blocks of 256 values in groups of 16 or 32, whose scales are quantized once more against one f16.
//!
//! Layouts: Q2_K scales (4 bits, minimum in the upper 4), levels, scale, minimum scale; Q3_K high bits, low bits, scales (6
//! bits), scale; Q4_K scale, minimum scale, scales and minima (6 bits), levels; Q5_K the same with fifth bits before the
//! levels; Q6_K low bits, high bits, scales (i8), scale.

use std::array;

use pulp::Simd;

use super::lanes::{Lanes, nearest};
use super::rounding::Rounding;
use super::search::{Found, Grid, affine, symmetric, symmetric_by_descent};
use super::small::put;

/// Values of a super-block.
pub(super) const VALUES: usize = 256;

type Levels = [u8; VALUES];

/// How one k-quant searches the `G` groups of `N` values of a super-block, and packs what was found.
pub(super) trait KQuant<const G: usize, const N: usize> {
    /// Bytes of a super-block.
    const BYTES: usize;

    /// Searches at most as many groups as there are lanes.
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<N>;

    /// Rounds the scales of a super-block, and the levels for them.
    fn pack(x: &[f32], block: &mut [u8], groups: Groups<G>, rounding: &mut impl Rounding);
}

/// What the search left for the groups of one super-block.
pub(super) struct Groups<const G: usize> {
    scales: [f32; G],
    mins: [f32; G],
    levels: Levels,
}

/// Quantizes super-blocks, as many at once as have their groups in the lanes.
#[inline(always)]
pub(super) fn quantize<S: Simd, K: KQuant<G, N>, const G: usize, const N: usize>(
    simd: S,
    values: &[f32],
    out: &mut [u8],
    rounding: &mut impl Rounding,
) {
    let lanes = S::F32_LANES;
    if lanes < G {
        // The groups of one super-block are searched in several turns.
        for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(K::BYTES)) {
            let mut groups = Groups { scales: [0.0; G], mins: [0.0; G], levels: [0; VALUES] };
            for (turn, x) in x.chunks(lanes * N).enumerate() {
                let found = K::search(simd, x);
                for lane in 0..lanes {
                    groups.take(turn * lanes + lane, &found, lane);
                }
            }
            K::pack(x, block, groups, rounding);
        }
        return;
    }
    let together = lanes / G;
    for (values, out) in values.chunks(VALUES * together).zip(out.chunks_mut(K::BYTES * together)) {
        let found = K::search(simd, values);
        for (index, (x, block)) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(K::BYTES)).enumerate() {
            let mut groups = Groups { scales: [0.0; G], mins: [0.0; G], levels: [0; VALUES] };
            for group in 0..G {
                groups.take(group, &found, index * G + group);
            }
            K::pack(x, block, groups, rounding);
        }
    }
}

impl<const G: usize> Groups<G> {
    #[inline(always)]
    fn take<const N: usize>(&mut self, group: usize, found: &Found<N>, lane: usize) {
        self.scales[group] = found.scale[lane];
        self.mins[group] = found.min[lane];
        for (level, row) in self.levels[N * group..][..N].iter_mut().zip(&found.levels) {
            *level = row[lane] as i32 as u8;
        }
    }
}

/// 2-bit levels in groups of 16.
pub(super) struct Q2K;

impl KQuant<16, 16> for Q2K {
    const BYTES: usize = 84;

    #[inline(always)]
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<16> {
        let x = Lanes::<S>::gather::<16>(simd, values);
        let mut weight = x;
        for weight in &mut weight {
            *weight = weight.abs();
        }
        affine(&x, &weight, Grid { top: 3.0, first: -0.5, step: 0.1, last: 15 }, true)
    }

    #[inline(always)]
    fn pack(x: &[f32], block: &mut [u8], groups: Groups<16>, rounding: &mut impl Rounding) {
        const SCALE_TOP: f32 = 15.0;
        let Groups { scales, mins, mut levels } = groups;
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
            requantize(&mut levels[range.clone()], &x[range], (d, d_min), (0, 3), rounding);
        }
        put_two_bits(&mut block[16..80], &levels);
    }
}

/// 3-bit levels around zero in groups of 16.
pub(super) struct Q3K;

impl KQuant<16, 16> for Q3K {
    const BYTES: usize = 110;

    #[inline(always)]
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<16> {
        symmetric_by_descent(&Lanes::<S>::gather::<16>(simd, values), 4.0)
    }

    #[inline(always)]
    fn pack(x: &[f32], block: &mut [u8], groups: Groups<16>, rounding: &mut impl Rounding) {
        let Groups { scales, mut levels, .. } = groups;
        let extreme = first_extreme(&scales);
        let scale_inverse = if extreme == 0.0 { 0.0 } else { -32.0 / extreme };
        let d = put(block, 108, if extreme == 0.0 { 0.0 } else { 1.0 / scale_inverse });
        let mut packed = [0u8; 12];
        for group in 0..16 {
            // Where all scales are zero, zero bits stand for them.
            let scale = if extreme == 0.0 { -32 } else { nearest(scale_inverse * scales[group], -32, 31) };
            let bits = (scale + 32) as u8;
            packed[group % 8] |= (bits & 15) << (4 * (group / 8));
            packed[8 + group % 4] |= (bits >> 4) << (2 * (group / 4));
            let range = 16 * group..16 * group + 16;
            requantize(&mut levels[range.clone()], &x[range], (d * scale as f32, 0.0), (-4, 3), rounding);
        }
        block[96..108].copy_from_slice(&packed);
        put_high_bit(&mut block[..32], &levels, 2);
        put_two_bits(&mut block[32..96], &levels);
    }
}

/// 4-bit levels in groups of 32.
pub(super) struct Q4K;

impl KQuant<8, 32> for Q4K {
    const BYTES: usize = 144;

    #[inline(always)]
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<32> {
        weighted_affine(simd, values, Grid { top: 15.0, first: -1.0, step: 0.1, last: 20 })
    }

    #[inline(always)]
    fn pack(x: &[f32], block: &mut [u8], mut groups: Groups<8>, rounding: &mut impl Rounding) {
        scales_of_six_bits(x, block, &mut groups, 15, rounding);
        put_four_bits(&mut block[16..], &groups.levels);
    }
}

/// 5-bit levels in groups of 32.
pub(super) struct Q5K;

impl KQuant<8, 32> for Q5K {
    const BYTES: usize = 176;

    #[inline(always)]
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<32> {
        weighted_affine(simd, values, Grid { top: 31.0, first: -0.5, step: 0.1, last: 15 })
    }

    #[inline(always)]
    fn pack(x: &[f32], block: &mut [u8], mut groups: Groups<8>, rounding: &mut impl Rounding) {
        scales_of_six_bits(x, block, &mut groups, 31, rounding);
        put_high_bit(&mut block[16..48], &groups.levels, 4);
        put_four_bits(&mut block[48..], &groups.levels);
    }
}

/// 6-bit levels around zero in groups of 16.
pub(super) struct Q6K;

impl KQuant<16, 16> for Q6K {
    const BYTES: usize = 210;

    #[inline(always)]
    fn search<S: Simd>(simd: S, values: &[f32]) -> Found<16> {
        symmetric(&Lanes::<S>::gather::<16>(simd, values), 32.0)
    }

    #[inline(always)]
    fn pack(x: &[f32], block: &mut [u8], groups: Groups<16>, rounding: &mut impl Rounding) {
        let Groups { scales, mut levels, .. } = groups;
        let extreme = first_extreme(&scales);
        if extreme.abs() < 1e-15 {
            rounding.settle(x, &mut levels, 63, |_| 0.0);
            return block.fill(0);
        }
        let scale_inverse = -128.0 / extreme;
        let d = put(block, 208, 1.0 / scale_inverse);
        for group in 0..16 {
            let scale = nearest(scale_inverse * scales[group], -128, 127);
            block[192 + group] = scale as u8;
            let range = 16 * group..16 * group + 16;
            requantize(&mut levels[range.clone()], &x[range], (d * scale as f32, 0.0), (-32, 31), rounding);
        }
        let (low, high) = block[..192].split_at_mut(128);
        let halves = levels.chunks_exact(128).zip(low.chunks_exact_mut(64)).zip(high.chunks_exact_mut(32));
        for ((levels, low), high) in halves {
            for place in 0..32 {
                let [a, b, c, d] = [levels[place], levels[place + 32], levels[place + 64], levels[place + 96]];
                low[place] = a & 15 | c << 4;
                low[place + 32] = b & 15 | d << 4;
                high[place] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
            }
        }
    }
}

/// The search of Q4_K and Q5_K: large values weigh more.
#[inline(always)]
fn weighted_affine<S: Simd>(simd: S, values: &[f32], grid: Grid) -> Found<32> {
    let x = Lanes::<S>::gather::<32>(simd, values);
    let zero = Lanes::splat(simd, 0.0);
    let mut sum = zero;
    for &x in &x {
        sum = sum + x * x;
    }
    let typical = (sum / zero.constant(32.0)).sqrt();
    let mut weight = x;
    for weight in &mut weight {
        *weight = typical + weight.abs();
    }
    affine(&x, &weight, grid, false)
}

/// Writes the first 16 bytes of Q4_K and Q5_K, and moves the levels to where the rounded scales want them.
#[inline(always)]
fn scales_of_six_bits(
    x: &[f32],
    block: &mut [u8],
    groups: &mut Groups<8>,
    top_level: i32,
    rounding: &mut impl Rounding,
) {
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
        requantize(&mut levels[range.clone()], &x[range], (d, d_min), (0, top_level), rounding);
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

/// The levels, counted from `low`, for the scale that is stored: those nearest to x; where that is zero the search's stay.
#[inline(always)]
fn requantize(
    levels: &mut [u8],
    x: &[f32],
    (scale, min): (f32, f32),
    (low, high): (i32, i32),
    rounding: &mut impl Rounding,
) {
    if scale != 0.0 {
        for (level, &x) in levels.iter_mut().zip(x) {
            *level = (nearest((x + min) / scale, low, high) - low) as u8;
        }
    }
    rounding.settle(x, levels, (high - low) as u8, |level| scale * (i32::from(level) + low) as f32 - min);
}

/// The low two bits of four levels that are 32 apart, a byte; 128 levels after each other.
#[inline(always)]
fn put_two_bits(out: &mut [u8], levels: &Levels) {
    for (levels, out) in levels.chunks_exact(128).zip(out.chunks_exact_mut(32)) {
        for (place, byte) in out.iter_mut().enumerate() {
            let [a, b, c, d] = [levels[place], levels[place + 32], levels[place + 64], levels[place + 96]];
            *byte = a & 3 | (b & 3) << 2 | (c & 3) << 4 | (d & 3) << 6;
        }
    }
}

/// One bit of eight levels that are 32 apart, a byte.
#[inline(always)]
fn put_high_bit(out: &mut [u8], levels: &Levels, bit: u32) {
    out.fill(0);
    for (group, levels) in levels.chunks_exact(32).enumerate() {
        for (byte, level) in out.iter_mut().zip(levels) {
            *byte |= (level >> bit & 1) << group;
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
