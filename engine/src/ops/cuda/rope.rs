//! Rotary position embedding on a GPU; the maths stand in `ops/rope.rs`.

use super::flat::{GROUP, launch_values, of_type};
use super::{Buffer, Dtype, Gpu, Mat};
use crate::Result;
use crate::ops::rope::RopeLayout;

/// Fills cos_sin (T, D), (cos, sin) of each pair, for tokens at those positions (T, i32); `frequencies` (D/2, f64) in radians a
/// position.
pub(crate) fn table(gpu: &Gpu, cos_sin: Mat<'_>, positions: &Buffer, frequencies: &Buffer) -> Result<()> {
    let (rows, pairs) = (cos_sin.rows, cos_sin.columns / 2);
    check_table(cos_sin, rows, cos_sin.columns);
    assert!(positions.bytes() >= 4 * rows && frequencies.bytes() >= 8 * pairs, "rope: a table of {rows} × {pairs}");
    let launch =
        launch_values(gpu, "rope_table", rows * pairs)?.pointer(cos_sin).long(positions.at(0)).long(frequencies.at(0));
    // SAFETY: the sizes were checked.
    unsafe { launch.int(rows).int(pairs).run() }
}

/// Turns x (T, H · D) forward, in place.
pub(crate) fn forward(gpu: &Gpu, x: Mat<'_>, cos_sin: Mat<'_>, head_dim: usize, layout: RopeLayout) -> Result<()> {
    turn(gpu, x, cos_sin, head_dim, layout, 1.0)
}

/// Turns dx (T, H · D) back, in place: the gradient before the rotation from the one after it.
pub(crate) fn backward(gpu: &Gpu, dx: Mat<'_>, cos_sin: Mat<'_>, head_dim: usize, layout: RopeLayout) -> Result<()> {
    turn(gpu, dx, cos_sin, head_dim, layout, -1.0)
}

fn turn(gpu: &Gpu, x: Mat<'_>, cos_sin: Mat<'_>, head_dim: usize, layout: RopeLayout, direction: f32) -> Result<()> {
    check_table(cos_sin, x.rows, head_dim);
    assert!(x.columns.is_multiple_of(head_dim), "rope: {x:?} in heads of {head_dim}");
    let name = of_type(x.dtype, "rope_bf16", "rope_f32");
    // A thread has two groups; of a head that these do not fill it has several pairs.
    let launch =
        launch_values(gpu, name, (x.rows * x.columns).div_ceil(2 * GROUP))?.mat(x).pointer(cos_sin).int(x.rows);
    let interleaved = usize::from(layout == RopeLayout::Interleaved);
    // SAFETY: the sizes were checked.
    unsafe { launch.int(x.columns / head_dim).int(head_dim).int(interleaved).float(direction).run() }
}

fn check_table(cos_sin: Mat<'_>, rows: usize, head_dim: usize) {
    let fits = cos_sin.shape() == (rows, head_dim) && cos_sin.stride == head_dim && cos_sin.dtype == Dtype::F32;
    assert!(fits && head_dim.is_multiple_of(2), "rope: {rows} tokens, heads of {head_dim}, table {cos_sin:?}");
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;
    use crate::ops::rope::RopeTable;
    use crate::ops::{host, tensor};

    #[test]
    fn rotations_are_those_of_the_cpu() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (tokens, heads, head_dim) in [(1, 1, 2), (5, 3, 8), (7, 9, 64), (3, 5, 72), (33, 4, 128)] {
                let positions: Vec<u32> = (0..tokens as u32).map(|token| token * 977 % 70_000).collect();
                let frequencies: Vec<f64> =
                    (0..head_dim / 2).map(|pair| 5e5f64.powf(-2.0 * pair as f64 / head_dim as f64)).collect();
                let cos_sin = Held::poisoned(&gpu, (tokens, head_dim), head_dim, Dtype::F32);
                let on_gpu = (Buffer::of(&gpu, &positions).unwrap(), Buffer::of(&gpu, &frequencies).unwrap());
                table(&gpu, cos_sin.mat(), &on_gpu.0, &on_gpu.1).unwrap();
                for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
                    let cpu_table = RopeTable::new(&positions, &frequencies, layout);
                    let shape = (tokens, heads * head_dim);
                    let values = rounded(&random(1, shape.0 * shape.1), dtype);
                    let cpu = || tensor(values.clone(), (tokens, heads, head_dim)).unwrap();
                    let (y, dx) = (cpu(), cpu());
                    cpu_table.forward(&y).unwrap();
                    cpu_table.backward(&dx).unwrap();
                    let x = Held::of(&gpu, &values, shape, shape.1 + 24, dtype);
                    forward(&gpu, x.mat(), cos_sin.mat(), head_dim, layout).unwrap();
                    assert_near("y", &x.values(), &host(&y).unwrap(), tolerance(dtype));
                    let dy = Held::of(&gpu, &values, shape, shape.1 + 24, dtype);
                    backward(&gpu, dy.mat(), cos_sin.mat(), head_dim, layout).unwrap();
                    assert_near("dx", &dy.values(), &host(&dx).unwrap(), tolerance(dtype));
                }
            }
        }
    }
}
