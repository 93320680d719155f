//! A model of random weights on a GPU, for timings: a few rows of each matrix are made and stored as real ones are, then repeated.

use std::rc::Rc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::weights::{DeviceBlock, DeviceModel, DeviceWeight, Stored, StoredAbsmax};
use super::{Buffer, Gpu, Slab};
use crate::Result;
use crate::bench::{BenchQuantization, BenchSpec};
use crate::model::{Config, Shape};
use crate::quant::{Absmax, BlockType, Nf4, quantize};
use crate::spec::Target;
use crate::testing::normal;

/// Rows of a matrix that are made.
const ROWS: usize = 64;
/// Standard deviation of a weight.
const DEVIATION: f32 = 0.02;
/// Tokens that the model takes, as RoPE's angles have it.
const CONTEXT_LENGTH: usize = 131_072;
const ROPE_BASE: f64 = 500_000.0;

/// Makes the model.
///
/// # Errors
/// [`crate::Error::DeviceMemory`] where it does not fit.
pub(crate) fn model(gpu: &Rc<Gpu>, spec: &BenchSpec) -> Result<DeviceModel> {
    let shape = spec.shape.shape();
    let tied = spec.shape.has_tied_embeddings();
    let mut slab = Slab::new(gpu, pieces(&shape, spec.quantization, tied))?;
    let mut random = ChaCha8Rng::seed_from_u64(3407);
    let norm: Vec<f32> = (0..shape.hidden).map(|_| 1.0 + 0.1 * normal(&mut random)).collect();
    let made = Target::ALL.map(|target| rows_of(&mut random, shape.projection(target).1));
    let mut blocks = Vec::with_capacity(shape.layers);
    for _ in 0..shape.layers {
        let (input_layernorm, post_attention_layernorm) = (slab.of(&norm)?, slab.of(&norm)?);
        let mut projections = Vec::with_capacity(Target::ALL.len());
        for target in Target::ALL {
            let values = &made[target.index()];
            projections.push(weight(&mut slab, values, shape.projection(target), spec.quantization)?);
        }
        let projections = projections.try_into().expect("one for each projection");
        blocks.push(DeviceBlock {
            input_layernorm,
            post_attention_layernorm,
            projections,
            resident: Default::default(),
        });
    }
    let table = rows_of(&mut random, shape.hidden);
    let tables = BenchQuantization::Blocks(table_type(spec.quantization));
    let mut embedding = || weight(&mut slab, &table, (shape.vocabulary, shape.hidden), tables);
    let embed_tokens = embedding()?;
    let lm_head = (!tied).then(embedding).transpose()?;
    let pairs = shape.head_dim / 2;
    let rope_frequencies: Vec<f64> = (0..pairs).map(|pair| ROPE_BASE.powf(-(pair as f64) / pairs as f64)).collect();
    Ok(DeviceModel {
        blocks,
        embed_tokens,
        norm: slab.of(&norm)?,
        lm_head,
        rope_frequencies: slab.of(&rope_frequencies)?,
        config: Config { shape, rms_norm_eps: 1e-5, rope_frequencies, context_length: CONTEXT_LENGTH },
    })
}

/// NF4 checkpoints keep their tables in bf16.
fn table_type(quantization: BenchQuantization) -> BlockType {
    match quantization {
        BenchQuantization::Nf4 | BenchQuantization::Nf4Single => BlockType::BF16,
        BenchQuantization::Blocks(dtype) => dtype,
    }
}

/// Bytes of packed codes, of factors or of factors' codes, their map, nested factors; of GGUF's blocks alone.
fn pieces_of((rows, columns): (usize, usize), quantization: BenchQuantization) -> Vec<usize> {
    match quantization {
        BenchQuantization::Nf4 => {
            let factors = (rows * columns).div_ceil(64);
            vec![rows * columns / 2, factors, 4 * 256, 4 * factors.div_ceil(256)]
        }
        BenchQuantization::Nf4Single => vec![rows * columns / 2, 4 * (rows * columns).div_ceil(64)],
        BenchQuantization::Blocks(dtype) => vec![rows * dtype.row_bytes(columns)],
    }
}

fn pieces(shape: &Shape, quantization: BenchQuantization, tied: bool) -> Vec<usize> {
    let table = pieces_of((shape.vocabulary, shape.hidden), BenchQuantization::Blocks(table_type(quantization)));
    let block: Vec<usize> =
        Target::ALL.iter().flat_map(|&target| pieces_of(shape.projection(target), quantization)).collect();
    let mut all: Vec<usize> = (0..shape.layers).flat_map(|_| block.clone()).collect();
    all.extend(std::iter::repeat_n(4 * shape.hidden, 2 * shape.layers + 1));
    all.extend((0..if tied { 1 } else { 2 }).flat_map(|_| table.clone()));
    all.push(4 * shape.head_dim);
    all
}

/// A matrix alone.
///
/// # Errors
/// As [`model`].
pub(crate) fn matrix(gpu: &Rc<Gpu>, shape: (usize, usize), quantization: BenchQuantization) -> Result<DeviceWeight> {
    let mut slab = Slab::new(gpu, pieces_of(shape, quantization))?;
    let values = rows_of(&mut ChaCha8Rng::seed_from_u64(3407), shape.1);
    weight(&mut slab, &values, shape, quantization)
}

/// Bytes that a matrix takes.
pub(crate) fn stored_bytes(shape: (usize, usize), quantization: BenchQuantization) -> usize {
    pieces_of(shape, quantization).iter().sum()
}

fn rows_of(random: &mut ChaCha8Rng, columns: usize) -> Vec<f32> {
    (0..ROWS * columns).map(|_| DEVIATION * normal(random)).collect()
}

/// A matrix of copies of those rows.
fn weight(
    slab: &mut Slab,
    values: &[f32],
    (rows, columns): (usize, usize),
    quantization: BenchQuantization,
) -> Result<DeviceWeight> {
    let stored = match quantization {
        BenchQuantization::Blocks(dtype) => {
            let unit = quantize(dtype, columns, values)?;
            let blocks = repeated(slab, &unit, rows * dtype.row_bytes(columns))?;
            Stored::Blocks { dtype, blocks }
        }
        BenchQuantization::Nf4 | BenchQuantization::Nf4Single => {
            let unit = Nf4::quantize(values, (ROWS, columns), quantization == BenchQuantization::Nf4)?;
            let packed = repeated(slab, unit.packed(), rows * columns / 2)?;
            let factors = (rows * columns).div_ceil(64);
            let absmax = match unit.absmax() {
                Absmax::Single(unit) => StoredAbsmax::Single(slab.of(&first_of(unit, factors))?),
                Absmax::Double { codes, map, nested, offset } => {
                    let (codes, map) = (repeated(slab, codes, factors)?, slab.of(map)?);
                    let nested = slab.of(&first_of(nested, factors.div_ceil(256)))?;
                    StoredAbsmax::Double { codes, map, nested, offset: *offset }
                }
            };
            Stored::Nf4 { packed, absmax }
        }
    };
    Ok(DeviceWeight { stored, rows, columns })
}

/// So many bytes of a unit over and over.
fn repeated(slab: &mut Slab, unit: &[u8], bytes: usize) -> Result<Buffer> {
    let buffer = slab.take(bytes);
    buffer.write(0, &unit[..unit.len().min(bytes)])?;
    buffer.repeat(unit.len())?;
    Ok(buffer)
}

/// So many values of a unit over and over.
fn first_of(unit: &[f32], count: usize) -> Vec<f32> {
    unit.iter().cycle().take(count).copied().collect()
}
