//! Adds into the residual stream: y += x.

use super::flat::{assert_alike, launch, of_type};
use super::{Gpu, Mat};
use crate::Result;

/// y += x.
pub(crate) fn add(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>) -> Result<()> {
    assert_alike("add", &[y, x]);
    let launch =
        launch(gpu, of_type(y.dtype, "add_bf16", "add_f32"), y.shape())?.mat(y).mat(x).int(y.rows).int(y.columns);
    // SAFETY: both have that shape and type.
    unsafe { launch.run() }
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::super::flat::SHAPES;
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};

    #[test]
    fn adding_is_that_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (shape, stride) in SHAPES {
                let count = shape.0 * shape.1;
                let (a, b) = (rounded(&random(1, count), dtype), rounded(&random(2, count), dtype));
                let (y, x) = (Held::of(&gpu, &a, shape, stride, dtype), Held::of(&gpu, &b, shape, shape.1, dtype));
                super::add(&gpu, y.mat(), x.mat()).unwrap();
                let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
                assert_near("sum", &y.values(), &rounded(&sum, dtype), tolerance(dtype) * 1e-2);
            }
        }
    }
}
