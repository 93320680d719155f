//! AdamW over all LoRA parameters at once, and the global norm of their gradient.
//!
//! With g the gradient times its clip factor, t the step from 1: p ← p − lr · weight_decay · p;
//! m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε).
//! Clip factor: min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_.
//!
//! Shapes: parameters, gradient (N); moments (2, N) = m, v one after the other. Storage f32; the norm accumulates in f64 over
//! fixed chunks added in order, so that it does not depend on the number of threads.
//! Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; constants as torch's defaults.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::{bail, host, host_mut};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f32 = 1e-8;
const CHUNK: usize = 1 << 14;

/// Euclidean norm of a gradient.
pub fn norm(gradient: &Tensor) -> Result<f64> {
    let gradient = host(gradient)?;
    let sums: Vec<f64> =
        gradient.par_chunks(CHUNK).map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum()).collect();
    Ok(sums.iter().sum::<f64>().sqrt())
}

/// The factor that brings a gradient of that norm down to `max_norm`, 1 where it is smaller.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// One update's scalars.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Step, counted from 1.
    pub step: u32,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// What the gradient is multiplied with first.
    pub clip_factor: f64,
}

/// Moves parameters and moments by one step.
///
/// # Errors
/// Sizes that do not fit.
pub fn step(parameters: &Tensor, moments: &Tensor, gradient: &Tensor, update: Update) -> Result<()> {
    let (gradient, rule) = (host(gradient)?, Rule::new(update));
    let count = gradient.len();
    if parameters.dims() != [count] || moments.dims() != [2, count] {
        bail!("adamw: parameters {:?}, moments {:?}, gradient {count}", parameters.dims(), moments.dims());
    }
    host_mut(parameters, |p| {
        host_mut(moments, |moments| {
            let (m, v) = moments.split_at_mut(count);
            let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
            chunks.zip(gradient.par_chunks(CHUNK)).for_each(|(((p, m), v), g)| rule.apply(p, m, v, g));
            Ok(())
        })
    })
}

/// An update as it meets each value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    /// 1 − lr · weight_decay.
    pub(super) decay: f32,
    /// lr / (1 − β₁ᵗ).
    pub(super) rate: f32,
    /// √(1 − β₂ᵗ).
    pub(super) correction_2: f32,
    pub(super) clip: f32,
}

impl Rule {
    pub(super) fn new(update: Update) -> Self {
        let step = f64::from(update.step);
        Self {
            decay: (1.0 - update.learning_rate * update.weight_decay) as f32,
            rate: (update.learning_rate / (1.0 - BETA_1.powf(step))) as f32,
            correction_2: (1.0 - BETA_2.powf(step)).sqrt() as f32,
            clip: update.clip_factor as f32,
        }
    }

    /// Moves values that stand beside each other.
    pub(super) fn apply(&self, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        let (keep_1, keep_2) = (BETA_1 as f32, BETA_2 as f32);
        let (take_1, take_2) = ((1.0 - BETA_1) as f32, (1.0 - BETA_2) as f32);
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * self.clip;
            *m = keep_1 * *m + take_1 * g;
            *v = keep_2 * *v + take_2 * g * g;
            *p = *p * self.decay - self.rate * *m / (v.sqrt() / self.correction_2 + EPSILON);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn first_step_moves_by_the_learning_rate_against_the_sign_and_decays() {
        let parameters = Tensor::new(&[1f32, -2.0, 3.0], &Device::Cpu).unwrap();
        let moments = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let gradient = Tensor::new(&[0.5f32, -4.0, 0.0], &Device::Cpu).unwrap();
        let update = Update { step: 1, learning_rate: 0.1, weight_decay: 0.5, clip_factor: 0.25 };
        step(&parameters, &moments, &gradient, update).unwrap();
        let state = [parameters.to_vec1::<f32>().unwrap(), moments.flatten_all().unwrap().to_vec1().unwrap()].concat();
        let expected = [0.95 - 0.1, -1.9 + 0.1, 2.85, 0.0125, -0.1, 0.0, 1.5625e-5, 1e-3, 0.0];
        for (value, expected) in state.iter().zip(expected) {
            assert!((value - expected).abs() < 2e-6, "{state:?}");
        }
        assert!(step(&parameters, &moments, &parameters.narrow(0, 0, 2).unwrap(), update).is_err());
    }

    #[test]
    fn norm_is_over_everything_and_clipping_only_shrinks() {
        let gradient = Tensor::ones(40_000, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!((norm(&gradient).unwrap() - 200.0).abs() < 1e-9);
        assert!((clip_factor(200.0, 1.0) - 1.0 / 200.000001).abs() < 1e-12);
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
    }
}
