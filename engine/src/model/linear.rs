//! Frozen projections of one input, each with an optional LoRA: y = W x + scale · B (A x).
//!
//! With u = A x saved, forward is one product, [x | scale · u] · [W | B]ᵀ: the LoRA's second factor costs nothing but a little
//! depth. Backward: dB += scale · dyᵀ u, du = scale · dy B, dA += duᵀ x, and dx = [dy | du] · [W; A]. W is frozen.
//! With dropout, D(x) stands in the place of x in u = A D(x) and in dA, and D(du A) in the place of du A: D is its own backward.
//! Shapes: x, dx (T, in), y, dy (T, out), u, du (T, R), W (out, in) in stored blocks. Forward dequantizes W by bands of rows, right
//! into the packed operand; so does backward with strips of columns where they are whole blocks, else through one reused buffer.

use candle_core::Tensor;

use crate::Result;
use crate::adapter::LoraPair;
use crate::model::weights::Weight;
use crate::ops::add::add;
use crate::ops::dropout::{self, Dropout};
use crate::ops::matmul::{Compute, Left, Matrix, Output, PANEL_COLUMNS, add_transposed, product};
use crate::ops::{host, host_mut, tensor};

/// Where one weight at a time is dequantized to; as large as the largest.
#[derive(Debug)]
pub(crate) struct Scratch(Vec<f32>);

impl Scratch {
    /// A buffer for weights of up to that many values.
    pub(crate) fn new(values: usize) -> Self {
        Self(vec![0f32; values])
    }

    /// The weight in f32, (out, in), row-major.
    fn dequantize(&mut self, weight: &Weight) -> Result<&[f32]> {
        let values = &mut self.0[..weight.rows() * weight.columns()];
        weight.dequantize_rows(0..weight.rows(), values)?;
        Ok(values)
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

/// One of the projections of an input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projection<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) lora: Option<Lora<'a>>,
}

/// out = W x + scale · B (A x) for each projection of x, added to what stands in `out` where `keep`; returns u = A x of each
/// that has a LoRA.
pub(crate) fn forward<const N: usize>(
    x: &Tensor,
    projections: [(Projection<'_>, &Tensor); N],
    keep: bool,
    compute: Compute,
) -> Result<[Option<Tensor>; N]> {
    let (tokens, columns) = x.dims2()?;
    let x_values = host(x)?;
    let left = Left::of(Matrix::rows(&x_values, tokens, columns, columns), compute);
    let mut us = [const { None }; N];
    for ((Projection { weight, lora }, out), u) in projections.into_iter().zip(&mut us) {
        let lora = lora.map(|lora| forward_lora(x, &left, lora, compute)).transpose()?;
        let left_of_lora =
            lora.as_ref().map(|ForwardLora { u, rank, .. }| Left::of(Matrix::rows(u, tokens, *rank, *rank), compute));
        let mut lefts = vec![&left];
        lefts.extend(&left_of_lora);
        host_mut(out, |values| {
            let out = Output { values, columns: weight.rows(), alpha: 1.0, keep };
            product(&lefts, out, &|rows, panel| {
                panel.push_rows_with(columns, |values| weight.dequantize_part(rows.clone(), 0..columns, values))?;
                if let Some(ForwardLora { lora_b, rank, scale, .. }) = &lora {
                    panel.push_rows(&lora_b[rows.start * rank..rows.end * rank], *rank, *scale);
                }
                Ok(())
            })
        })?;
        drop(left_of_lora);
        *u = lora.map(|ForwardLora { u, rank, .. }| tensor(u, (tokens, rank))).transpose()?;
    }
    Ok(us)
}

/// What the product of a projection takes from its LoRA.
struct ForwardLora<'a> {
    lora_b: crate::ops::Host<'a>,
    rank: usize,
    scale: f32,
    /// A x.
    u: Vec<f32>,
}

fn forward_lora<'a>(x: &Tensor, left: &Left<'_>, lora: Lora<'a>, compute: Compute) -> Result<ForwardLora<'a>> {
    let Lora { pair: LoraPair { lora_a, lora_b }, scale, dropout } = lora;
    let (tokens, columns) = x.dims2()?;
    let (rank, lora_a) = (lora_a.dim(0)?, host(lora_a)?);
    let mut u = vec![0f32; tokens * rank];
    let out = Output { values: &mut u, columns: rank, alpha: 1.0, keep: false };
    let times_a = |left: &Left<'_>, out| {
        product(&[left], out, &|rows, panel| {
            panel.push_rows(&lora_a[rows.start * columns..rows.end * columns], columns, 1.0);
            Ok(())
        })
    };
    match dropout {
        None => times_a(left, out)?,
        Some(_) => {
            let x = dropped(x, dropout)?;
            times_a(&Left::of(Matrix::rows(&host(&x)?, tokens, columns, columns), compute), out)?;
        }
    }
    Ok(ForwardLora { lora_b: host(lora_b)?, rank, scale, u })
}

/// A projection's LoRA in backward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoraBackward<'a> {
    pub(crate) lora: Lora<'a>,
    /// Where its gradients accumulate.
    pub(crate) gradient: &'a LoraPair,
    /// What forward returned.
    pub(crate) u: &'a Tensor,
}

/// One of the projections of an input, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProjectionBackward<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) lora: Option<LoraBackward<'a>>,
    pub(crate) dy: &'a Tensor,
}

/// Accumulates the gradients of the LoRAs of x's projections; where `dx` is given, sets it to Σ dy W + du A.
pub(crate) fn backward(
    x: &Tensor,
    projections: &[ProjectionBackward<'_>],
    dx: Option<&Tensor>,
    scratch: &mut Scratch,
    compute: Compute,
) -> Result<()> {
    let (tokens, columns) = x.dims2()?;
    for (index, &ProjectionBackward { weight, lora, dy }) in projections.iter().enumerate() {
        if lora.is_none() && dx.is_none() {
            continue;
        }
        let dy_values = host(dy)?;
        let left = Left::of(Matrix::rows(&dy_values, tokens, weight.rows(), weight.rows()), compute);
        let lora = lora.map(|lora| backward_lora(x, dy, &left, lora)).transpose()?;
        let Some(dx) = dx else { continue };
        let strips = weight.has_strips(PANEL_COLUMNS);
        let weight_values = if strips { &[] } else { scratch.dequantize(weight)? };
        let mut lefts = vec![&left];
        // Where a part of the LoRA's share is dropped, it cannot ride in the same product.
        let (folded, apart) = lora.as_ref().map_or((None, None), |lora| match lora.dropout {
            None => (Some(lora), None),
            Some(dropout) => (None, Some((lora, dropout))),
        });
        let left_of_lora = folded.map(|lora| lora.left(tokens, compute));
        lefts.extend(&left_of_lora);
        host_mut(dx, |values| {
            let out = Output { values, columns, alpha: 1.0, keep: index > 0 };
            product(&lefts, out, &|range, panel| {
                if strips {
                    panel.push_columns_with(weight.rows(), |values| {
                        weight.dequantize_part(0..weight.rows(), range.clone(), values)
                    })?;
                } else {
                    panel.push_columns(weight_values, columns, weight.rows(), range.start);
                }
                if let Some(BackwardLora { lora_a, rank, .. }) = folded {
                    panel.push_columns(lora_a, columns, *rank, range.start);
                }
                Ok(())
            })
        })?;
        if let Some((lora, dropout)) = apart {
            add(dx, &lora.dropped_share(tokens, columns, dropout, compute)?)?;
        }
    }
    Ok(())
}

/// What the gradient of a projection's input takes from its LoRA.
struct BackwardLora<'a> {
    lora_a: crate::ops::Host<'a>,
    rank: usize,
    du: Vec<f32>,
    dropout: Option<Dropout>,
}

impl BackwardLora<'_> {
    /// du as the left operand of a product.
    fn left(&self, tokens: usize, compute: Compute) -> Left<'_> {
        Left::of(Matrix::rows(&self.du, tokens, self.rank, self.rank), compute)
    }

    /// D(du A), (T, in).
    fn dropped_share(&self, tokens: usize, columns: usize, dropout: Dropout, compute: Compute) -> Result<Tensor> {
        let mut share = vec![0f32; tokens * columns];
        let out = Output { values: &mut share, columns, alpha: 1.0, keep: false };
        product(&[&self.left(tokens, compute)], out, &|range, panel| {
            panel.push_columns(&self.lora_a, columns, self.rank, range.start);
            Ok(())
        })?;
        dropout::apply_in_place(&mut share, 0, columns, &dropout);
        tensor(share, (tokens, columns))
    }
}

/// Accumulates the LoRA's gradients, sums over tokens in f32 whatever `compute` is.
fn backward_lora<'a>(
    x: &Tensor,
    dy: &Tensor,
    dy_left: &Left<'_>,
    LoraBackward { lora: Lora { pair, scale, dropout }, gradient, u }: LoraBackward<'a>,
) -> Result<BackwardLora<'a>> {
    let ((tokens, columns), (rows, rank)) = (x.dims2()?, pair.lora_b.dims2()?);
    let mut du = vec![0f32; tokens * rank];
    let lora_b = host(&pair.lora_b)?;
    let out = Output { values: &mut du, columns: rank, alpha: scale, keep: false };
    product(&[dy_left], out, &|range, panel| {
        panel.push_columns(&lora_b, rank, rows, range.start);
        Ok(())
    })?;
    let x = dropped(x, dropout)?;
    let (x, dy, u) = (host(&x)?, host(dy)?, host(u)?);
    let u = Matrix::rows(&u, tokens, rank, rank);
    host_mut(&gradient.lora_b, |db| {
        add_transposed(db, Matrix::rows(&dy, tokens, rows, rows), u, scale);
        Ok(())
    })?;
    host_mut(&gradient.lora_a, |da| {
        let du = Matrix::rows(&du, tokens, rank, rank);
        add_transposed(da, du, Matrix::rows(&x, tokens, columns, columns), 1.0);
        Ok(())
    })?;
    Ok(BackwardLora { lora_a: host(&pair.lora_a)?, rank, du, dropout })
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
        let (pair, mut scratch) = (LoraPair { lora_a, lora_b }, Scratch::new(rows * columns));
        let lora = Lora { pair: &pair, scale, dropout };
        let y = f32(&randn(&[tokens, rows]));
        let projection = Projection { weight: &stored, lora: Some(lora) };
        let [u] = forward(&x, [(projection, &y)], false, Compute::F32).unwrap();
        let u = u.expect("a LoRA");
        assert_close("y", &y, &naive(&inputs), 1e-5);
        forward(&x, [(projection, &y)], true, Compute::F32).unwrap();
        assert_close("y added to itself", &y, &(naive(&inputs) * 2.0).unwrap(), 1e-5);

        // Gradients of parameters add to what is there; that of the input is the sum over the projections.
        let gradient = LoraPair { lora_a: f32(&inputs[1]), lora_b: f32(&inputs[2]) };
        let (dx, dy) = (f32(&begun), f32(&dy));
        let lora = LoraBackward { lora, gradient: &gradient, u: &u };
        let with_lora = ProjectionBackward { weight: &stored, lora: Some(lora), dy: &dy };
        let frozen = ProjectionBackward { lora: None, ..with_lora };
        backward(&x, &[with_lora, frozen], Some(&dx), &mut scratch, Compute::F32).unwrap();
        let through_frozen = dy.to_dtype(DType::F64).unwrap().matmul(&weight).unwrap();
        assert_close("dx", &dx, &(through_frozen + &expected[0]).unwrap(), 1e-4);
        assert_close("dA", &gradient.lora_a, &(&inputs[1] + &expected[1]).unwrap(), 1e-4);
        assert_close("dB", &gradient.lora_b, &(&inputs[2] + &expected[2]).unwrap(), 1e-4);
    }
}
