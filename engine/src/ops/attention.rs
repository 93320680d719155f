//! Causal attention over packed sequences: o = softmax(scale · q kᵀ, masked) v, never a (T, T) matrix.
//!
//! With s = scale · q kᵀ, lse_i = log Σ_j exp(s_ij) over the keys j that query i may see, and p = exp(s − lse):
//! o = p v. Backward: dv = pᵀ do, dp = do vᵀ, ds = p ∘ (dp − δ) with δ_i = Σ_d do_id · o_id, dq = scale · ds k,
//! dk = scale · dsᵀ q. p is computed again from lse, so forward saves only o and lse.
//!
//! Shapes: q, o, dq (T, H, D); k, v, dk, dv (T, KV, D), KV dividing H; lse (T, H). A query sees the keys of its own sequence
//! (`cu_seqlens`, starts of the sequences and the end of the last) up to its own position. Storage and accumulation f32.
//! One task is one sequence and one kv head: it alone writes that head's dk and dv, so sums have one order.
//! Source: Dao, "FlashAttention-2", 2023 (the recomputation from lse; blocks here are whole key rows).

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::matmul::{Matrix, gemm_values};
use crate::ops::{bail, exp, host, tensor, zeros};

/// Queries computed at once: their scores against all their keys are the largest buffer.
const QUERIES: usize = 64;

/// Sizes that every function here needs.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
}

impl Sizes {
    fn of(q: &Tensor, k: &Tensor) -> Result<Self> {
        let ((_, heads, head_dim), (_, kv_heads, kv_head_dim)) = (q.dims3()?, k.dims3()?);
        if head_dim != kv_head_dim || kv_heads == 0 || heads % kv_heads != 0 {
            bail!("attention: {heads} heads of {head_dim} do not fit {kv_heads} kv heads of {kv_head_dim}");
        }
        Ok(Self { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() })
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Rows `first..first + count` of one head in a (T, heads, D) tensor.
    fn head<'a>(&self, x: &'a [f32], heads: usize, head: usize, first: usize, count: usize) -> Matrix<'a> {
        let stride = heads * self.head_dim;
        let start = if count == 0 { 0 } else { first * stride + head * self.head_dim };
        Matrix::rows(&x[start..], count, self.head_dim, stride)
    }
}

/// o and lse.
///
/// # Errors
/// Shapes that do not fit, or `cu_seqlens` that does not cover the tokens.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, cu_seqlens: &[usize]) -> Result<(Tensor, Tensor)> {
    let sizes = Sizes::of(q, k)?;
    let tokens = q.dim(0)?;
    check_sequences(cu_seqlens, tokens)?;
    let (q, k, v) = (&*host(q)?, &*host(k)?, &*host(v)?);
    let parts: Vec<(Vec<f32>, Vec<f32>)> = tasks(cu_seqlens, sizes.kv_heads)
        .into_par_iter()
        .map(|(start, end, kv_head)| {
            let length = end - start;
            let mut o = vec![0f32; length * sizes.group() * sizes.head_dim];
            let mut lse = vec![0f32; length * sizes.group()];
            for in_group in 0..sizes.group() {
                let head = kv_head * sizes.group() + in_group;
                let rows = HeadRows { q_first: start, q_count: length, k_first: start, k_count: length, head, kv_head };
                head_forward(sizes, (q, k, v), rows, in_group, &mut o, &mut lse);
            }
            (o, lse)
        })
        .collect();
    let mut o = zeros(tokens * sizes.heads * sizes.head_dim);
    let mut lse = vec![0f32; tokens * sizes.heads];
    for ((start, _, kv_head), (part_o, part_lse)) in tasks(cu_seqlens, sizes.kv_heads).into_iter().zip(parts) {
        let width = sizes.group() * sizes.head_dim;
        scatter(&mut o, sizes.heads * sizes.head_dim, start, kv_head * width, &part_o, width);
        scatter(&mut lse, sizes.heads, start, kv_head * sizes.group(), &part_lse, sizes.group());
    }
    Ok((tensor(o, (tokens, sizes.heads, sizes.head_dim))?, tensor(lse, (tokens, sizes.heads))?))
}

/// o for new queries that follow keys and values already in a cache: query i of n sees the first `k.dim(0) − n + i + 1` keys.
///
/// # Errors
/// Shapes that do not fit, or more queries than keys.
pub fn forward_cached(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let sizes = Sizes::of(q, k)?;
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    if queries > keys {
        bail!("attention: {queries} queries but {keys} keys");
    }
    let (q, k, v) = (&*host(q)?, &*host(k)?, &*host(v)?);
    let width = sizes.group() * sizes.head_dim;
    let parts: Vec<Vec<f32>> = (0..sizes.kv_heads)
        .into_par_iter()
        .map(|kv_head| {
            let (mut o, mut lse) = (vec![0f32; queries * width], vec![0f32; queries * sizes.group()]);
            for in_group in 0..sizes.group() {
                let head = kv_head * sizes.group() + in_group;
                let rows = HeadRows { q_first: 0, q_count: queries, k_first: 0, k_count: keys, head, kv_head };
                head_forward(sizes, (q, k, v), rows, in_group, &mut o, &mut lse);
            }
            o
        })
        .collect();
    let mut o = vec![0f32; queries * sizes.heads * sizes.head_dim];
    for (kv_head, part) in parts.iter().enumerate() {
        scatter(&mut o, sizes.heads * sizes.head_dim, 0, kv_head * width, part, width);
    }
    tensor(o, (queries, sizes.heads, sizes.head_dim))
}

/// The rows of one head that one task works on; the last query sees the last key.
#[derive(Clone, Copy)]
struct HeadRows {
    q_first: usize,
    q_count: usize,
    k_first: usize,
    k_count: usize,
    head: usize,
    kv_head: usize,
}

/// One head's o and lse into the task's buffers of (rows, group, D) and (rows, group).
fn head_forward(
    sizes: Sizes,
    (q, k, v): (&[f32], &[f32], &[f32]),
    rows: HeadRows,
    in_group: usize,
    o: &mut [f32],
    lse: &mut [f32],
) {
    let (group, head_dim) = (sizes.group(), sizes.head_dim);
    let before = rows.k_count - rows.q_count;
    let mut scores = vec![0f32; QUERIES.min(rows.q_count) * rows.k_count];
    for first in (0..rows.q_count).step_by(QUERIES) {
        let count = QUERIES.min(rows.q_count - first);
        let keys = before + first + count;
        let p = &mut scores[..count * keys];
        let queries = sizes.head(q, sizes.heads, rows.head, rows.q_first + first, count);
        let key_rows = sizes.head(k, sizes.kv_heads, rows.kv_head, rows.k_first, keys);
        gemm_values(p, (keys, 1), (sizes.scale, queries, key_rows.t(), 0.0), false);
        for (row, p) in p.chunks_exact_mut(keys).enumerate() {
            lse[(first + row) * group + in_group] = softmax(p, before + first + row + 1);
        }
        let value_rows = sizes.head(v, sizes.kv_heads, rows.kv_head, rows.k_first, keys);
        let out = &mut o[(first * group + in_group) * head_dim..];
        gemm_values(out, (group * head_dim, 1), (1.0, Matrix::rows(p, count, keys, keys), value_rows, 0.0), false);
    }
}

/// Softmax over the first `visible` scores, 0 for the rest; returns the log of the sum of exponentials.
fn softmax(scores: &mut [f32], visible: usize) -> f32 {
    let (seen, hidden) = scores.split_at_mut(visible);
    hidden.fill(0.0);
    let max = exp::max(seen);
    let sum = exp::exp_shifted(seen, max);
    let inverse = 1.0 / sum;
    seen.iter_mut().for_each(|p| *p *= inverse);
    max + sum.ln()
}

/// What forward was given and gave, as backward needs it.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// Queries after RoPE.
    pub q: &'a Tensor,
    /// Keys after RoPE.
    pub k: &'a Tensor,
    /// Values.
    pub v: &'a Tensor,
    /// The output.
    pub o: &'a Tensor,
    /// Its log-sum-exp.
    pub lse: &'a Tensor,
}

/// dq, dk and dv from do.
///
/// # Errors
/// Shapes that do not fit, or `cu_seqlens` that does not cover the tokens.
pub fn backward(dout: &Tensor, saved: Saved<'_>, cu_seqlens: &[usize]) -> Result<(Tensor, Tensor, Tensor)> {
    let sizes = Sizes::of(saved.q, saved.k)?;
    let tokens = saved.q.dim(0)?;
    check_sequences(cu_seqlens, tokens)?;
    let (q, k, v) = (host(saved.q)?, host(saved.k)?, host(saved.v)?);
    let (o, lse, dout) = (host(saved.o)?, host(saved.lse)?, host(dout)?);
    let values = BackwardValues { q: &q, k: &k, v: &v, o: &o, lse: &lse, dout: &dout };
    let parts: Vec<[Vec<f32>; 3]> = tasks(cu_seqlens, sizes.kv_heads)
        .into_par_iter()
        .map(|(start, end, kv_head)| task_backward(sizes, &values, start, end - start, kv_head))
        .collect();
    let (heads, kv_heads, head_dim) = (sizes.heads, sizes.kv_heads, sizes.head_dim);
    let mut dq = zeros(tokens * heads * head_dim);
    let (mut dk, mut dv) = (vec![0f32; tokens * kv_heads * head_dim], vec![0f32; tokens * kv_heads * head_dim]);
    for ((start, _, kv_head), [part_dq, part_dk, part_dv]) in tasks(cu_seqlens, kv_heads).into_iter().zip(parts) {
        let width = sizes.group() * head_dim;
        scatter(&mut dq, heads * head_dim, start, kv_head * width, &part_dq, width);
        scatter(&mut dk, kv_heads * head_dim, start, kv_head * head_dim, &part_dk, head_dim);
        scatter(&mut dv, kv_heads * head_dim, start, kv_head * head_dim, &part_dv, head_dim);
    }
    let kv_shape = (tokens, kv_heads, head_dim);
    Ok((tensor(dq, (tokens, heads, head_dim))?, tensor(dk, kv_shape)?, tensor(dv, kv_shape)?))
}

struct BackwardValues<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
}

/// dq of the group's heads and dk, dv of the kv head, for one sequence.
fn task_backward(
    sizes: Sizes,
    values: &BackwardValues<'_>,
    start: usize,
    length: usize,
    kv_head: usize,
) -> [Vec<f32>; 3] {
    let (group, head_dim) = (sizes.group(), sizes.head_dim);
    let mut dq = vec![0f32; length * group * head_dim];
    let (mut dk, mut dv) = (vec![0f32; length * head_dim], vec![0f32; length * head_dim]);
    let mut p_buffer = vec![0f32; QUERIES.min(length) * length];
    let mut ds_buffer = p_buffer.clone();
    for in_group in 0..group {
        let head = kv_head * group + in_group;
        for first in (0..length).step_by(QUERIES) {
            let count = QUERIES.min(length - first);
            let keys = first + count;
            let (p, ds) = (&mut p_buffer[..count * keys], &mut ds_buffer[..count * keys]);
            let q = sizes.head(values.q, sizes.heads, head, start + first, count);
            let dout = sizes.head(values.dout, sizes.heads, head, start + first, count);
            let o = sizes.head(values.o, sizes.heads, head, start + first, count);
            let k = sizes.head(values.k, sizes.kv_heads, kv_head, start, keys);
            let v = sizes.head(values.v, sizes.kv_heads, kv_head, start, keys);
            gemm_values(p, (keys, 1), (sizes.scale, q, k.t(), 0.0), false);
            gemm_values(ds, (keys, 1), (1.0, dout, v.t(), 0.0), false);
            for row in 0..count {
                let lse = values.lse[(start + first + row) * sizes.heads + head];
                let at = row * dout.strides.0..row * dout.strides.0 + head_dim;
                let delta = dout.values[at.clone()].iter().zip(&o.values[at]).map(|(a, b)| a * b).sum::<f32>();
                let place = row * keys..(row + 1) * keys;
                score_gradient(&mut p[place.clone()], &mut ds[place], first + row + 1, lse, delta);
            }
            let (p, ds) = (Matrix::rows(p, count, keys, keys), Matrix::rows(ds, count, keys, keys));
            let dq_rows = &mut dq[(first * group + in_group) * head_dim..];
            gemm_values(dq_rows, (group * head_dim, 1), (sizes.scale, ds, k, 0.0), false);
            gemm_values(&mut dk[..keys * head_dim], (head_dim, 1), (sizes.scale, ds.t(), q, 1.0), false);
            gemm_values(&mut dv[..keys * head_dim], (head_dim, 1), (1.0, p.t(), dout, 1.0), false);
        }
    }
    [dq, dk, dv]
}

/// Turns a row of scores into p, and the same row of dp into ds.
fn score_gradient(scores: &mut [f32], dp: &mut [f32], visible: usize, lse: f32, delta: f32) {
    exp::exp_shifted(&mut scores[..visible], lse);
    for (p, ds) in scores[..visible].iter().zip(&mut dp[..visible]) {
        *ds = p * (*ds - delta);
    }
    scores[visible..].fill(0.0);
    dp[visible..].fill(0.0);
}

/// (start, end, kv head) of every task.
fn tasks(cu_seqlens: &[usize], kv_heads: usize) -> Vec<(usize, usize, usize)> {
    let sequences = cu_seqlens.windows(2).filter(|ends| ends[0] < ends[1]);
    sequences.flat_map(|ends| (0..kv_heads).map(move |kv_head| (ends[0], ends[1], kv_head))).collect()
}

/// Copies rows of `width` into the columns from `column` on of rows of `stride`.
fn scatter(out: &mut [f32], stride: usize, first_row: usize, column: usize, part: &[f32], width: usize) {
    for (row, part) in part.chunks_exact(width).enumerate() {
        let at = (first_row + row) * stride + column;
        out[at..at + width].copy_from_slice(part);
    }
}

pub(super) fn check_sequences(cu_seqlens: &[usize], tokens: usize) -> Result<()> {
    let covers = cu_seqlens.first() == Some(&0) && cu_seqlens.last() == Some(&tokens);
    if !covers || cu_seqlens.windows(2).any(|ends| ends[0] > ends[1]) {
        bail!("attention: sequences {cu_seqlens:?} do not cover {tokens} tokens");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};

    /// The formula with candle's ops: the whole score matrix, masked.
    fn naive(inputs: &[Tensor], cu_seqlens: &[usize]) -> Tensor {
        let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
        let (tokens, heads, head_dim) = q.dims3().unwrap();
        let group = heads / k.dim(1).unwrap();
        let sequence = |t: usize| cu_seqlens.iter().filter(|&&start| start <= t).count();
        let mask: Vec<f64> = (0..tokens * tokens)
            .map(|at| (at / tokens, at % tokens))
            .map(|(i, j)| if j <= i && sequence(i) == sequence(j) { 0.0 } else { f64::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
        let out: Vec<Tensor> = (0..heads)
            .map(|head| {
                let pick = |x: &Tensor, head| x.narrow(1, head, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
                let (q, k, v) = (pick(q, head), pick(k, head / group), pick(v, head / group));
                let scores = (q.matmul(&k.t().unwrap()).unwrap() / (head_dim as f64).sqrt()).unwrap();
                let scores = (scores + &mask).unwrap();
                let max = scores.max_keepdim(D::Minus1).unwrap().detach();
                let e = scores.broadcast_sub(&max).unwrap().exp().unwrap();
                let p = e.broadcast_div(&e.sum_keepdim(D::Minus1).unwrap()).unwrap();
                p.matmul(&v).unwrap().unsqueeze(1).unwrap()
            })
            .collect();
        Tensor::cat(&out, 1).unwrap()
    }

    #[test]
    fn backward_is_the_gradient_of_forward() {
        let cases: [(&[usize], usize, usize, usize); 4] =
            [(&[0, 1], 1, 1, 8), (&[0, 5, 12], 4, 2, 8), (&[0, 0, 3, 3, 7], 3, 1, 16), (&[0, 70, 75], 2, 2, 8)];
        for (cu_seqlens, heads, kv_heads, head_dim) in cases {
            let tokens = *cu_seqlens.last().unwrap();
            let q = randn(&[tokens, heads, head_dim]);
            let (k, v) = (randn(&[tokens, kv_heads, head_dim]), randn(&[tokens, kv_heads, head_dim]));
            let dout = randn(&[tokens, heads, head_dim]);
            let inputs = [q, k, v];
            let expected = reference(&inputs, &dout, |inputs| naive(inputs, cu_seqlens));
            let [q, k, v] = inputs.each_ref().map(f32);
            let (o, lse) = forward(&q, &k, &v, cu_seqlens).unwrap();
            assert_close("o", &o, &naive(&inputs, cu_seqlens), 1e-5);
            let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
            let (dq, dk, dv) = backward(&f32(&dout), saved, cu_seqlens).unwrap();
            assert_close("dq", &dq, &expected[0], 1e-4);
            assert_close("dk", &dk, &expected[1], 1e-4);
            assert_close("dv", &dv, &expected[2], 1e-4);
        }
    }

    #[test]
    fn cached_queries_see_what_they_saw_in_one_piece() {
        let (q, k, v) = (f32(&randn(&[70, 4, 8])), f32(&randn(&[70, 2, 8])), f32(&randn(&[70, 2, 8])));
        let (whole, _) = forward(&q, &k, &v, &[0, 70]).unwrap();
        for (first, count) in [(0, 70), (69, 1), (3, 66)] {
            let seen = first + count;
            let queries = q.narrow(0, first, count).unwrap();
            let (k, v) = (k.narrow(0, 0, seen).unwrap(), v.narrow(0, 0, seen).unwrap());
            let o = forward_cached(&queries, &k, &v).unwrap();
            let expected = whole.narrow(0, first, count).unwrap().to_dtype(candle_core::DType::F64).unwrap();
            assert_close("o", &o, &expected, 1e-6);
        }
    }

    #[test]
    fn sequences_must_cover_the_tokens() {
        let x = f32(&randn(&[4, 1, 8]));
        for wrong in [&[0, 3][..], &[1, 4], &[0, 3, 2, 4], &[]] {
            assert!(forward(&x, &x, &x, wrong).is_err());
        }
    }
}
