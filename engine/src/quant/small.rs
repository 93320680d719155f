//! Blocks of 32 values: one scale, for some types a minimum, and 4, 5 or 8 bits a value.
//!
//! Layouts (all scales f16): Q8_0 scale, 32 × i8; Q4_0 and IQ4_NL scale, 16 bytes of which the low halves are the first 16
//! levels; Q4_1 as Q4_0 with the minimum after the scale; Q5_0 and Q5_1 with the fifth bits as a u32 before the levels.

use half::f16;
use pulp::Simd;

use super::lanes::Lanes;
use super::rounding::Rounding;
use super::search::{NON_LINEAR, non_linear, non_linear_index};

/// Values of a block.
pub(super) const VALUES: usize = 32;

type Levels = [u8; VALUES];

/// 8-bit levels around zero.
#[inline(always)]
pub(super) fn q8_0(values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(34)) {
        // Magnitudes order as their bits do.
        let largest = x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        let scale = f32::from_bits(largest) / 127.0;
        let inverse = inverse(scale);
        let scale = put(block, 0, scale);
        // Counted from -127, as settling counts them.
        let mut levels = [0; VALUES];
        for (level, &x) in levels.iter_mut().zip(x) {
            *level = ((x * inverse).round() as i32 + 127) as u8;
        }
        rounding.settle(x, &mut levels, 254, |level| scale * (i32::from(level) - 127) as f32);
        for (byte, level) in block[2..].iter_mut().zip(levels) {
            *byte = level.wrapping_sub(127);
        }
    }
}

/// 4-bit levels; the value of largest magnitude is level 0.
#[inline(always)]
pub(super) fn q4_0(values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(18)) {
        let (scale, mut levels) = around_zero(x, 8);
        let scale = put(block, 0, scale);
        rounding.settle(x, &mut levels, 15, |level| scale * (i32::from(level) - 8) as f32);
        put_halves(&mut block[2..], &levels);
    }
}

/// As [`q4_0`] with 5-bit levels.
#[inline(always)]
pub(super) fn q5_0(values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(22)) {
        let (scale, mut levels) = around_zero(x, 16);
        let scale = put(block, 0, scale);
        rounding.settle(x, &mut levels, 31, |level| scale * (i32::from(level) - 16) as f32);
        put_fifth_bits(&mut block[2..6], &levels);
        put_halves(&mut block[6..], &levels);
    }
}

/// 4-bit levels between the lowest and the highest value.
#[inline(always)]
pub(super) fn q4_1(values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(20)) {
        let (scale, min, mut levels) = between_extremes(x, 15);
        let (scale, min) = (put(block, 0, scale), put(block, 2, min));
        rounding.settle(x, &mut levels, 15, |level| scale * f32::from(level) + min);
        put_halves(&mut block[4..], &levels);
    }
}

/// As [`q4_1`] with 5-bit levels.
#[inline(always)]
pub(super) fn q5_1(values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    for (x, block) in values.chunks_exact(VALUES).zip(out.chunks_exact_mut(24)) {
        let (scale, min, mut levels) = between_extremes(x, 31);
        let (scale, min) = (put(block, 0, scale), put(block, 2, min));
        rounding.settle(x, &mut levels, 31, |level| scale * f32::from(level) + min);
        put_fifth_bits(&mut block[4..8], &levels);
        put_halves(&mut block[8..], &levels);
    }
}

/// 4-bit levels whose values lie closer together near zero; the scale is searched for.
#[inline(always)]
pub(super) fn iq4_nl<S: Simd>(simd: S, values: &[f32], out: &mut [u8], rounding: &mut impl Rounding) {
    let together = S::F32_LANES;
    for (values, out) in values.chunks(VALUES * together).zip(out.chunks_mut(18 * together)) {
        let scales = non_linear(&Lanes::<S>::gather::<VALUES>(simd, values));
        let blocks = values.chunks_exact(VALUES).zip(out.chunks_exact_mut(18));
        for ((x, block), scale) in blocks.zip(scales) {
            let inverse = inverse(scale);
            let mut levels = [0; VALUES];
            for (level, &x) in levels.iter_mut().zip(x) {
                *level = non_linear_index(inverse * x);
            }
            let scale = put(block, 0, scale);
            rounding.settle(x, &mut levels, 15, |level| scale * NON_LINEAR[usize::from(level)]);
            put_halves(&mut block[2..], &levels);
        }
    }
}

/// The values of IQ4_NL blocks.
pub(crate) fn dequantize_iq4_nl(stored: &[u8], out: &mut [f32]) {
    for (block, values) in stored.chunks_exact(18).zip(out.chunks_exact_mut(VALUES)) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let (low, high) = values.split_at_mut(VALUES / 2);
        for ((&byte, low), high) in block[2..].iter().zip(low).zip(high) {
            *low = scale * NON_LINEAR[usize::from(byte & 15)];
            *high = scale * NON_LINEAR[usize::from(byte >> 4)];
        }
    }
}

/// Scale and levels 0..2 · half, of which `half` stands for zero.
#[inline(always)]
fn around_zero(x: &[f32], half: i32) -> (f32, Levels) {
    let largest = f32::from_bits(x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0));
    let extreme = x.iter().copied().find(|x| x.abs() == largest).unwrap_or(0.0);
    let scale = extreme / -half as f32;
    let inverse = inverse(scale);
    let mut levels = [0; VALUES];
    for (level, &x) in levels.iter_mut().zip(x) {
        *level = ((x * inverse + (half as f32 + 0.5)) as i32).min(2 * half - 1) as u8;
    }
    (scale, levels)
}

/// Scale, minimum and levels 0..=top.
#[inline(always)]
fn between_extremes(x: &[f32], top: i32) -> (f32, f32, Levels) {
    let (mut min, mut max) = (f32::MAX, f32::MIN);
    for &x in x {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
    }
    let scale = (max - min) / top as f32;
    let inverse = inverse(scale);
    let mut levels = [0; VALUES];
    for (level, &x) in levels.iter_mut().zip(x) {
        *level = (((x - min) * inverse + 0.5) as i32).min(top) as u8;
    }
    (scale, min, levels)
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The low four bits of the first 16 levels, and of the others above them.
#[inline(always)]
fn put_halves(out: &mut [u8], levels: &Levels) {
    let (low, high) = levels.split_at(VALUES / 2);
    for ((byte, low), high) in out.iter_mut().zip(low).zip(high) {
        *byte = low & 15 | high << 4;
    }
}

#[inline(always)]
fn put_fifth_bits(out: &mut [u8], levels: &Levels) {
    let bits = levels.iter().enumerate().fold(0u32, |bits, (place, &level)| bits | u32::from(level >> 4) << place);
    out.copy_from_slice(&bits.to_le_bytes());
}

/// An f16 at that byte.
#[inline(always)]
pub(super) fn put(block: &mut [u8], at: usize, value: f32) -> f32 {
    let rounded = f16::from_f32(value);
    block[at..at + 2].copy_from_slice(&rounded.to_le_bytes());
    rounded.to_f32()
}
