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
use crate::ops::matmul::{Matrix, gemm_values};
use crate::ops::{bail, host, tensor};

/// Label of a token without a loss.
pub const IGNORE: i32 = -100;
/// Bytes that the logits of one chunk may take.
const LOGITS_BYTES: usize = 64 << 20;
/// Bytes that one dequantized band of the projection may take.
const BAND_BYTES: usize = 8 << 20;

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
pub fn forward_backward(h: &Tensor, weight: &Weight, labels: &[i32], scale: f32) -> Result<(Loss, Tensor)> {
    let (tokens, columns) = h.dims2()?;
    if labels.len() != tokens || weight.columns() != columns {
        bail!("cross_entropy: {tokens} tokens, {} labels, weight {:?}", labels.len(), weight.columns());
    }
    let h = host(h)?;
    let trained: Vec<usize> = (0..tokens).filter(|&token| labels[token] != IGNORE).collect();
    let mut dh = vec![0f32; tokens * columns];
    let mut total = Loss::default();
    let chunk_tokens = (LOGITS_BYTES / 4 / weight.rows().max(1)).max(1).min(trained.len().max(1));
    let mut buffers = Buffers::new(weight, chunk_tokens);
    for chunk in trained.chunks(chunk_tokens) {
        let rows = gather(&h, chunk, columns);
        let logits = buffers.project(&rows, chunk.len())?;
        let losses: Vec<Loss> = logits
            .par_chunks_mut(weight.rows())
            .zip(chunk)
            .map(|(logits, &token)| token_loss(logits, labels[token], scale))
            .collect();
        losses.into_iter().for_each(|loss| total += loss);
        let drows = buffers.project_back(chunk.len())?;
        for (drow, &token) in drows.chunks_exact(columns).zip(chunk) {
            dh[token * columns..(token + 1) * columns].copy_from_slice(drow);
        }
    }
    Ok((total, tensor(dh, (tokens, columns))?))
}

/// Logits of every row of h, in f32.
///
/// # Errors
/// Shapes that do not fit.
pub fn logits(h: &Tensor, weight: &Weight) -> Result<Tensor> {
    let (tokens, columns) = h.dims2()?;
    if weight.columns() != columns {
        bail!("logits: hidden size {columns}, weight {:?}", weight.columns());
    }
    let mut buffers = Buffers::new(weight, tokens);
    buffers.project(&host(h)?, tokens)?;
    tensor(buffers.logits, (tokens, weight.rows()))
}

/// The loss of one token; its logits become dz.
fn token_loss(logits: &mut [f32], label: i32, scale: f32) -> Loss {
    let label = label as usize;
    let (mut best, mut max) = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if logit > max {
            (best, max) = (index, logit);
        }
    }
    let target = logits[label];
    let mut sum = 0f64;
    for chunk in logits.chunks_mut(1024) {
        let mut lanes = [0f32; 16];
        for eight in chunk.chunks_mut(16) {
            for (lane, logit) in lanes.iter_mut().zip(eight) {
                *logit = (*logit - max).exp();
                *lane += *logit;
            }
        }
        sum += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    let factor = scale / sum as f32;
    logits.iter_mut().for_each(|p| *p *= factor);
    logits[label] -= scale;
    Loss { sum: sum.ln() + f64::from(max) - f64::from(target), tokens: 1, correct: usize::from(best == label) }
}

fn gather(h: &[f32], tokens: &[usize], columns: usize) -> Vec<f32> {
    tokens.iter().flat_map(|&token| &h[token * columns..(token + 1) * columns]).copied().collect()
}

/// Reused over the chunks of one call.
struct Buffers<'a> {
    weight: &'a Weight,
    /// Dequantized rows of the projection.
    band: Vec<f32>,
    /// (tokens, V): logits, then their gradient.
    logits: Vec<f32>,
    /// (tokens, C).
    drows: Vec<f32>,
}

impl<'a> Buffers<'a> {
    fn new(weight: &'a Weight, tokens: usize) -> Self {
        let band_rows = (BAND_BYTES / 4 / weight.columns().max(1)).clamp(1, weight.rows().max(1));
        Self {
            weight,
            band: vec![0f32; band_rows * weight.columns()],
            logits: vec![0f32; tokens * weight.rows()],
            drows: vec![0f32; tokens * weight.columns()],
        }
    }

    /// Calls `use_band` with every band of rows: first row, number of rows, values.
    fn bands(weight: &Weight, band: &mut [f32], mut use_band: impl FnMut(usize, usize, &[f32])) -> Result<()> {
        let band_rows = band.len() / weight.columns();
        for first in (0..weight.rows()).step_by(band_rows) {
            let rows = band_rows.min(weight.rows() - first);
            let values = &mut band[..rows * weight.columns()];
            weight.dequantize_rows(first..first + rows, values)?;
            use_band(first, rows, values);
        }
        Ok(())
    }

    /// Logits of `tokens` rows of h.
    fn project(&mut self, h: &[f32], tokens: usize) -> Result<&mut [f32]> {
        let (columns, vocabulary) = (self.weight.columns(), self.weight.rows());
        let logits = &mut self.logits[..tokens * vocabulary];
        let h = Matrix::rows(h, tokens, columns, columns);
        Self::bands(self.weight, &mut self.band, |first, rows, values| {
            let band = Matrix::rows(values, rows, columns, columns);
            gemm_values(&mut logits[first..], (vocabulary, 1), (1.0, h, band.t(), 0.0), true);
        })?;
        Ok(logits)
    }

    /// dh of `tokens` rows from the gradient that stands in the logits.
    fn project_back(&mut self, tokens: usize) -> Result<&[f32]> {
        let (columns, vocabulary) = (self.weight.columns(), self.weight.rows());
        let drows = &mut self.drows[..tokens * columns];
        let logits = &self.logits;
        Self::bands(self.weight, &mut self.band, |first, rows, values| {
            let dz = Matrix::rows(&logits[first..], tokens, rows, vocabulary);
            let band = Matrix::rows(values, rows, columns, columns);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            gemm_values(drows, (columns, 1), (1.0, dz, band, beta), true);
        })?;
        Ok(drows)
    }
}
