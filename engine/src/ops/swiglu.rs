//! SwiGLU: h = silu(gate) · up, silu(x) = x · σ(x).
//!
//! Backward: with s = σ(gate), dup = dh · gate · s and dgate = dh · up · s · (1 + gate · (1 − s)).
//! Shapes: all (T, F). Storage f32. Source: Shazeer, "GLU Variants Improve Transformer", 2020.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::exp::{sigmoid, vectorized};
use crate::ops::{host, tensor, zeros};

const CHUNK: usize = 1 << 13;

/// h from gate and up.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let shape = gate.dims2()?;
    let (gate, up) = (host(gate)?, host(up)?);
    assert_eq!(gate.len(), up.len(), "swiglu: sizes differ");
    let mut h = zeros(gate.len());
    h.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(|((h, gate), up)| {
        vectorized(
            #[inline(always)]
            || {
                for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
                    *h = gate * sigmoid(gate) * up;
                }
            },
        );
    });
    tensor(h, shape)
}

/// dgate and dup from dh and what forward was given.
pub fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = gate.dims2()?;
    let (dh, gate, up) = (host(dh)?, host(gate)?, host(up)?);
    assert_eq!((dh.len(), up.len()), (gate.len(), gate.len()), "swiglu: sizes differ");
    let (mut dgate, mut dup) = (zeros(gate.len()), zeros(gate.len()));
    let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
    let inputs = dh.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    outputs.zip(inputs).for_each(|((dgate, dup), ((dh, gate), up))| {
        vectorized(
            #[inline(always)]
            || {
                for (((dgate, dup), dh), (&gate, up)) in dgate.iter_mut().zip(dup).zip(dh).zip(gate.iter().zip(up)) {
                    let s = sigmoid(gate);
                    *dup = dh * gate * s;
                    *dgate = dh * up * s * (1.0 + gate * (1.0 - s));
                }
            },
        );
    });
    Ok((tensor(dgate, shape)?, tensor(dup, shape)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, f32, randn, reference};

    #[test]
    fn backward_is_the_gradient_of_forward() {
        for shape in [[1, 1], [3, 7], [17, 700]] {
            let (gate, up, dh) = (randn(&shape), randn(&shape), randn(&shape));
            let naive = |inputs: &[Tensor]| {
                let sigmoid = (inputs[0].neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
                ((&inputs[0] * sigmoid).unwrap() * &inputs[1]).unwrap()
            };
            let expected = reference(&[gate.clone(), up.clone()], &dh, naive);
            let (gate, up) = (f32(&gate), f32(&up));
            assert_close(
                "h",
                &forward(&gate, &up).unwrap(),
                &naive(&[
                    gate.to_dtype(candle_core::DType::F64).unwrap(),
                    up.to_dtype(candle_core::DType::F64).unwrap(),
                ]),
                1e-5,
            );
            let (dgate, dup) = backward(&f32(&dh), &gate, &up).unwrap();
            assert_close("dgate", &dgate, &expected[0], 1e-4);
            assert_close("dup", &dup, &expected[1], 1e-4);
        }
    }

    #[test]
    fn far_negative_gates_give_zero_and_not_nan() {
        let gate = Tensor::new(&[[-200f32, 200.0]], &candle_core::Device::Cpu).unwrap();
        let up = Tensor::new(&[[3f32, 3.0]], &candle_core::Device::Cpu).unwrap();
        let h = forward(&gate, &up).unwrap().to_vec2::<f32>().unwrap();
        assert!(h[0][0].abs() < 1e-30 && h[0][1] == 600.0, "{h:?}");
    }
}
