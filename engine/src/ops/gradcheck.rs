//! What the gradient tests share: a naive formula in f64 under candle's autograd is the reference of every f32 backward, and
//! finite differences are the reference of that formula.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::testing::normal;

thread_local! {
    /// Each test has a thread of its own, so each sees the same values in every run.
    static RANDOM: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(3407));
}

/// Random normal values in f64.
pub(crate) fn randn(shape: &[usize]) -> Tensor {
    let values: Vec<f64> =
        RANDOM.with_borrow_mut(|random| (0..shape.iter().product()).map(|_| f64::from(normal(random))).collect());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The same values in f32.
pub(crate) fn f32(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F32).unwrap().contiguous().unwrap()
}

/// Gradients of Σ weight · f(inputs) by autograd, each first checked against finite differences to 1e-6 of its norm.
pub(crate) fn reference(inputs: &[Tensor], weight: &Tensor, f: impl Fn(&[Tensor]) -> Tensor) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let objective = |xs: &[Tensor]| (f(xs) * weight).unwrap().sum_all().unwrap();
    let store = objective(&tensors).backward().unwrap();
    let gradients: Vec<Tensor> = tensors.iter().map(|x| store.get(x).unwrap().clone()).collect();
    for (index, gradient) in gradients.iter().enumerate() {
        let direction = randn(inputs[index].dims());
        let step = 1e-5;
        let at = |sign: f64| {
            let mut moved = inputs.to_vec();
            moved[index] = (&inputs[index] + (&direction * (sign * step)).unwrap()).unwrap();
            objective(&moved).to_scalar::<f64>().unwrap()
        };
        let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
        let exact = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        let scale = norm(gradient) * norm(&direction);
        assert!((numeric - exact).abs() <= 1e-6 * scale.max(1.0), "input {index}: {numeric} against {exact}");
    }
    gradients
}

/// Euclidean norm in f64.
pub(crate) fn norm(tensor: &Tensor) -> f64 {
    let squares = tensor.to_dtype(DType::F64).unwrap().sqr().unwrap();
    squares.sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// Asserts that an f32 result is within `tolerance` of the reference's norm (of 1e-2 where that is smaller, zero for one).
pub(crate) fn assert_close(name: &str, result: &Tensor, reference: &Tensor, tolerance: f64) {
    assert_eq!(result.dims(), reference.dims(), "{name}");
    let difference = norm(&(result.to_dtype(DType::F64).unwrap() - reference).unwrap());
    let scale = norm(reference);
    assert!(difference <= tolerance * scale.max(1e-2), "{name}: off by {difference:e} of {scale:e}");
}
