//! Dropout on a GPU: the mask is that of `ops/dropout.rs`, bit by bit.

use super::flat::{assert_alike, launch, of_type};
use super::{Gpu, Mat};
use crate::Result;
use crate::ops::dropout::Dropout;

/// y = mask · x / (1 − p); y may be x.
pub(crate) fn apply(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>, dropout: &Dropout) -> Result<()> {
    run(gpu, of_type(x.dtype, "dropout_bf16", "dropout_f32"), y, x, dropout)
}

/// y += mask · x / (1 − p).
pub(crate) fn apply_add(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>, dropout: &Dropout) -> Result<()> {
    run(gpu, of_type(x.dtype, "dropout_add_bf16", "dropout_add_f32"), y, x, dropout)
}

fn run(gpu: &Gpu, name: &'static str, y: Mat<'_>, x: Mat<'_>, dropout: &Dropout) -> Result<()> {
    assert_alike("dropout", &[y, x]);
    let launch = launch(gpu, name, x.shape())?.mat(y).mat(x).int(x.rows).int(x.columns);
    // SAFETY: both have that shape and type.
    unsafe { launch.long(dropout.key).arg(&dropout.threshold).float(dropout.scale).run() }
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::super::flat::SHAPES;
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::dropout;

    #[test]
    fn masks_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        let places = Dropout::new(0.3, &[3407, 5]).unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (shape, stride) in SHAPES {
                let (x, before) =
                    (rounded(&random(1, shape.0 * shape.1), dtype), rounded(&random(2, shape.0 * shape.1), dtype));
                let mut expected = vec![0f32; x.len()];
                dropout::apply(&x, &mut expected, 0, shape.1, &places);
                let sum: Vec<f32> = expected.iter().zip(&before).map(|(a, b)| a + b).collect();
                let x = Held::of(&gpu, &x, shape, stride, dtype);
                let (y, added) =
                    (Held::poisoned(&gpu, shape, shape.1, dtype), Held::of(&gpu, &before, shape, stride, dtype));
                apply(&gpu, y.mat(), x.mat(), &places).unwrap();
                assert_eq!(y.values(), rounded(&expected, dtype));
                apply_add(&gpu, added.mat(), x.mat(), &places).unwrap();
                assert_near("added", &added.values(), &sum, tolerance(dtype));
                apply(&gpu, x.mat(), x.mat(), &places).unwrap();
                assert_eq!(x.values(), y.values(), "in place");
            }
        }
    }
}
