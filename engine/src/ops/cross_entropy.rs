//! The output projection and cross-entropy together, in chunks of tokens: the full (T, V) logits never exist.
//!
//! For a token with label y: logits z = W h, loss = log Σ exp(z) − z_y, dz = scale · (softmax(z) − onehot(y)), dh = Wᵀ dz.
//! `scale` is 1 ÷ trained tokens of the whole accumulated batch. Only tokens with a label are computed; dh of the others is 0.
//! Shapes: h, dh (T, C); W (V, C) in stored blocks, dequantized in bands of rows; logits of one chunk (tokens, V).
//! Storage f32; sums over the vocabulary accumulate in f64.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::model::weights::Weight;
use crate::ops::matmul::{Compute, Left, Matrix, Output, PANEL_COLUMNS, product};
use crate::ops::{bail, exp, host, tensor};

/// Label of a token without a loss.
pub const IGNORE: i32 = -100;
/// Bytes that the logits of one chunk may take.
pub(crate) const LOGITS_BYTES: usize = 100 << 20;
/// Probabilities that are summed in f32 before f64 takes over.
const SUMMED_IN_F32: usize = 1024;
/// Bytes that one dequantized band of the projection may take.
pub(crate) const BAND_BYTES: usize = 8 << 20;

/// What the loss of some tokens came to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Loss {
    /// Sum of the tokens' losses, not yet divided.
    pub sum: f64,
    /// Tokens that had a label.
    pub tokens: usize,
    /// Tokens whose largest logit was their label's.
    pub correct: usize,
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Self) {
        self.sum += other.sum;
        self.tokens += other.tokens;
        self.correct += other.correct;
    }
}

/// The loss and dh; `labels` are one a token, [`IGNORE`] for none.
///
/// # Errors
/// Shapes that do not fit.
pub fn forward_backward(
    h: &Tensor,
    weight: &Weight,
    labels: &[i32],
    scale: f32,
    compute: Compute,
) -> Result<(Loss, Tensor)> {
    let (loss, dh) = in_chunks(h, weight, labels, (Some(scale), compute), Sizes::of(weight))?;
    Ok((loss, tensor(dh, h.dims2()?)?))
}

/// The loss alone; labels as in [`forward_backward`].
///
/// # Errors
/// Shapes that do not fit.
pub fn forward(h: &Tensor, weight: &Weight, labels: &[i32], compute: Compute) -> Result<Loss> {
    Ok(in_chunks(h, weight, labels, (None, compute), Sizes::of(weight))?.0)
}

/// How much is computed at once.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    chunk_tokens: usize,
    band_rows: usize,
}

impl Sizes {
    fn of(weight: &Weight) -> Self {
        Self {
            chunk_tokens: (LOGITS_BYTES / 4 / weight.rows().max(1)).max(1),
            band_rows: (BAND_BYTES / 4 / weight.columns().max(1)).clamp(1, weight.rows().max(1)),
        }
    }
}

/// The loss and, where there is a `scale` for it, dh.
fn in_chunks(
    h: &Tensor,
    weight: &Weight,
    labels: &[i32],
    (scale, compute): (Option<f32>, Compute),
    sizes: Sizes,
) -> Result<(Loss, Vec<f32>)> {
    let (tokens, columns) = h.dims2()?;
    if labels.len() != tokens || weight.columns() != columns {
        bail!("cross_entropy: {tokens} tokens, {} labels, weight {:?}", labels.len(), weight.columns());
    }
    let h = host(h)?;
    let trained: Vec<usize> = (0..tokens).filter(|&token| labels[token] != IGNORE).collect();
    let mut dh = vec![0f32; if scale.is_some() { tokens * columns } else { 0 }];
    let mut total = Loss::default();
    let chunk_tokens = sizes.chunk_tokens.min(trained.len().max(1));
    let mut buffers = Buffers::new(weight, chunk_tokens, sizes.band_rows, compute);
    for chunk in trained.chunks(chunk_tokens) {
        let rows = gather(&h, chunk, columns);
        let logits = buffers.project(&rows, chunk.len())?;
        let losses: Vec<Loss> = logits
            .par_chunks_mut(weight.rows())
            .zip(chunk)
            .map(|(logits, &token)| token_loss(logits, labels[token], scale.unwrap_or(0.0)))
            .collect();
        losses.into_iter().for_each(|loss| total += loss);
        if scale.is_none() {
            continue;
        }
        let drows = buffers.project_back(chunk.len())?;
        for (drow, &token) in drows.chunks_exact(columns).zip(chunk) {
            dh[token * columns..(token + 1) * columns].copy_from_slice(drow);
        }
    }
    Ok((total, dh))
}

/// Logits of every row of h, in f32.
///
/// # Errors
/// Shapes that do not fit.
pub fn logits(h: &Tensor, weight: &Weight, compute: Compute) -> Result<Tensor> {
    let (tokens, columns) = h.dims2()?;
    if weight.columns() != columns {
        bail!("logits: hidden size {columns}, weight {:?}", weight.columns());
    }
    let mut buffers = Buffers::new(weight, tokens, 0, compute);
    buffers.project(&host(h)?, tokens)?;
    tensor(buffers.logits, (tokens, weight.rows()))
}

/// The loss of one token; its logits become dz.
pub(super) fn token_loss(logits: &mut [f32], label: i32, scale: f32) -> Loss {
    let label = label as usize;
    let (max, target) = (exp::max(logits), logits[label]);
    let sum: f64 = logits.chunks_mut(SUMMED_IN_F32).map(|part| f64::from(exp::exp_shifted(part, max))).sum();
    let factor = scale / sum as f32;
    logits.iter_mut().for_each(|p| *p *= factor);
    logits[label] -= scale;
    Loss { sum: sum.ln() + f64::from(max) - f64::from(target), tokens: 1, correct: usize::from(target >= max) }
}

fn gather(h: &[f32], tokens: &[usize], columns: usize) -> Vec<f32> {
    tokens.iter().flat_map(|&token| &h[token * columns..(token + 1) * columns]).copied().collect()
}

/// Reused over the chunks of one call.
struct Buffers<'a> {
    weight: &'a Weight,
    compute: Compute,
    /// Dequantized rows of the projection.
    band: Vec<f32>,
    /// (tokens, V): logits, then their gradient.
    logits: Vec<f32>,
    /// (tokens, C).
    drows: Vec<f32>,
}

impl<'a> Buffers<'a> {
    fn new(weight: &'a Weight, tokens: usize, band_rows: usize, compute: Compute) -> Self {
        Self {
            weight,
            compute,
            band: vec![0f32; band_rows * weight.columns()],
            logits: vec![0f32; tokens * weight.rows()],
            drows: vec![0f32; tokens * weight.columns()],
        }
    }

    /// Logits of `tokens` rows of h.
    fn project(&mut self, h: &[f32], tokens: usize) -> Result<&mut [f32]> {
        let (weight, columns, vocabulary) = (self.weight, self.weight.columns(), self.weight.rows());
        let logits = &mut self.logits[..tokens * vocabulary];
        let h = Left::of(Matrix::rows(h, tokens, columns, columns), self.compute);
        let out = Output { values: logits, columns: vocabulary, alpha: 1.0, keep: false };
        product(&[&h], out, &|rows, panel| {
            panel.push_rows_with(columns, |values| weight.dequantize_part(rows, 0..columns, values))
        })?;
        Ok(logits)
    }

    /// dh of `tokens` rows from the gradient that stands in the logits, band of the vocabulary by band.
    fn project_back(&mut self, tokens: usize) -> Result<&[f32]> {
        let (columns, vocabulary) = (self.weight.columns(), self.weight.rows());
        let drows = &mut self.drows[..tokens * columns];
        let (band_rows, weight) = (self.band.len() / columns, self.weight);
        let strips = weight.has_strips(PANEL_COLUMNS);
        for first in (0..vocabulary).step_by(band_rows) {
            let rows = band_rows.min(vocabulary - first);
            let band = &mut self.band[..rows * columns];
            if !strips {
                self.weight.dequantize_rows(first..first + rows, band)?;
            }
            let dz = Matrix::rows(&self.logits[first..], tokens, rows, vocabulary);
            let dz = Left::of(dz, self.compute);
            let out = Output { values: drows, columns, alpha: 1.0, keep: first > 0 };
            product(&[&dz], out, &|range, panel| {
                if strips {
                    let rows_of_band = first..first + rows;
                    return panel.push_columns_with(rows, |values| {
                        weight.dequantize_part(rows_of_band.clone(), range.clone(), values)
                    });
                }
                panel.push_columns(band, columns, rows, range.start);
                Ok(())
            })?;
        }
        Ok(drows)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device};

    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};
    use crate::quant::{BlockType, quantize};

    /// Σ of the losses of the tokens with a label.
    fn naive(h: &Tensor, weight: &Tensor, labels: &[i32]) -> Tensor {
        let logits = h.matmul(&weight.t().unwrap()).unwrap();
        let max = logits.max_keepdim(D::Minus1).unwrap().detach();
        let sum = logits.broadcast_sub(&max).unwrap().exp().unwrap().sum_keepdim(D::Minus1).unwrap();
        let log_sum = (sum.log().unwrap() + max).unwrap();
        let loss = |(token, &label): (usize, &i32)| {
            let row = |x: &Tensor, column: usize| x.get(token).unwrap().get(column).unwrap();
            (label != IGNORE).then(|| (row(&log_sum, 0) - row(&logits, label as usize)).unwrap())
        };
        let losses: Vec<Tensor> = labels.iter().enumerate().filter_map(loss).collect();
        Tensor::stack(&losses, 0).unwrap().sum_all().unwrap()
    }

    #[test]
    fn backward_is_the_gradient_of_forward_in_any_chunks_and_bands() {
        let (tokens, vocabulary, columns) = (7, 10, 8);
        let (h, weight) = (randn(&[tokens, columns]), randn(&[vocabulary, columns]));
        let values: Vec<f32> = f32(&weight).flatten_all().unwrap().to_vec1().unwrap();
        let stored = quantize(BlockType::F32, columns, &values).unwrap();
        let stored = Weight::from_bytes(&stored, BlockType::F32, (vocabulary, columns)).unwrap();
        let weight = f32(&weight).to_dtype(DType::F64).unwrap();
        // Labels at both edges of bands, none at both ends of the tokens.
        let labels = [IGNORE, 0, 3, 4, 9, IGNORE, 7];
        let scale = Tensor::new(0.25f64, &Device::Cpu).unwrap();
        let inputs = std::slice::from_ref(&h);
        let expected = reference(inputs, &scale, |inputs| naive(&inputs[0], &weight, &labels));
        let total = naive(&h, &weight, &labels).to_scalar::<f64>().unwrap();
        for (chunk_tokens, band_rows) in [(100, 10), (2, 4), (1, 1), (3, 7)] {
            let sizes = Sizes { chunk_tokens, band_rows };
            let (loss, dh) = in_chunks(&f32(&h), &stored, &labels, (Some(0.25), Compute::F32), sizes).unwrap();
            let dh = tensor(dh, (tokens, columns)).unwrap();
            assert_eq!(in_chunks(&f32(&h), &stored, &labels, (None, Compute::F32), sizes).unwrap(), (loss, Vec::new()));
            assert!((loss.sum - total).abs() < 1e-5 * total, "{loss:?} not {total}");
            assert_eq!(loss.tokens, 5);
            assert_close("dh", &dh, &expected[0], 1e-4);
            let dh: Vec<Vec<f32>> = dh.to_vec2().unwrap();
            assert!(dh[0].iter().chain(&dh[5]).all(|&d| d == 0.0), "a token without a label has no gradient");
        }
        let logits = logits(&f32(&h), &stored, Compute::F32).unwrap();
        assert_close("logits", &logits, &h.matmul(&weight.t().unwrap()).unwrap(), 1e-5);
    }

    #[test]
    fn no_label_at_all_is_no_loss_and_no_gradient() {
        let stored = Weight::from_bytes(&[0; 4 * 12], BlockType::F32, (3, 4)).unwrap();
        let (loss, dh) = forward_backward(&f32(&randn(&[2, 4])), &stored, &[IGNORE; 2], 1.0, Compute::F32).unwrap();
        assert_eq!(loss, Loss::default());
        assert_eq!(dh.to_vec2::<f32>().unwrap(), [[0.0; 4]; 2]);
        assert!(forward_backward(&f32(&randn(&[2, 4])), &stored, &[IGNORE; 3], 1.0, Compute::F32).is_err());
        assert!(logits(&f32(&randn(&[2, 5])), &stored, Compute::F32).is_err());
    }

    #[test]
    fn accuracy_counts_tokens_whose_largest_logit_is_their_label() {
        let identity: Vec<u8> = (0..9).flat_map(|i| f32::from(u8::from(i % 4 == 0)).to_le_bytes()).collect();
        let stored = Weight::from_bytes(&identity, BlockType::F32, (3, 3)).unwrap();
        let h = Tensor::new(&[[5f32, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0]], &Device::Cpu).unwrap();
        let (loss, _) = forward_backward(&h, &stored, &[0, 2, 2], 1.0, Compute::F32).unwrap();
        assert_eq!((loss.tokens, loss.correct), (3, 2));
    }
}
