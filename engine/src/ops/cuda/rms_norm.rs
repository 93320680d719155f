//! RMSNorm on a GPU; the maths stand in `ops/rms_norm.rs`.

use super::flat::{GROUP, assert_alike, assert_vector, of_type};
use super::{Gpu, Launch, Mat};
use crate::Result;

/// Groups of eight values that a thread keeps; kernels/rms_norm.cu names it too.
const HELD: usize = 2;
/// Threads of a block, which has one row; kernels/rms_norm.cu names it too.
const MOST_THREADS: usize = 512;
const WARP: usize = 32;

/// y from x (T, C) and weight (C), and the rstd (T) of every row, which backward needs.
pub(crate) fn forward(gpu: &Gpu, y: Mat<'_>, rstd: Mat<'_>, x: Mat<'_>, weight: Mat<'_>, eps: f32) -> Result<()> {
    check(&[y, x], rstd, weight);
    let name = of_type(x.dtype, "rms_norm_forward_bf16", "rms_norm_forward_f32");
    let launch = launch(gpu, name, x)?.mat(y).pointer(rstd).mat(x).pointer(weight);
    // SAFETY: the shapes were checked.
    unsafe { launch.int(x.rows).int(x.columns).float(eps).run() }
}

/// y again from x and the rstd that forward gave.
pub(crate) fn recompute(gpu: &Gpu, y: Mat<'_>, x: Mat<'_>, weight: Mat<'_>, rstd: Mat<'_>) -> Result<()> {
    check(&[y, x], rstd, weight);
    let name = of_type(x.dtype, "rms_norm_recompute_bf16", "rms_norm_recompute_f32");
    let launch = launch(gpu, name, x)?.mat(y).mat(x).pointer(weight).pointer(rstd);
    // SAFETY: the shapes were checked.
    unsafe { launch.int(x.rows).int(x.columns).run() }
}

/// What backward reads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backward<'a> {
    pub(crate) dy: Mat<'a>,
    pub(crate) x: Mat<'a>,
    pub(crate) weight: Mat<'a>,
    pub(crate) rstd: Mat<'a>,
}

/// Adds dx to the gradient of the residual stream. Writes the norm's output to `y` once more where there is one: it must share
/// no memory with what is read.
pub(crate) fn backward_add(gpu: &Gpu, dresidual: Mat<'_>, y: Option<Mat<'_>>, from: Backward<'_>) -> Result<()> {
    let Backward { dy, x, weight, rstd } = from;
    check(&[dresidual, y.unwrap_or(x), dy, x], rstd, weight);
    let name = of_type(x.dtype, "rms_norm_backward_bf16", "rms_norm_backward_f32");
    let launch = launch(gpu, name, x)?.mat(dresidual);
    let launch = match y {
        Some(y) => launch.mat(y),
        None => launch.long(0).long(0),
    };
    let launch = launch.mat(dy).mat(x).pointer(weight).pointer(rstd);
    // SAFETY: the shapes were checked.
    unsafe { launch.int(x.rows).int(x.columns).run() }
}

fn check(mats: &[Mat<'_>], rstd: Mat<'_>, weight: Mat<'_>) {
    assert_alike("rms_norm", mats);
    let (rows, width) = mats[0].shape();
    assert_vector("rms_norm: rstd", rstd, rows);
    assert_vector("rms_norm: weight", weight, width);
}

fn launch<'a>(gpu: &'a Gpu, name: &'static str, x: Mat<'_>) -> Result<Launch<'a>> {
    let threads = x.columns.div_ceil(HELD * GROUP).next_multiple_of(WARP).min(MOST_THREADS);
    let blocks = if x.is_empty() { 0 } else { x.rows };
    Ok(gpu.launch(name)?.grid(blocks as u32, threads as u32))
}

#[cfg(test)]
mod tests {
    use super::super::Dtype;
    use super::super::flat::SHAPES;
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::{host, rms_norm, tensor};

    #[test]
    fn norms_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (shape, stride) in SHAPES {
                let (rows, width) = shape;
                let some = |seed| rounded(&random(seed, rows * width), dtype);
                let (x, dy, residual, w) = (some(1), some(2), some(3), random(4, width));
                let cpu = |values: &[f32]| tensor(values.to_vec(), shape).unwrap();
                let cpu_w = tensor(w.clone(), width).unwrap();
                let (cpu_y, cpu_rstd) = rms_norm::forward(&cpu(&x), &cpu_w, 1e-5).unwrap();
                let cpu_dx = cpu(&residual);
                rms_norm::backward_add(&cpu_dx, &cpu(&dy), &cpu(&x), &cpu_w, &cpu_rstd).unwrap();

                let held = |values: &[f32], stride| Held::of(&gpu, values, shape, stride, dtype);
                let weight = Held::of(&gpu, &w, (1, width), width, Dtype::F32);
                let rstd = Held::poisoned(&gpu, (1, rows), rows, Dtype::F32);
                let (x, dy, dresidual) = (held(&x, width), held(&dy, stride), held(&residual, stride));
                let y = Held::poisoned(&gpu, shape, stride, dtype);
                forward(&gpu, y.mat(), rstd.mat(), x.mat(), weight.mat(), 1e-5).unwrap();
                assert_near("y", &y.values(), &host(&cpu_y).unwrap(), tolerance(dtype));
                assert_near("rstd", &rstd.values(), &host(&cpu_rstd).unwrap(), tolerance(Dtype::F32));
                let again = Held::poisoned(&gpu, shape, stride, dtype);
                recompute(&gpu, again.mat(), x.mat(), weight.mat(), rstd.mat()).unwrap();
                assert_eq!(again.values(), y.values());

                let from = Backward { dy: dy.mat(), x: x.mat(), weight: weight.mat(), rstd: rstd.mat() };
                let again = Held::poisoned(&gpu, shape, stride, dtype);
                backward_add(&gpu, dresidual.mat(), Some(again.mat()), from).unwrap();
                assert_eq!(again.values(), y.values());
                let with_y = dresidual.values();
                assert_near("dx", &with_y, &host(&cpu_dx).unwrap(), tolerance(dtype));
                let dresidual = held(&residual, stride);
                backward_add(&gpu, dresidual.mat(), None, from).unwrap();
                assert_eq!(dresidual.values(), with_y);
            }
        }
    }
}
