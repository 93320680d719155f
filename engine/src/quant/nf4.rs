//! bitsandbytes' NF4: 4 bits a value in blocks of 64, each with one factor, its absolute maximum.
//!
//! Blocks run along the flattened matrix, whatever its rows are; of a byte's two codes the high half comes first. A code is a place in
//! a table of 16 sorted values in [−1, 1], the quantiles of a normal distribution: value = `LEVELS[code] · absmax`. With double
//! quantization the factors are kept in 8 bits: less their mean (the offset), in blocks of 256 with a factor each, as places in the
//! signed table of `ops/adamw_8bit.rs`: absmax = `map[code] · nested_absmax + offset`.
//!
//! Everything is computed in f32 and rounded operation by operation, as bitsandbytes does; its offset is torch's mean and may be another
//! by one unit in the last place. Source: Dettmers et al., "QLoRA", 2023; bitsandbytes' `functional.quantize_4bit`.

use std::ops::Range;

use rayon::prelude::*;

use crate::ops::adamw_8bit::SIGNED;
use crate::{Error, Result};

/// Values that share a factor.
const BLOCK: usize = 64;
/// Factors that share a nested one.
const NESTED_BLOCK: usize = 256;
/// Values that one task converts, so that a task outweighs its hand-over; whole blocks.
const TASK_VALUES: usize = 1 << 15;
/// A whole block of smaller values is taken for one of zeros; a part of one has this for its factor.
const LEAST_FACTOR: f32 = 1e-38;

/// What codes stand for. The same numbers stand in kernels/dequantize_nf4.cu.
#[expect(clippy::excessive_precision, reason = "as bitsandbytes writes them")]
const LEVELS: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// A matrix in NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4 {
    packed: Vec<u8>,
    absmax: Absmax,
    rows: usize,
    columns: usize,
}

/// The factors of a matrix's blocks.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 a block.
    Single(Vec<f32>),
    /// One code a block.
    Double {
        /// Places in the map.
        codes: Vec<u8>,
        /// What codes stand for: 256 values.
        map: Vec<f32>,
        /// One a block of codes.
        nested: Vec<f32>,
        /// Added to every factor.
        offset: f32,
    },
}

impl Nf4 {
    /// A matrix (rows, columns) from its parts, as a checkpoint has them.
    ///
    /// # Errors
    /// [`Error::Model`] where a part is not as long as the shape needs.
    pub fn new(packed: Vec<u8>, absmax: Absmax, (rows, columns): (usize, usize)) -> Result<Self> {
        let values =
            rows.checked_mul(columns).ok_or_else(|| Error::Model(format!("{rows} × {columns} values overflow")))?;
        let blocks = values.div_ceil(BLOCK);
        let check = |what: &str, found: usize, needed: usize| {
            let message = || format!("an NF4 matrix of [{rows}, {columns}] needs {needed} {what}, got {found}");
            (found == needed).then_some(()).ok_or_else(|| Error::Model(message()))
        };
        check("bytes of codes", packed.len(), values.div_ceil(2))?;
        match &absmax {
            Absmax::Single(factors) => check("factors", factors.len(), blocks)?,
            Absmax::Double { codes, map, nested, .. } => {
                check("codes of factors", codes.len(), blocks)?;
                check("values in the map of factors", map.len(), SIGNED.values.len())?;
                check("nested factors", nested.len(), blocks.div_ceil(NESTED_BLOCK))?;
            }
        }
        Ok(Self { packed, absmax, rows, columns })
    }

    /// Quantizes a matrix (rows, columns), its factors too where `double`; in parallel, with the same result for any number of threads.
    ///
    /// # Errors
    /// [`Error::Model`] where the values are not as many as the shape needs, or one is not finite.
    pub fn quantize(values: &[f32], (rows, columns): (usize, usize), double: bool) -> Result<Self> {
        if Some(values.len()) != rows.checked_mul(columns) {
            return Err(Error::Model(format!("{} values are no matrix of [{rows}, {columns}]", values.len())));
        }
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::Model(format!("the value {value} cannot be stored as NF4")));
        }
        let mut packed = vec![0; values.len().div_ceil(2)];
        let mut factors = vec![0.0; values.len().div_ceil(BLOCK)];
        let parts = packed.par_chunks_mut(TASK_VALUES / 2).zip(factors.par_chunks_mut(TASK_VALUES / BLOCK));
        parts.zip(values.par_chunks(TASK_VALUES)).for_each(|((packed, factors), values)| {
            let blocks = packed.chunks_mut(BLOCK / 2).zip(factors).zip(values.chunks(BLOCK));
            blocks.for_each(|((packed, factor), values)| *factor = quantize_block(values, packed));
        });
        let absmax = if double { Absmax::quantize(&factors) } else { Absmax::Single(factors) };
        Ok(Self { packed, absmax, rows, columns })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The codes, two a byte.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// The factors.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Bytes of codes and factors.
    pub fn stored_bytes(&self) -> usize {
        let factors = match &self.absmax {
            Absmax::Single(factors) => size_of_val(factors.as_slice()),
            Absmax::Double { codes, map, nested, .. } => {
                codes.len() + size_of_val(map.as_slice()) + size_of_val(nested.as_slice())
            }
        };
        self.packed.len() + factors
    }

    /// Writes those rows as f32 to `out`, row-major; in parallel where there are many.
    ///
    /// # Errors
    /// [`Error::Model`] where a row is not there or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if rows.start > rows.end || rows.end > self.rows || out.len() != rows.len() * self.columns {
            let (shape, length) = ((self.rows, self.columns), out.len());
            return Err(Error::Model(format!("rows {rows:?} of {shape:?} do not go into {length} values")));
        }
        let first = rows.start * self.columns;
        let tasks = out.par_chunks_mut(TASK_VALUES).enumerate();
        tasks.for_each(|(task, out)| self.dequantize(first + task * TASK_VALUES, out));
        Ok(())
    }

    /// Writes values from that place of the flattened matrix on.
    fn dequantize(&self, mut place: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let (block, count) = (place / BLOCK, out.len().min(BLOCK - place % BLOCK));
            let factor = self.absmax.of(block);
            let levels = LEVELS.map(|level| level * factor);
            let (values, rest) = out.split_at_mut(count);
            for (value, place) in values.iter_mut().zip(place..) {
                let byte = self.packed[place / 2];
                *value = levels[usize::from(if place.is_multiple_of(2) { byte >> 4 } else { byte & 15 })];
            }
            (place, out) = (place + count, rest);
        }
    }
}

impl Absmax {
    fn quantize(factors: &[f32]) -> Self {
        let sum: f64 = factors.iter().map(|&factor| f64::from(factor)).sum();
        let offset = if factors.is_empty() { 0.0 } else { (sum / factors.len() as f64) as f32 };
        let mut codes = vec![0; factors.len()];
        let mut nested = vec![0.0; factors.len().div_ceil(NESTED_BLOCK)];
        let blocks = factors.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK)).zip(&mut nested);
        for ((factors, codes), nested) in blocks {
            let centred: Vec<f32> = factors.iter().map(|factor| factor - offset).collect();
            *nested = SIGNED.encode_block(&centred, codes);
        }
        Self::Double { codes, map: SIGNED.values.to_vec(), nested, offset }
    }

    /// The factor of that block.
    fn of(&self, block: usize) -> f32 {
        match self {
            Self::Single(factors) => factors[block],
            Self::Double { codes, map, nested, offset } => {
                map[usize::from(codes[block])] * nested[block / NESTED_BLOCK] + offset
            }
        }
    }
}

/// Writes a block's codes and returns its factor. An odd value's neighbour is 0.
fn quantize_block(values: &[f32], packed: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    // bitsandbytes multiplies whole blocks by the inverse, and divides a part of one.
    let (factor, inverse) = if values.len() == BLOCK {
        (largest, Some(1.0 / largest.max(LEAST_FACTOR)))
    } else {
        (largest.max(LEAST_FACTOR), None)
    };
    let code = |value: f32| {
        let scaled = inverse.map_or_else(|| value / factor, |inverse| value * inverse).clamp(-1.0, 1.0);
        // What lies in the middle belongs to the lower level.
        LEVELS.windows(2).filter(|pair| (pair[0] + pair[1]) / 2.0 < scaled).count() as u8
    };
    for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
        *byte = code(pair[0]) << 4 | code(pair.get(1).copied().unwrap_or(0.0));
    }
    factor
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::gguf::GgufFile;
    use crate::model::weights::Weight;

    #[derive(serde::Deserialize)]
    struct Golden {
        matrices: Vec<Matrix>,
    }

    /// Bytes and the bits of f32 in hexadecimal digits.
    #[derive(serde::Deserialize)]
    struct Matrix {
        rows: usize,
        columns: usize,
        packed: String,
        absmax: String,
        offset: String,
        absmax_codes: String,
        nested_absmax: String,
        every_31st: String,
        every_31st_double: String,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn floats(hex: &str) -> Vec<f32> {
        bytes(hex).chunks_exact(4).map(|bytes| f32::from_be_bytes(bytes.try_into().unwrap())).collect()
    }

    /// The same numbers as in scripts/golden/nf4.py.
    fn values(seed: u64, length: usize) -> Vec<f32> {
        let mut state = (seed * 1_000_003 + 1) & 0xffff_ffff;
        let next = || {
            state = (state * 1_664_525 + 1_013_904_223) & 0xffff_ffff;
            let uniform = (state >> 8) as f64 / f64::from(1 << 24) * 2.0 - 1.0;
            (uniform * uniform * uniform) as f32
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn dequantized(matrix: &Nf4) -> Vec<f32> {
        let mut out = vec![f32::NAN; matrix.rows() * matrix.columns()];
        matrix.dequantize_rows(0..matrix.rows(), &mut out).unwrap();
        out
    }

    fn ulps(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn codes_and_values_are_those_of_bitsandbytes() {
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/nf4.json")).unwrap();
        for (seed, theirs) in golden.matrices.iter().enumerate() {
            let shape = (theirs.rows, theirs.columns);
            let values = values(seed as u64, shape.0 * shape.1);
            let single = Nf4::quantize(&values, shape, false).unwrap();
            assert_eq!(single.packed(), bytes(&theirs.packed), "codes of {shape:?}");
            assert_eq!(single.absmax(), &Absmax::Single(floats(&theirs.absmax)), "factors of {shape:?}");
            let every_31st = |matrix: &Nf4| dequantized(matrix).into_iter().step_by(31).collect::<Vec<_>>();
            assert_eq!(every_31st(&single), floats(&theirs.every_31st), "values of {shape:?}");

            let double = Nf4::quantize(&values, shape, true).unwrap();
            let Absmax::Double { codes, map, nested, offset } = double.absmax() else { panic!("double quantization") };
            let their_offset = floats(&theirs.offset)[0];
            assert_eq!(codes, &bytes(&theirs.absmax_codes), "codes of factors of {shape:?}");
            assert!(ulps(*offset, their_offset) <= 1, "offset {offset} not {their_offset}");
            let nested_theirs = floats(&theirs.nested_absmax);
            assert!(
                nested.iter().zip(&nested_theirs).all(|(a, b)| (a - b).abs() <= 1e-6),
                "{nested:?} not {nested_theirs:?}"
            );
            let absmax =
                Absmax::Double { codes: codes.clone(), map: map.clone(), nested: nested_theirs, offset: their_offset };
            let read = Nf4::new(bytes(&theirs.packed), absmax, shape).unwrap();
            assert_eq!(every_31st(&read), floats(&theirs.every_31st_double), "values of {shape:?}, factors in 8 bits");
        }
    }

    #[test]
    fn every_value_is_the_nearest_level() {
        let shape = (50, 100);
        let values = values(7, shape.0 * shape.1);
        let matrix = Nf4::quantize(&values, shape, false).unwrap();
        let Absmax::Single(factors) = matrix.absmax() else { panic!("f32 factors") };
        for (index, (value, read)) in values.iter().zip(dequantized(&matrix)).enumerate() {
            let factor = factors[index / BLOCK];
            let nearest = LEVELS.iter().map(|level| (level * factor - value).abs()).fold(f32::INFINITY, f32::min);
            assert!((value - read).abs() <= nearest + 1e-6 * factor, "{value} became {read}");
        }
    }

    #[test]
    fn rows_are_read_alone_and_across_blocks() {
        let shape = (7, 33);
        let matrix = Nf4::quantize(&values(3, shape.0 * shape.1), shape, true).unwrap();
        let all = dequantized(&matrix);
        for row in 0..shape.0 {
            let mut out = vec![f32::NAN; shape.1];
            matrix.dequantize_rows(row..row + 1, &mut out).unwrap();
            assert_eq!(out, all[row * shape.1..][..shape.1]);
        }
        matrix.dequantize_rows(3..3, &mut []).unwrap();
        assert!(matrix.dequantize_rows(6..8, &mut vec![0.0; 66]).is_err());
        assert!(matrix.dequantize_rows(0..1, &mut [0.0; 32]).is_err());
    }

    #[test]
    fn zeros_stay_zeros_and_what_does_not_fit_is_refused() {
        for (shape, double) in [((3, 64), false), ((3, 50), true), ((0, 64), true)] {
            let matrix = Nf4::quantize(&vec![0.0; shape.0 * shape.1], shape, double).unwrap();
            assert!(dequantized(&matrix).iter().all(|value| value.abs() <= 1e-37), "{shape:?}");
        }
        assert!(Nf4::quantize(&[1.0, f32::NAN], (1, 2), false).is_err());
        assert!(Nf4::quantize(&[1.0, 2.0], (1, 3), false).is_err());
        let refused = Nf4::new(vec![0; 2], Absmax::Single(vec![]), (1, 4)).unwrap_err().to_string();
        assert!(refused.contains("needs 1 factors, got 0"), "{refused}");
    }

    #[test]
    fn a_checkpoint_of_bitsandbytes_is_what_its_weights_quantize_to() {
        let Some(folder) = crate::testing::shared_data() else { return };
        let bytes = std::fs::read(folder.join("stories260k-bnb-nf4-dq/model.safetensors")).unwrap();
        let checkpoint = SafeTensors::deserialize(&bytes).unwrap();
        let gguf = GgufFile::open(&folder.join("stories260K.gguf")).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = checkpoint.tensor(name).unwrap().data();
            data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
        };
        // Not q and k, whose rows stand in another order in GGUF.
        for (theirs, ours) in
            [("mlp.gate_proj", "ffn_gate"), ("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")]
        {
            for layer in 0..5 {
                let name = format!("model.layers.{layer}.{theirs}.weight");
                let tensor = gguf.require_tensor(&format!("blk.{layer}.{ours}.weight")).unwrap();
                let weight = Weight::from_tensor(&gguf, tensor).unwrap();
                let shape = (weight.rows(), weight.columns());
                let mut values = vec![0.0; shape.0 * shape.1];
                weight.dequantize_rows(0..shape.0, &mut values).unwrap();
                let quantized = Nf4::quantize(&values, shape, true).unwrap();
                let packed = checkpoint.tensor(&name).unwrap().data();
                assert_eq!(quantized.packed(), packed, "codes of {name}");

                let state = checkpoint.tensor(&format!("{name}.quant_state.bitsandbytes__nf4")).unwrap();
                let state: serde_json::Value = serde_json::from_slice(state.data()).unwrap();
                let their_offset = state["nested_offset"].as_f64().unwrap() as f32;
                let their_codes = checkpoint.tensor(&format!("{name}.absmax")).unwrap().data();
                let Absmax::Double { codes, map, nested, offset } = quantized.absmax() else {
                    panic!("double quantization")
                };
                assert!(ulps(*offset, their_offset) <= 1, "offset {offset} not {their_offset}");
                assert_eq!(map, &floats(&format!("{name}.nested_quant_map")));
                let their_nested = floats(&format!("{name}.nested_absmax"));
                assert!((nested[0] - their_nested[0]).abs() <= 1e-6, "{nested:?} not {their_nested:?}");
                // Made on a CPU, whose coarse lookup misses the nearest by one now and then (scripts/golden/nf4.py).
                let missed: Vec<u8> =
                    codes.iter().zip(their_codes).map(|(a, b)| a.abs_diff(*b)).filter(|&by| by > 0).collect();
                assert!(missed.len() * 20 <= codes.len() && missed.iter().all(|&by| by == 1), "{name}: {missed:?}");

                let absmax = Absmax::Double {
                    codes: their_codes.to_vec(),
                    map: floats(&format!("{name}.nested_quant_map")),
                    nested: their_nested,
                    offset: their_offset,
                };
                let read = Nf4::new(packed.to_vec(), absmax, shape).unwrap();
                let (mut difference, mut norm) = (0.0, 0.0);
                for (value, read) in values.iter().zip(dequantized(&read)) {
                    difference += f64::from(value - read).powi(2);
                    norm += f64::from(*value).powi(2);
                }
                assert!(difference.sqrt() < 0.12 * norm.sqrt(), "{name}: {difference} of {norm}");
            }
        }
    }
}
