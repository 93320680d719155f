//! Blocks of 32 values back to f32 in vector registers, for the types that a training reads most; candle's loops, which all others
//! take, are compiled for the least processor.
//!
//! Q8_0: v = d · q. Q4_0: v = d · (q − 8). Q4_1: v = d · q + m. A byte of the last two holds value i in its low half and value i + 16 in its
//! high one. d and m are f16. Products and sums are rounded one by one, as candle rounds them.

use half::f16;

use super::BlockType;
use crate::ops::exp::vectorized;

const VALUES: usize = 32;

/// Writes the blocks' values, where this file knows the type; whether it did.
pub(crate) fn widen(dtype: BlockType, stored: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        BlockType::Q8_0 => each::<34>(
            stored,
            out,
            #[inline(always)]
            |block, out| {
                let d = half(block, 0);
                for (value, &q) in out.iter_mut().zip(&block[2..]) {
                    *value = f32::from(q.cast_signed()) * d;
                }
            },
        ),
        BlockType::Q4_0 => each::<18>(
            stored,
            out,
            #[inline(always)]
            |block, out| {
                let d = half(block, 0);
                let (low, high) = out.split_at_mut(VALUES / 2);
                for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
                    *low = (f32::from(byte & 15) - 8.0) * d;
                    *high = (f32::from(byte >> 4) - 8.0) * d;
                }
            },
        ),
        BlockType::Q4_1 => each::<20>(
            stored,
            out,
            #[inline(always)]
            |block, out| {
                let (d, m) = (half(block, 0), half(block, 2));
                let (low, high) = out.split_at_mut(VALUES / 2);
                for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[4..]) {
                    *low = f32::from(byte & 15) * d + m;
                    *high = f32::from(byte >> 4) * d + m;
                }
            },
        ),
        _ => return false,
    }
    true
}

#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn each<const BYTES: usize>(stored: &[u8], out: &mut [f32], block: impl Fn(&[u8; BYTES], &mut [f32; VALUES])) {
    let (blocks, values) = (stored.as_chunks::<BYTES>().0, out.as_chunks_mut::<VALUES>().0);
    assert_eq!(blocks.len(), values.len(), "blocks and values");
    vectorized(
        #[inline(always)]
        || blocks.iter().zip(values).for_each(|(stored, out)| block(stored, out)),
    );
}
