//! Embedding rows of tokens on a GPU, from a table that is stored in bf16, f16 or f32.

use super::flat::launch;
use super::{Buffer, Dtype, Gpu, Mat};
use crate::Result;
use crate::quant::BlockType;

/// One row of the table (V, C) for every token (T, i32) to y (T, C).
///
/// Every token must be a row of the table: who uploads them has checked it.
///
/// # Panics
/// Where the table is stored in blocks.
pub(crate) fn forward(gpu: &Gpu, y: Mat<'_>, (table, dtype): (&Buffer, BlockType), tokens: &Buffer) -> Result<()> {
    assert!(tokens.bytes() >= 4 * y.rows, "embedding: {} rows", y.rows);
    let name = match (dtype, y.dtype) {
        (BlockType::BF16, Dtype::Bf16) => "embedding_bf16_bf16",
        (BlockType::F16, Dtype::Bf16) => "embedding_f16_bf16",
        (BlockType::F32, Dtype::Bf16) => "embedding_f32_bf16",
        (BlockType::BF16, Dtype::F32) => "embedding_bf16_f32",
        (BlockType::F16, Dtype::F32) => "embedding_f16_f32",
        (BlockType::F32, Dtype::F32) => "embedding_f32_f32",
        _ => panic!("embedding: a table of {dtype:?} is stored in blocks"),
    };
    let launch = launch(gpu, name, y.shape())?.mat(y).long(table.at(0)).long(tokens.at(0));
    // SAFETY: y has that shape and type; the tokens are rows of the table.
    unsafe { launch.int(y.rows).int(y.columns).run() }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, gpu, random, rounded};
    use super::*;
    use crate::model::weights::Weight;
    use crate::ops::{embedding, host};
    use crate::quant::quantize;

    #[test]
    fn rows_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        let (vocabulary, tokens) = (50, [49u32, 0, 7, 7, 31]);
        let on_gpu = Buffer::of(&gpu, &tokens).unwrap();
        for width in [8, 33, 576] {
            for dtype in [BlockType::F32, BlockType::F16, BlockType::BF16] {
                let stored = quantize(dtype, width, &random(1, vocabulary * width)).unwrap();
                let weight = Weight::from_bytes(&stored, dtype, (vocabulary, width)).unwrap();
                let expected = embedding::forward(&weight, &tokens).unwrap();
                let table = Buffer::of(&gpu, &stored).unwrap();
                for out in [Dtype::F32, Dtype::Bf16] {
                    let y = Held::poisoned(&gpu, (tokens.len(), width), width + 16, out);
                    forward(&gpu, y.mat(), (&table, dtype), &on_gpu).unwrap();
                    assert_eq!(y.values(), rounded(&host(&expected).unwrap(), out));
                }
            }
        }
    }
}
