//! LoRA's own products on a GPU.

use super::flat::of_type;
use super::gemm::Product;
use super::launch::Argument;
use super::sizes::Sizes;
use super::{Gpu, Mat};
use crate::Result;

const MAX_PROJECTIONS: usize = 3;

/// A projection's LoRA among the parameters: addresses of A and B, 0 where it has none, and its outputs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) rows: usize,
}

/// kernels/lora.cu holds the same struct.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    lora_a: [u64; MAX_PROJECTIONS],
    lora_b: [u64; MAX_PROJECTIONS],
    rank: [i32; MAX_PROJECTIONS],
    outputs: [i32; MAX_PROJECTIONS],
    scale: [f32; MAX_PROJECTIONS],
    count: i32,
}

// SAFETY: `repr(C)`, as the kernels have it.
unsafe impl Argument for Group {}

/// f32 values that sums over parts of the tokens need at once.
pub(crate) fn partial_values(_sizes: &Sizes, _tokens: usize) -> usize {
    0
}

/// Writes A's rows and s·B's columns into W'.
pub(crate) fn fill(
    gpu: &Gpu,
    out: Mat<'_>,
    pairs: &[Pair],
    inputs: usize,
    (rank, padded_rank): (usize, usize),
    scale: f32,
) -> Result<()> {
    let mut group = Group { count: pairs.len() as i32, ..Group::default() };
    for (place, pair) in pairs.iter().enumerate() {
        group.lora_a[place] = pair.a;
        group.lora_b[place] = pair.b;
        group.rank[place] = rank as i32;
        group.outputs[place] = pair.rows as i32;
        group.scale[place] = scale;
    }
    let outputs: usize = pairs.iter().map(|pair| pair.rows).sum();
    let width = pairs.len() * padded_rank;
    assert!(out.rows == outputs + width && out.columns >= inputs + width, "lora: {out:?}");
    let groups = width * inputs.div_ceil(8) + outputs * width / 8;
    let name = of_type(out.dtype, "lora_fill_bf16", "lora_fill_f32");
    let launch = gpu.launch(name)?.grid(groups.div_ceil(256) as u32, 256).mat(out).arg(&group);
    // SAFETY: the shape was checked.
    unsafe { launch.int(inputs).int(padded_rank).run() }
}

/// u = x Aᵀ, into x's extension and into `kept`.
pub(crate) fn u(gpu: &Gpu, x: Mat<'_>, a: Mat<'_>, extension: Mat<'_>, kept: Option<Mat<'_>>) -> Result<()> {
    gpu.gemm("lora u", extension, Product::nt(x, a))?;
    match kept {
        Some(kept) => gpu.gemm("lora u", kept, Product::nt(x, a)),
        None => Ok(()),
    }
}

/// du = dy (s·B), into dy's extension.
pub(crate) fn du(gpu: &Gpu, dy: Mat<'_>, scaled_b: Mat<'_>, du: Mat<'_>, _rows: &[usize]) -> Result<()> {
    gpu.gemm("lora du", du, Product::nn(dy, scaled_b))
}

/// dB += s · dyᵀ u.
pub(crate) fn db(gpu: &Gpu, _partials: Mat<'_>, db: Mat<'_>, dy: Mat<'_>, u: Mat<'_>, scale: f32) -> Result<()> {
    gpu.gemm("lora db", db, Product::tn(dy, u).times(scale).plus(db))
}

/// dA += duᵀ x.
pub(crate) fn da(gpu: &Gpu, _partials: Mat<'_>, da: Mat<'_>, du: Mat<'_>, x: Mat<'_>) -> Result<()> {
    gpu.gemm("lora da", da, Product::tn(du, x).plus(da))
}
