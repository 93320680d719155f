//! A frozen projection with an optional LoRA: y = W x + scale · B (A x).
//!
//! Backward: with u = A x saved, dB += scale · dyᵀ u, du = scale · dy B, dA += duᵀ x, dx = dy W + du A. W is frozen.
//! Shapes: x, dx (T, in), y, dy (T, out), u, du (T, R), W (out, in) in stored blocks, dequantized into one reused buffer each
//! time it is used.

use candle_core::Tensor;

use crate::Result;
use crate::adapter::LoraPair;
use crate::model::weights::Weight;
use crate::ops::host_mut;
use crate::ops::matmul::gemm;
use crate::ops::tensor;

/// Where one weight at a time is dequantized to; as large as the largest.
#[derive(Debug)]
pub(crate) struct Scratch(Tensor);

impl Scratch {
    /// A buffer for weights of up to that many values.
    pub(crate) fn new(values: usize) -> Result<Self> {
        Ok(Self(tensor(vec![0f32; values], values)?))
    }

    /// The weight in f32, (out, in); valid until the next one is asked for.
    fn dequantize(&self, weight: &Weight) -> Result<Tensor> {
        let (rows, columns) = (weight.rows(), weight.columns());
        let view = self.0.narrow(0, 0, rows * columns)?.reshape((rows, columns))?;
        host_mut(&view, |values| weight.dequantize_rows(0..rows, values))?;
        Ok(view)
    }
}

/// A projection's LoRA during one pass, and the scale it is used with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lora<'a> {
    pub(crate) pair: &'a LoraPair,
    pub(crate) scale: f32,
}

/// out = beta · out + W x + scale · B (A x); returns u = A x where there is a LoRA.
pub(crate) fn forward(
    out: &Tensor,
    x: &Tensor,
    weight: &Weight,
    lora: Option<Lora<'_>>,
    beta: f32,
    scratch: &Scratch,
) -> Result<Option<Tensor>> {
    gemm(out, x, &scratch.dequantize(weight)?.t()?, 1.0, beta)?;
    let Some(Lora { pair, scale }) = lora else { return Ok(None) };
    let (tokens, rank) = (x.dim(0)?, pair.lora_a.dim(0)?);
    let u = tensor(vec![0f32; tokens * rank], (tokens, rank))?;
    gemm(&u, x, &pair.lora_a.t()?, 1.0, 0.0)?;
    gemm(out, &u, &pair.lora_b.t()?, scale, 1.0)?;
    Ok(Some(u))
}

/// A LoRA with what its backward needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoraBackward<'a> {
    pub(crate) lora: Lora<'a>,
    /// Where its gradients accumulate.
    pub(crate) gradient: &'a LoraPair,
    /// The projection's input.
    pub(crate) x: &'a Tensor,
    /// What forward returned.
    pub(crate) u: &'a Tensor,
}

/// Accumulates the LoRA's gradients and, where `dx` is given, sets dx = beta · dx + dy W + du A.
pub(crate) fn backward(
    dy: &Tensor,
    weight: &Weight,
    lora: Option<LoraBackward<'_>>,
    dx: Option<(&Tensor, f32)>,
    scratch: &Scratch,
) -> Result<()> {
    if let Some((dx, beta)) = dx {
        gemm(dx, dy, &scratch.dequantize(weight)?, 1.0, beta)?;
    }
    let Some(LoraBackward { lora: Lora { pair, scale }, gradient, x, u }) = lora else { return Ok(()) };
    gemm(&gradient.lora_b, &dy.t()?, u, scale, 1.0)?;
    let du = tensor(vec![0f32; u.elem_count()], u.dims2()?)?;
    gemm(&du, dy, &pair.lora_b, scale, 0.0)?;
    gemm(&gradient.lora_a, &du.t()?, x, 1.0, 1.0)?;
    match dx {
        Some((dx, _)) => gemm(dx, &du, &pair.lora_a, 1.0, 1.0),
        None => Ok(()),
    }
}
