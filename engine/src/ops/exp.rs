//! e^x over slices, vectorized: softmax, the loss and SwiGLU spend their elementwise time in it.
//!
//! e^x = 2^n · e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; e^r is its Taylor polynomial of degree 7, whose remainder is below
//! 6e-9. Relative error below 2e-7 (tested); x is held to [−87, 88], so that the result is a normal number; NaN stays NaN.
//! Everything is plain code that the compiler vectorizes, [`vectorized`] makes it use the processor's widest registers.

use std::sync::LazyLock;

/// Sums run in this many lanes, one after the other in the end: the result does not depend on the width of registers.
const LANES: usize = 16;
/// Adding it rounds a small number to an integer, which then stands in the low bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts: n times the first is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Runs code compiled for the widest registers that this processor has; what is to profit must be inlined into it.
#[inline(always)]
pub(crate) fn vectorized<R>(run: impl FnOnce() -> R) -> R {
    static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);
    ARCH.dispatch(run)
}

/// e^x.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons that let NaN pass.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// σ(x) = 1 / (1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The largest value that is a number; −∞ where there is none.
pub(crate) fn max(values: &[f32]) -> f32 {
    vectorized(
        #[inline(always)]
        || {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let larger = |lane: &mut f32, &value: &f32| *lane = if value > *lane { value } else { *lane };
            let mut chunks = values.chunks_exact(LANES);
            for chunk in &mut chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, value)| larger(lane, value));
            }
            lanes.iter_mut().zip(chunks.remainder()).for_each(|(lane, value)| larger(lane, value));
            lanes.iter().fold(f32::NEG_INFINITY, |max, &lane| if lane > max { lane } else { max })
        },
    )
}

/// Turns each value x into e^(x − shift); returns their sum.
pub(crate) fn exp_shifted(values: &mut [f32], shift: f32) -> f32 {
    vectorized(
        #[inline(always)]
        || {
            let mut lanes = [0f32; LANES];
            let mut chunks = values.chunks_exact_mut(LANES);
            let step = |lane: &mut f32, value: &mut f32| {
                *value = exp(*value - shift);
                *lane += *value;
            };
            for chunk in &mut chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, value)| step(lane, value));
            }
            lanes.iter_mut().zip(chunks.into_remainder()).for_each(|(lane, value)| step(lane, value));
            lanes.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_the_true_value() {
        for step in -870_000..=880_000 {
            let x = step as f32 * 1e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - expected).abs() <= 2e-7 * expected, "e^{x} = {found}, not {expected}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY) > 1e38);
        assert!(exp(f32::NAN).is_nan());
        assert!((sigmoid(2.0) - 0.880_797_1).abs() < 1e-6);
    }

    #[test]
    fn slices_of_any_length_are_summed_and_searched_whole() {
        for length in [0usize, 1, 15, 16, 17, 1000] {
            let values: Vec<f32> = (0..length).map(|at| (at * 37 % 101) as f32 * 0.1 - 5.0).collect();
            let expected: f64 = values.iter().map(|&x| f64::from(x - 1.5).exp()).sum();
            let mut changed = values.clone();
            let sum = exp_shifted(&mut changed, 1.5);
            assert!((f64::from(sum) - expected).abs() <= 1e-6 * expected, "{length}");
            assert!(changed.iter().zip(&values).all(|(&e, &x)| e == exp(x - 1.5)));
            assert_eq!(max(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        assert_eq!(max(&[f32::NAN, -3.0, f32::NAN]), -3.0);
    }
}
