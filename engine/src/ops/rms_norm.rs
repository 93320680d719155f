//! RMSNorm: rstd = 1/√(mean(x²) + eps), y = x · rstd · w, over the last dimension.
//!
//! Backward, w being frozen: with g = dy · w and n = x · rstd, dx = rstd · (g − n · mean(g · n)).
//! Shapes: x, y, dx (T, C), w (C), rstd (T). Storage f32; sums accumulate in f32 over eight lanes.
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::{ROWS_PER_TASK, host, host_mut, tensor, zeros};

/// y and the rstd of every row, which backward needs.
pub fn forward(x: &Tensor, w: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (rows, columns) = x.dims2()?;
    let (x, w) = (host(x)?, host(w)?);
    assert_eq!(w.len(), columns, "rms_norm: weight does not fit");
    let mut rstd = vec![0f32; rows];
    rstd.par_iter_mut().zip(x.par_chunks(columns)).with_min_len(ROWS_PER_TASK).for_each(|(rstd, x)| {
        *rstd = 1.0 / (dot(x, x) / columns as f32 + eps).sqrt();
    });
    let y = scale(&x, &w, &rstd);
    Ok((tensor(y, (rows, columns))?, tensor(rstd, rows)?))
}

/// y again from x and the rstd that forward gave.
pub fn recompute(x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let shape = x.dims2()?;
    tensor(scale(&host(x)?, &host(w)?, &host(rstd)?), shape)
}

fn scale(x: &[f32], w: &[f32], rstd: &[f32]) -> Vec<f32> {
    let columns = w.len();
    let mut y = zeros(x.len());
    let rows = y.par_chunks_mut(columns).zip(x.par_chunks(columns)).zip(rstd);
    rows.with_min_len(ROWS_PER_TASK).for_each(|((y, x), &rstd)| {
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = x * rstd * w;
        }
    });
    y
}

/// Adds dx to the gradient of the residual stream.
pub fn backward_add(dresidual: &Tensor, dy: &Tensor, x: &Tensor, w: &Tensor, rstd: &Tensor) -> Result<()> {
    let (_, columns) = x.dims2()?;
    let (dy, x, w, rstd) = (host(dy)?, host(x)?, host(w)?, host(rstd)?);
    host_mut(dresidual, |dx| {
        assert_eq!((dx.len(), dy.len()), (x.len(), x.len()), "rms_norm: sizes differ");
        let rows = dx.par_chunks_mut(columns).zip(dy.par_chunks(columns)).zip(x.par_chunks(columns)).zip(&*rstd);
        rows.with_min_len(ROWS_PER_TASK).for_each(|(((dx, dy), x), &rstd)| row_backward(dx, dy, x, &w, rstd));
        Ok(())
    })
}

fn row_backward(dx: &mut [f32], dy: &[f32], x: &[f32], w: &[f32], rstd: f32) {
    let mut lanes = [0f32; 8];
    for ((dy, x), w) in dy.chunks(8).zip(x.chunks(8)).zip(w.chunks(8)) {
        for (((lane, dy), x), w) in lanes.iter_mut().zip(dy).zip(x).zip(w) {
            *lane += dy * w * x;
        }
    }
    // mean(g · n) · rstd, so that the loop below multiplies x itself.
    let mean = lanes.iter().sum::<f32>() * rstd * rstd / x.len() as f32;
    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
        *dx += rstd * (dy * w - x * mean);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};

    #[test]
    fn backward_is_the_gradient_of_forward() {
        for (rows, columns) in [(1, 8), (5, 24), (33, 64)] {
            let (x, w, dy) = (randn(&[rows, columns]), randn(&[columns]), randn(&[rows, columns]));
            let naive = |inputs: &[Tensor]| {
                let mean = (inputs[0].sqr().unwrap().mean_keepdim(1).unwrap() + 1e-5).unwrap();
                inputs[0].broadcast_div(&mean.sqrt().unwrap()).unwrap().broadcast_mul(&w).unwrap()
            };
            let expected = reference(std::slice::from_ref(&x), &dy, naive);
            let (y, rstd) = forward(&f32(&x), &f32(&w), 1e-5).unwrap();
            assert_close("y", &y, &naive(std::slice::from_ref(&x)), 1e-5);
            assert_close(
                "y again",
                &recompute(&f32(&x), &f32(&w), &rstd).unwrap(),
                &naive(std::slice::from_ref(&x)),
                1e-5,
            );
            let start = randn(&[rows, columns]);
            let dx = f32(&start);
            backward_add(&dx, &f32(&dy), &f32(&x), &f32(&w), &rstd).unwrap();
            assert_close("dx", &dx, &(&start + &expected[0]).unwrap(), 1e-4);
        }
    }
}
