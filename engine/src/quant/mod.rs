//! The block types that weights are stored in, and the way from f32 into them.
//!
//! The bytes are those of llama.cpp's reference quantization without an importance matrix, for any number of threads and any
//! width of registers (docs/decisions/006); rows that a LoRA was merged into have its scales and levels of their own (`rounding.rs`).

mod k;
mod lanes;
mod nf4;
mod rounding;
mod search;
mod small;
mod widen;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::{Error, Result};

use rounding::{Measuring, Nearest, Rounding};

pub use nf4::{Absmax, Nf4};
pub(crate) use rounding::Directions;
pub(crate) use small::dequantize_iq4_nl;
pub(crate) use widen::widen;

/// How values are stored: in blocks of one type, row after row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 32-bit floating point.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// 4 bits, blocks of 32 with a scale.
    Q4_0,
    /// 4 bits, blocks of 32 with a scale and a minimum.
    Q4_1,
    /// 5 bits, blocks of 32 with a scale.
    Q5_0,
    /// 5 bits, blocks of 32 with a scale and a minimum.
    Q5_1,
    /// 8 bits, blocks of 32 with a scale.
    Q8_0,
    /// 2 bits, super-blocks of 256.
    Q2K,
    /// 3 bits, super-blocks of 256.
    Q3K,
    /// 4 bits, super-blocks of 256.
    Q4K,
    /// 5 bits, super-blocks of 256.
    Q5K,
    /// 6 bits, super-blocks of 256.
    Q6K,
    /// 4 bits of unevenly spaced levels, blocks of 32 with a scale.
    IQ4NL,
}

impl BlockType {
    /// All there are.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::IQ4NL,
    ];

    /// ggml's name, `Q4_K` for one.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::IQ4NL => "IQ4_NL",
        }
    }

    /// Values of a block.
    pub fn block_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4NL => small::VALUES,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => k::VALUES,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 | Self::IQ4NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Whether a block is more than one floating-point number.
    pub fn is_quantized(self) -> bool {
        self.block_values() > 1
    }

    /// Bytes of a row of that many values, a multiple of the block's.
    pub fn row_bytes(self, columns: usize) -> usize {
        debug_assert_eq!(columns % self.block_values(), 0, "a row of {columns} in {self:?}");
        columns / self.block_values() * self.block_bytes()
    }

    /// Where in a block its f16 scales are.
    fn scales(self) -> &'static [usize] {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => &[],
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::IQ4NL => &[0],
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => &[0, 2],
            Self::Q2K => &[80, 82],
            Self::Q3K => &[108],
            Self::Q6K => &[208],
        }
    }
}

/// The largest magnitude that a quantized type takes: far above any weight, and no sum of a search overflows.
const LARGEST: f32 = 1e7;
/// Values that one task converts at least, so that a task outweighs its hand-over; whole turns of every search.
const TASK_VALUES: usize = 1 << 15;

/// Quantizes rows of `columns` values, in parallel; the bytes depend on the values alone.
///
/// # Errors
/// [`Error::Model`] where `columns` is no multiple of the type's block, the values are no whole rows, or one is not finite or
/// too large for the type.
pub fn quantize(dtype: BlockType, columns: usize, values: &[f32]) -> Result<Vec<u8>> {
    let block = dtype.block_values();
    if columns == 0 || !columns.is_multiple_of(block) || !values.len().is_multiple_of(columns) {
        let (count, name) = (values.len(), dtype.name());
        return Err(Error::Model(format!(
            "{count} values in rows of {columns} cannot be stored as {name}, whose blocks hold {block}"
        )));
    }
    let mut stored = vec![0; values.len() / block * dtype.block_bytes()];
    let task_bytes = TASK_VALUES / block * dtype.block_bytes();
    let tasks = stored.par_chunks_mut(task_bytes).zip(values.par_chunks(TASK_VALUES)).enumerate();
    tasks.try_for_each(|(task, (stored, values))| {
        quantize_blocks(dtype, values, stored).map_err(|mut unfit| {
            unfit.index += task * TASK_VALUES;
            let row = unfit.index / columns;
            Error::Model(format!("the value {} in row {row} cannot be stored as {}", unfit.value, dtype.name()))
        })
    })?;
    Ok(stored)
}

/// A value that a type cannot hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Unfit {
    /// Which of the values.
    pub(crate) index: usize,
    /// The value.
    pub(crate) value: f32,
}

/// Writes whole blocks of values to `out`, on this thread.
///
/// # Errors
/// The first value that is not finite or too large for the type; `out` is of no use then.
///
/// # Panics
/// Where `out` is not as long as the values' blocks.
pub(crate) fn quantize_blocks(dtype: BlockType, values: &[f32], out: &mut [u8]) -> Result<(), Unfit> {
    round_blocks(dtype, values, out, Nearest)
}

/// As [`quantize_blocks`], of whole rows that a LoRA with this A was merged into: they keep what it changed.
///
/// # Errors
/// As [`quantize_blocks`].
///
/// # Panics
/// As [`quantize_blocks`], or where the values are no whole rows.
pub(crate) fn quantize_merged(
    dtype: BlockType,
    values: &[f32],
    out: &mut [u8],
    directions: &Directions,
) -> Result<(), Unfit> {
    assert!(values.len().is_multiple_of(directions.columns()), "whole rows");
    let mut measuring = Measuring::new(directions);
    round_blocks(dtype, values, out, &mut measuring)?;
    round_blocks(dtype, values, out, measuring.compensating())
}

fn round_blocks(dtype: BlockType, values: &[f32], out: &mut [u8], rounding: impl Rounding) -> Result<(), Unfit> {
    assert_eq!(values.len() / dtype.block_values() * dtype.block_bytes(), out.len(), "blocks of {dtype:?}");
    let limit = match dtype {
        BlockType::F32 => f32::MAX,
        // What rounds to no more than their own largest values.
        BlockType::F16 => 65_519.996,
        BlockType::BF16 => f32::from_bits(0x7f7f_7fff),
        _ => LARGEST,
    };
    lanes::with_widest(Blocks { dtype, values, out, limit, rounding })
}

struct Blocks<'a, R> {
    dtype: BlockType,
    values: &'a [f32],
    out: &'a mut [u8],
    limit: f32,
    rounding: R,
}

impl<R: Rounding> WithSimd for Blocks<'_, R> {
    type Output = Result<(), Unfit>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Self { dtype, values, out, limit, mut rounding } = self;
        let rounding = &mut rounding;
        // Folded without a branch, as a search for the first one would not be vectorized.
        if !values.iter().fold(true, |fits, value| fits & (value.abs() <= limit)) {
            return Err(first_unfit(values, limit));
        }
        match dtype {
            BlockType::F32 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes()),
            BlockType::F16 => put_sixteen_bits(values, out, |values, part| {
                let mut halves = [f16::ZERO; PART];
                halves[..values.len()].convert_from_f32_slice(values);
                halves.iter().zip(part).for_each(|(half, out)| *out = half.to_le_bytes());
            }),
            BlockType::BF16 => put_sixteen_bits(values, out, |values, part| {
                values.iter().zip(part).for_each(|(&value, out)| *out = bf16::from_f32(value).to_le_bytes());
            }),
            BlockType::Q4_0 => small::q4_0(values, out, rounding),
            BlockType::Q4_1 => small::q4_1(values, out, rounding),
            BlockType::Q5_0 => small::q5_0(values, out, rounding),
            BlockType::Q5_1 => small::q5_1(values, out, rounding),
            BlockType::Q8_0 => small::q8_0(values, out, rounding),
            BlockType::IQ4NL => small::iq4_nl(simd, values, out, rounding),
            BlockType::Q2K => k::quantize::<S, k::Q2K, 16, 16>(simd, values, out, rounding),
            BlockType::Q3K => k::quantize::<S, k::Q3K, 16, 16>(simd, values, out, rounding),
            BlockType::Q4K => k::quantize::<S, k::Q4K, 8, 32>(simd, values, out, rounding),
            BlockType::Q5K => k::quantize::<S, k::Q5K, 8, 32>(simd, values, out, rounding),
            BlockType::Q6K => k::quantize::<S, k::Q6K, 16, 16>(simd, values, out, rounding),
        }
        match first_infinite_scale(dtype, out) {
            None => Ok(()),
            Some(block) => {
                let values = &values[block * dtype.block_values()..][..dtype.block_values()];
                let largest = (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
                let index = largest.unwrap_or(0);
                Err(Unfit { index: block * dtype.block_values() + index, value: values[index] })
            }
        }
    }
}

/// Values that are converted to 16 bits at a time.
const PART: usize = 512;

#[inline(always)]
fn put_sixteen_bits(values: &[f32], out: &mut [u8], convert: impl Fn(&[f32], &mut [[u8; 2]])) {
    let (out, _) = out.as_chunks_mut::<2>();
    values.chunks(PART).zip(out.chunks_mut(PART)).for_each(|(values, out)| convert(values, out));
}

#[cold]
fn first_unfit(values: &[f32], limit: f32) -> Unfit {
    let index =
        values.iter().position(|value| value.is_nan() || value.abs() > limit).expect("one of them does not fit");
    Unfit { index, value: values[index] }
}

/// The first block of which a scale was too large for f16.
#[inline(always)]
fn first_infinite_scale(dtype: BlockType, stored: &[u8]) -> Option<usize> {
    if dtype.scales().is_empty() {
        return None;
    }
    let is_infinite = |block: &[u8], at: usize| block[at + 1] & 0x7c == 0x7c;
    stored.chunks_exact(dtype.block_bytes()).position(|block| dtype.scales().iter().any(|&at| is_infinite(block, at)))
}

#[cfg(test)]
pub(crate) mod tests;
