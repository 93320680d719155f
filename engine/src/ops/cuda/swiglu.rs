//! SwiGLU on a GPU; the maths stand in `ops/swiglu.rs`.

use super::flat::{assert_alike, launch, of_type};
use super::{Gpu, Mat};
use crate::Result;

/// h (T, F) from gate and up, which lie side by side in gate_up (T, 2F).
pub(crate) fn forward(gpu: &Gpu, h: Mat<'_>, gate_up: Mat<'_>) -> Result<()> {
    check(gate_up, h);
    let name = of_type(h.dtype, "swiglu_forward_bf16", "swiglu_forward_f32");
    let launch = launch(gpu, name, h.shape())?.mat(h).mat(gate_up);
    // SAFETY: the shapes were checked.
    unsafe { launch.int(h.rows).int(h.columns).run() }
}

/// dgate and dup side by side from dh and what forward was given, and h again where there is a place for it. In place is right:
/// dgate_up may be gate_up, and h may be dh.
pub(crate) fn backward(gpu: &Gpu, dgate_up: Mat<'_>, h: Option<Mat<'_>>, dh: Mat<'_>, gate_up: Mat<'_>) -> Result<()> {
    assert_alike("swiglu", &[dgate_up, gate_up]);
    assert_alike("swiglu", &[dh, h.unwrap_or(dh)]);
    check(gate_up, dh);
    let name = of_type(dh.dtype, "swiglu_backward_bf16", "swiglu_backward_f32");
    let launch = launch(gpu, name, dh.shape())?.mat(dgate_up);
    let launch = match h {
        Some(h) => launch.mat(h),
        None => launch.long(0).long(0),
    };
    // SAFETY: the shapes were checked.
    unsafe { launch.mat(dh).mat(gate_up).int(dh.rows).int(dh.columns).run() }
}

fn check(gate_up: Mat<'_>, h: Mat<'_>) {
    let fits = gate_up.shape() == (h.rows, 2 * h.columns) && gate_up.dtype == h.dtype;
    assert!(fits, "swiglu: {gate_up:?} and {h:?}");
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::super::flat::SHAPES;
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::{host, swiglu, tensor};

    #[test]
    fn products_with_gates_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (shape, stride) in SHAPES {
                let some = |seed| rounded(&random(seed, shape.0 * shape.1), dtype);
                let (gate, up, dh) = (some(1), some(2), some(3));
                let cpu = |values: &[f32]| tensor(values.to_vec(), shape).unwrap();
                let cpu_h = swiglu::forward(&cpu(&gate), &cpu(&up)).unwrap();
                let (cpu_dgate, cpu_dup) = swiglu::backward(&cpu(&dh), &cpu(&gate), &cpu(&up)).unwrap();
                let (cpu_dgate, cpu_dup) = (host(&cpu_dgate).unwrap(), host(&cpu_dup).unwrap());

                let wide = (shape.0, 2 * shape.1);
                let gate_up = side_by_side(&gate, &up, shape.1);
                let gate_up = Held::of(&gpu, &gate_up, wide, stride + shape.1, dtype);
                let h = Held::poisoned(&gpu, shape, stride, dtype);
                forward(&gpu, h.mat(), gate_up.mat()).unwrap();
                assert_near("h", &h.values(), &host(&cpu_h).unwrap(), tolerance(dtype));
                let dh = Held::of(&gpu, &dh, shape, stride, dtype);
                let dgate_up = Held::poisoned(&gpu, wide, wide.1, dtype);
                backward(&gpu, dgate_up.mat(), None, dh.mat(), gate_up.mat()).unwrap();
                let expected = side_by_side(&cpu_dgate, &cpu_dup, shape.1);
                assert_near("dgate and dup", &dgate_up.values(), &expected, tolerance(dtype));
                backward(&gpu, gate_up.mat(), Some(dh.mat()), dh.mat(), gate_up.mat()).unwrap();
                assert_eq!(gate_up.values(), dgate_up.values(), "in place");
                assert_near("h again", &dh.values(), &h.values(), tolerance(Dtype::F32));
            }
        }
    }

    fn side_by_side(a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
        a.chunks(width).zip(b.chunks(width)).flat_map(|(a, b)| [a, b].concat()).collect()
    }
}
