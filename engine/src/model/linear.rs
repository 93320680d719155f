//! A frozen projection with an optional LoRA: y = W x + scale · B (A x).
//!
//! Backward: with u = A x saved, dB += scale · dyᵀ u, du = scale · dy B, dA += duᵀ x, dx = dy W + du A. W is frozen.
//! With dropout, D(x) stands in the place of x in u = A D(x) and in dA, and D(du A) in the place of du A: D is its own backward.
//! Shapes: x, dx (T, in), y, dy (T, out), u, du (T, R), W (out, in) in stored blocks, dequantized into one reused buffer each
//! time it is used.

use candle_core::Tensor;

use crate::Result;
use crate::adapter::LoraPair;
use crate::model::weights::Weight;
use crate::ops::add::add;
use crate::ops::dropout::{self, Dropout};
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
    /// What of its input is dropped in this pass.
    pub(crate) dropout: Option<Dropout>,
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
    let Some(Lora { pair, scale, dropout }) = lora else { return Ok(None) };
    let (tokens, rank) = (x.dim(0)?, pair.lora_a.dim(0)?);
    let u = tensor(vec![0f32; tokens * rank], (tokens, rank))?;
    gemm(&u, &dropped(x, dropout)?, &pair.lora_a.t()?, 1.0, 0.0)?;
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
    let Some(LoraBackward { lora: Lora { pair, scale, dropout }, gradient, x, u }) = lora else { return Ok(()) };
    gemm(&gradient.lora_b, &dy.t()?, u, scale, 1.0)?;
    let du = tensor(vec![0f32; u.elem_count()], u.dims2()?)?;
    gemm(&du, dy, &pair.lora_b, scale, 0.0)?;
    gemm(&gradient.lora_a, &du.t()?, &dropped(x, dropout)?, 1.0, 1.0)?;
    match (dx, dropout) {
        (None, _) => Ok(()),
        (Some((dx, _)), None) => gemm(dx, &du, &pair.lora_a, 1.0, 1.0),
        (Some((dx, _)), Some(dropout)) => {
            let through_lora = tensor(vec![0f32; x.elem_count()], x.dims2()?)?;
            gemm(&through_lora, &du, &pair.lora_a, 1.0, 0.0)?;
            drop_in_place(&through_lora, &dropout)?;
            add(dx, &through_lora)
        }
    }
}

/// The LoRA's input: x itself, or what dropout leaves of it.
fn dropped(x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let Some(dropout) = dropout else { return Ok(x.clone()) };
    let dropped = x.copy()?;
    drop_in_place(&dropped, &dropout)?;
    Ok(dropped)
}

fn drop_in_place(x: &Tensor, dropout: &Dropout) -> Result<()> {
    let columns = x.dim(1)?;
    host_mut(x, |values| {
        dropout::apply_in_place(values, 0, columns, dropout);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};
    use crate::quant::{BlockType, quantize};

    #[test]
    fn backward_is_the_gradient_of_forward() {
        check_backward(None);
    }

    #[test]
    fn backward_is_the_gradient_of_forward_under_a_fixed_mask() {
        check_backward(Dropout::new(0.4, &[1]));
    }

    fn check_backward(dropout: Option<Dropout>) {
        let (tokens, rows, columns, rank, scale) = (5, 7, 6, 3, 0.5f32);
        let mut mask = vec![1f32; tokens * columns];
        if let Some(dropout) = &dropout {
            dropout::apply_in_place(&mut mask, 0, columns, dropout);
            assert!(mask.contains(&0.0) && mask.iter().any(|&factor| factor > 1.0));
        }
        let mask = tensor(mask, (tokens, columns)).unwrap().to_dtype(DType::F64).unwrap();
        let (x, a, b) = (randn(&[tokens, columns]), randn(&[rank, columns]), randn(&[rows, rank]));
        let (weight, dy, begun) = (randn(&[rows, columns]), randn(&[tokens, rows]), randn(&[tokens, columns]));
        let values: Vec<f32> = f32(&weight).flatten_all().unwrap().to_vec1().unwrap();
        let bytes = quantize(BlockType::F32, columns, &values).unwrap();
        let stored = Weight::from_bytes(&bytes, BlockType::F32, (rows, columns)).unwrap();
        let weight = f32(&weight).to_dtype(DType::F64).unwrap();
        let naive = |inputs: &[Tensor]| {
            let u = (&inputs[0] * &mask).unwrap().matmul(&inputs[1].t().unwrap()).unwrap();
            let delta = (u.matmul(&inputs[2].t().unwrap()).unwrap() * f64::from(scale)).unwrap();
            (inputs[0].matmul(&weight.t().unwrap()).unwrap() + delta).unwrap()
        };
        let inputs = [x, a, b];
        let expected = reference(&inputs, &dy, naive);
        let [x, lora_a, lora_b] = inputs.each_ref().map(f32);
        let (pair, scratch) = (LoraPair { lora_a, lora_b }, Scratch::new(rows * columns).unwrap());
        let lora = Lora { pair: &pair, scale, dropout };
        let y = f32(&randn(&[tokens, rows]));
        let u = forward(&y, &x, &stored, Some(lora), 0.0, &scratch).unwrap().expect("a LoRA");
        assert_close("y", &y, &naive(&inputs), 1e-5);

        // Gradients of parameters add to what is there, and so does dx where it is told to.
        let gradient = LoraPair { lora_a: f32(&inputs[1]), lora_b: f32(&inputs[2]) };
        let dx = f32(&begun);
        let backward_lora = LoraBackward { lora, gradient: &gradient, x: &x, u: &u };
        backward(&f32(&dy), &stored, Some(backward_lora), Some((&dx, 1.0)), &scratch).unwrap();
        assert_close("dx", &dx, &(&begun + &expected[0]).unwrap(), 1e-4);
        assert_close("dA", &gradient.lora_a, &(&inputs[1] + &expected[1]).unwrap(), 1e-4);
        assert_close("dB", &gradient.lora_b, &(&inputs[2] + &expected[2]).unwrap(), 1e-4);
    }
}
