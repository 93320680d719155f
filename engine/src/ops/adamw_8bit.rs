//! AdamW with moments in 8 bits: each block of 256 values of a tensor has one factor, its absolute maximum, and a code a value.
//!
//! A code is a place in a table of 256 sorted values in [−1, 1] (m) or [0, 1] (v), finer towards 0: 0, 1, and for each of seven
//! decades 10⁻⁶ … 1 the middles of equal parts of [0.1, 1], twice as many in each decade as in the one below. value =
//! `table[code] · factor`. A step decodes both moments, moves them and the parameters as `adamw.rs` does in f32, takes new factors, and
//! encodes each value to the nearest of the table. Blocks begin anew with each tensor; moments of tensors with fewer than 4096
//! values stay in f32. The tables, the blocks and that limit are bitsandbytes'.
//!
//! Shapes: parameters, gradient (N), tensor after tensor. Storage u8 and f32, computed in f32; no sum, so no order of threads.
//! Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022.

use std::ops::Range;
use std::sync::LazyLock;

use candle_core::Tensor;
use rayon::prelude::*;

use super::adamw::{Rule, Update};
use crate::Result;
use crate::ops::{bail, host, host_mut};

/// Values that share a factor.
pub(super) const BLOCK: usize = 256;
/// Tensors with fewer values keep their moments in f32.
const LEAST_VALUES: usize = 4096;

pub(crate) static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
pub(crate) static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

/// Both moments of every parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Codes of m, then of v, of the large tensors in their order.
    pub codes: Vec<u8>,
    /// Factors of m, then of v, of the large tensors' blocks.
    pub factors: Vec<f32>,
    /// m, then v, of the small tensors.
    pub small: Vec<f32>,
}

impl Moments {
    /// All zero. `tensors` says where each tensor lies among the parameters: one after the other.
    pub fn zeros(tensors: &[Range<usize>]) -> Self {
        let sizes = Sizes::of(tensors);
        let mut codes = vec![SIGNED.encode(0.0); sizes.large];
        codes.resize(2 * sizes.large, UNSIGNED.encode(0.0));
        Self { codes, factors: vec![0.0; 2 * sizes.blocks], small: vec![0.0; 2 * sizes.small] }
    }

    /// Whether they can be moments of those tensors.
    pub fn fit(&self, tensors: &[Range<usize>]) -> bool {
        let Sizes { large, blocks, small } = Sizes::of(tensors);
        (self.codes.len(), self.factors.len(), self.small.len()) == (2 * large, 2 * blocks, 2 * small)
    }

    /// Bytes that they take.
    pub fn size_bytes(tensors: &[Range<usize>]) -> usize {
        let Sizes { large, blocks, small } = Sizes::of(tensors);
        2 * (large + 4 * (blocks + small))
    }
}

/// Values of the large tensors, their blocks, values of the small ones.
struct Sizes {
    large: usize,
    blocks: usize,
    small: usize,
}

impl Sizes {
    fn of(tensors: &[Range<usize>]) -> Self {
        let mut sizes = Self { large: 0, blocks: 0, small: 0 };
        for tensor in tensors {
            if is_large(tensor) {
                sizes.large += tensor.len();
                sizes.blocks += tensor.len().div_ceil(BLOCK);
            } else {
                sizes.small += tensor.len();
            }
        }
        sizes
    }
}

pub(super) fn is_large(tensor: &Range<usize>) -> bool {
    tensor.len() >= LEAST_VALUES
}

/// Moves parameters and moments by one step.
///
/// # Errors
/// Sizes that do not fit.
pub fn step(
    parameters: &Tensor,
    tensors: &[Range<usize>],
    moments: &mut Moments,
    gradient: &Tensor,
    update: Update,
) -> Result<()> {
    let (gradient, rule) = (host(gradient)?, Rule::new(update));
    let count = tensors.last().map_or(0, |last| last.end);
    if parameters.dims() != [count] || gradient.len() != count || !moments.fit(tensors) {
        bail!("adamw_8bit: parameters {:?}, {count} in tensors, gradient {}", parameters.dims(), gradient.len());
    }
    host_mut(parameters, |parameters| {
        moments.parts(tensors, parameters, &gradient).into_par_iter().for_each(|part| part.step(&rule));
        Ok(())
    })
}

/// One tensor's values during a step.
struct Part<'a> {
    p: &'a mut [f32],
    g: &'a [f32],
    kept: Kept<'a>,
}

enum Kept<'a> {
    Blocks { m: &'a mut [u8], v: &'a mut [u8], m_factors: &'a mut [f32], v_factors: &'a mut [f32] },
    Values { m: &'a mut [f32], v: &'a mut [f32] },
}

impl Moments {
    fn parts<'a>(&'a mut self, tensors: &[Range<usize>], mut p: &'a mut [f32], g: &'a [f32]) -> Vec<Part<'a>> {
        let (mut m_codes, mut v_codes) = halves(&mut self.codes);
        let (mut m_factors, mut v_factors) = halves(&mut self.factors);
        let (mut m_small, mut v_small) = halves(&mut self.small);
        let part = |tensor: &Range<usize>| {
            let length = tensor.len();
            let kept = if is_large(tensor) {
                let blocks = length.div_ceil(BLOCK);
                let (m, v) = (take(&mut m_codes, length), take(&mut v_codes, length));
                Kept::Blocks { m, v, m_factors: take(&mut m_factors, blocks), v_factors: take(&mut v_factors, blocks) }
            } else {
                Kept::Values { m: take(&mut m_small, length), v: take(&mut v_small, length) }
            };
            Part { p: take(&mut p, length), g: &g[tensor.clone()], kept }
        };
        tensors.iter().map(part).collect()
    }
}

/// What is kept of m, and of v.
fn halves<T>(values: &mut [T]) -> (&mut [T], &mut [T]) {
    values.split_at_mut(values.len() / 2)
}

/// The first `length` of what is left.
fn take<'a, T>(rest: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (first, others) = std::mem::take(rest).split_at_mut(length);
    *rest = others;
    first
}

impl Part<'_> {
    fn step(self, rule: &Rule) {
        let Self { p, g, kept } = self;
        match kept {
            Kept::Values { m, v } => rule.apply(p, m, v, g),
            Kept::Blocks { m, v, m_factors, v_factors } => {
                let values = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
                let codes = m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK));
                let factors = m_factors.iter_mut().zip(v_factors);
                for (((p, g), (m_codes, v_codes)), (m_factor, v_factor)) in values.zip(codes).zip(factors) {
                    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
                    let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
                    SIGNED.decode_block(m_codes, *m_factor, m);
                    UNSIGNED.decode_block(v_codes, *v_factor, v);
                    rule.apply(p, m, v, g);
                    *m_factor = SIGNED.encode_block(m, m_codes);
                    *v_factor = UNSIGNED.encode_block(v, v_codes);
                }
            }
        }
    }
}

/// The values that codes stand for, in rising order.
pub(crate) struct Table {
    pub(crate) values: [f32; 256],
    /// Between each value and the next: what lies below is nearer to the lower one.
    pub(super) middles: [f32; 255],
}

impl Table {
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for decade in 0..7 {
            let parts = 1usize << (decade + usize::from(!signed));
            let factor = 10f64.powi(decade as i32 - 6) as f32;
            let border = |index: usize| {
                // From the nearer end and rounded once, as torch.linspace has it.
                let step = f64::from((1f32 - 0.1) / parts as f32);
                let up = f64::from(0.1f32) + step * index as f64;
                let down = 1.0 - step * (parts - index) as f64;
                if index < parts.div_ceil(2) { up as f32 } else { down as f32 }
            };
            for part in 0..parts {
                let middle = factor * ((border(part) + border(part + 1)) / 2.0);
                values.push(middle);
                if signed {
                    values.push(-middle);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let values: [f32; 256] = values.try_into().expect("2 values and 254 of the decades");
        let middles = std::array::from_fn(|index| (values[index] + values[index + 1]) / 2.0);
        Self { values, middles }
    }

    /// The code of the value nearest to `x`.
    fn encode(&self, x: f32) -> u8 {
        self.middles.partition_point(|&middle| middle < x) as u8
    }

    fn decode_block(&self, codes: &[u8], factor: f32, values: &mut [f32]) {
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(code)] * factor;
        }
    }

    /// Encodes a block and returns its factor.
    pub(crate) fn encode_block(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let factor = values.iter().fold(0f32, |max, value| max.max(value.abs()));
        let inverse = if factor > 0.0 { 1.0 / factor } else { 0.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            *code = self.encode(value * inverse);
        }
        factor
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        signed_map: Vec<f32>,
        unsigned_map: Vec<f32>,
        learning_rate: f64,
        weight_decay: f64,
        tensors: Vec<GoldenTensor>,
    }

    #[derive(serde::Deserialize)]
    struct GoldenTensor {
        length: usize,
        seed: u64,
        steps: u32,
        /// After the last step, in hexadecimal digits; none for a small tensor.
        m_codes: Option<String>,
        v_codes: Option<String>,
        m_factors: Option<Vec<f32>>,
        v_factors: Option<Vec<f32>>,
        every_16th_parameter: Vec<f32>,
    }

    /// The same numbers as in scripts/golden/adamw_8bit.py: parameters for step 0, then gradients.
    fn values(seed: u64, step: u32, length: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(1_000_003).wrapping_add(u64::from(step) * 7919 + 1) & 0xffff_ffff;
        let next = || {
            state = (state * 1_664_525 + 1_013_904_223) & 0xffff_ffff;
            let uniform = (state >> 8) as f64 / f64::from(1 << 24) * 2.0 - 1.0;
            // Cubed: a gradient has many small and a few large values.
            (uniform * uniform * uniform) as f32
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    fn tensor(values: Vec<f32>) -> Tensor {
        let length = values.len();
        Tensor::from_vec(values, length, &Device::Cpu).unwrap()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn assert_near(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!((ours - theirs).abs() <= tolerance * theirs.abs().max(1e-3), "{what}: {ours} not {theirs}");
        }
    }

    #[test]
    fn tables_and_steps_are_those_of_bitsandbytes() {
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/adamw_8bit.json")).unwrap();
        for (table, map) in [(&*SIGNED, &golden.signed_map), (&*UNSIGNED, &golden.unsigned_map)] {
            assert_eq!(table.values.as_slice(), map.as_slice());
        }
        let mut all = 0..0;
        let spans: Vec<Range<usize>> = golden
            .tensors
            .iter()
            .map(|tensor| {
                all = all.end..all.end + tensor.length;
                all.clone()
            })
            .collect();
        let joined = |step| tensor(golden.tensors.iter().flat_map(|t| values(t.seed, step, t.length)).collect());
        let (parameters, mut moments) = (joined(0), Moments::zeros(&spans));
        for number in 1..=golden.tensors[0].steps {
            let (learning_rate, weight_decay) = (golden.learning_rate, golden.weight_decay);
            let update = Update { step: number, learning_rate, weight_decay, clip_factor: 1.0 };
            step(&parameters, &spans, &mut moments, &joined(number), update).unwrap();
        }
        let parameters: Vec<f32> = parameters.to_vec1().unwrap();
        let mut places = vec![0f32; parameters.len()];
        let parts = moments.parts(&spans, &mut places, &parameters);
        for ((part, theirs), span) in parts.into_iter().zip(&golden.tensors).zip(spans) {
            let ours: Vec<f32> = parameters[span].iter().step_by(16).copied().collect();
            assert_near("parameters", &ours, &theirs.every_16th_parameter, 1e-5);
            match part.kept {
                Kept::Values { .. } => assert!(theirs.m_codes.is_none() && theirs.length < LEAST_VALUES),
                Kept::Blocks { m, v, m_factors, v_factors } => {
                    assert_eq!(m, bytes(theirs.m_codes.as_ref().unwrap()), "codes of m");
                    assert_eq!(v, bytes(theirs.v_codes.as_ref().unwrap()), "codes of v");
                    assert_near("factors of m", m_factors, theirs.m_factors.as_ref().unwrap(), 1e-6);
                    assert_near("factors of v", v_factors, theirs.v_factors.as_ref().unwrap(), 1e-6);
                }
            }
        }
    }

    #[test]
    fn every_code_is_the_nearest_and_gives_itself_back() {
        for table in [&*SIGNED, &*UNSIGNED] {
            assert!(table.values.is_sorted() && table.values[255] == 1.0);
            for code in 0..=u8::MAX {
                assert_eq!(table.encode(table.values[usize::from(code)]), code);
            }
            for index in -1000..=1000 {
                let x = index as f32 / 1000.0;
                let nearest = table.values.iter().map(|value| (value - x).abs()).fold(f32::INFINITY, f32::min);
                assert!((table.values[usize::from(table.encode(x))] - x).abs() <= nearest + 1e-7, "{x}");
            }
        }
    }

    #[test]
    fn a_quarter_of_the_memory_and_zeros_stay_zero() {
        let (large, length) = (70_000, 74_000);
        let spans = [0..large, large..length];
        let mut moments = Moments::zeros(&spans);
        assert!(Moments::size_bytes(&spans) < (8 * length) / 3, "{}", Moments::size_bytes(&spans));
        let (parameters, begun) = (tensor(values(1, 0, length)), moments.clone());
        let before: Vec<f32> = parameters.to_vec1().unwrap();
        let update = Update { step: 1, learning_rate: 0.1, weight_decay: 0.0, clip_factor: 1.0 };
        step(&parameters, &spans, &mut moments, &tensor(vec![0.0; length]), update).unwrap();
        assert_eq!(moments, begun);
        assert_eq!(parameters.to_vec1::<f32>().unwrap(), before);
        assert!(step(&parameters, &spans, &mut moments, &tensor(vec![0.0; 5]), update).is_err());
    }
}
