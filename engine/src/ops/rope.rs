//! Rotary position embedding: each pair (a, b) of a head is turned by the angle position · frequency of that pair,
//! a' = a cos − b sin, b' = a sin + b cos. A rotation's backward is the rotation by the opposite angle.
//!
//! Shapes: x (T, H, D) in place; cos, sin (T, D/2). Angles in f64, tables and values f32.
//! Which elements form a pair depends on where the weights came from: `llama` GGUF files have the rows of q_proj and k_proj
//! permuted so that pairs are neighbours, Hugging Face pairs element i with i + D/2.
//! Source: Su et al., "RoFormer", 2021.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::{ROWS_PER_TASK, host_mut};

/// Which two elements of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// 2i and 2i + 1 (`llama` in GGUF).
    Interleaved,
    /// i and i + D/2 (Hugging Face).
    HalfSplit,
}

/// cos and sin of every token's angles.
#[derive(Debug)]
pub struct RopeTable {
    layout: RopeLayout,
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table for tokens at those positions; `frequencies` in radians a position, one a pair.
    pub fn new(positions: &[u32], frequencies: &[f64], layout: RopeLayout) -> Self {
        let angles = positions.iter().flat_map(|&position| frequencies.iter().map(move |f| f64::from(position) * f));
        let (sin, cos) = angles.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        Self { layout, pairs: frequencies.len(), cos, sin }
    }

    /// Turns x forward.
    pub fn forward(&self, x: &Tensor) -> Result<()> {
        self.turn(x, 1.0)
    }

    /// Turns dx back: the gradient before the rotation from the one after it.
    pub fn backward(&self, dx: &Tensor) -> Result<()> {
        self.turn(dx, -1.0)
    }

    fn turn(&self, x: &Tensor, direction: f32) -> Result<()> {
        let (tokens, heads, head_dim) = x.dims3()?;
        assert_eq!((self.cos.len(), head_dim), (tokens * self.pairs, 2 * self.pairs), "rope: table does not fit");
        host_mut(x, |x| {
            let table = self.cos.par_chunks(self.pairs).zip(self.sin.par_chunks(self.pairs));
            let rows = x.par_chunks_mut(heads * head_dim).zip(table);
            rows.with_min_len(ROWS_PER_TASK).for_each(|(row, (cos, sin))| {
                for head in row.chunks_exact_mut(head_dim) {
                    match self.layout {
                        RopeLayout::Interleaved => turn_neighbours(head, cos, sin, direction),
                        RopeLayout::HalfSplit => turn_halves(head, cos, sin, direction),
                    }
                }
            });
            Ok(())
        })
    }
}

fn turn_neighbours(head: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
    for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b, sin) = (pair[0], pair[1], sin * direction);
        pair[0] = a * cos - b * sin;
        pair[1] = a * sin + b * cos;
    }
}

fn turn_halves(head: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b, sin) = (*low, *high, sin * direction);
        *low = a * cos - b * sin;
        *high = a * sin + b * cos;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};

    const FREQUENCIES: [f64; 4] = [1.0, 0.3, 0.1, 0.01];

    /// The formula with candle's ops, pair elements gathered by index.
    fn naive(x: &Tensor, positions: &[u32], layout: RopeLayout) -> Tensor {
        let (tokens, heads, head_dim) = x.dims3().unwrap();
        let pairs = head_dim / 2;
        let place = |i: usize| match layout {
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            RopeLayout::HalfSplit => (i, i + pairs),
        };
        let mut columns = vec![None; head_dim];
        for (i, frequency) in FREQUENCIES.iter().enumerate() {
            let (a, b) = place(i);
            let angle: Vec<f64> = positions.iter().map(|&p| f64::from(p) * frequency).collect();
            let angle = Tensor::from_vec(angle, (tokens, 1, 1), x.device()).unwrap();
            let angle = angle.broadcast_as((tokens, heads, 1)).unwrap();
            let (cos, sin) = (angle.cos().unwrap(), angle.sin().unwrap());
            let (xa, xb) = (x.narrow(2, a, 1).unwrap(), x.narrow(2, b, 1).unwrap());
            columns[a] = Some(((&xa * &cos).unwrap() - (&xb * &sin).unwrap()).unwrap());
            columns[b] = Some(((&xa * &sin).unwrap() + (&xb * &cos).unwrap()).unwrap());
        }
        Tensor::cat(&columns.into_iter().flatten().collect::<Vec<_>>(), 2).unwrap()
    }

    #[test]
    fn backward_is_the_gradient_of_forward() {
        let positions = [0, 1, 2, 0, 700];
        for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
            let (x, dy) = (randn(&[5, 3, 8]), randn(&[5, 3, 8]));
            let expected = reference(std::slice::from_ref(&x), &dy, |inputs| naive(&inputs[0], &positions, layout));
            let table = RopeTable::new(&positions, &FREQUENCIES, layout);
            let y = f32(&x);
            table.forward(&y).unwrap();
            assert_close("y", &y, &naive(&x, &positions, layout), 1e-5);
            let dx = f32(&dy);
            table.backward(&dx).unwrap();
            assert_close("dx", &dx, &expected[0], 1e-4);
        }
    }
}
