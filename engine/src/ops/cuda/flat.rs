//! Flat grids, which the elementwise kernels share: a thread has a group of eight values, the groups of all rows one after the other.

use super::{Dtype, Gpu, Launch, Mat};
use crate::Result;

/// Threads of a block; kernels/common.cuh names it too.
const THREADS: usize = 256;
/// Values of a group; kernels/common.cuh names it too.
pub(super) const GROUP: usize = 8;

/// The name of an op's kernel for that type.
pub(super) fn of_type(dtype: Dtype, bf16: &'static str, f32: &'static str) -> &'static str {
    match dtype {
        Dtype::Bf16 => bf16,
        Dtype::F32 => f32,
    }
}

/// Begins a launch over all groups of so many rows of that width; over none where there is no value.
pub(super) fn launch<'a>(gpu: &'a Gpu, name: &'static str, (rows, width): (usize, usize)) -> Result<Launch<'a>> {
    let groups = u32::try_from(rows * width.div_ceil(GROUP)).expect("a flat grid has fewer than 2^32 groups");
    Ok(gpu.launch(name)?.grid(groups.div_ceil(THREADS as u32), THREADS as u32))
}

/// Begins a launch over single values.
pub(super) fn launch_values<'a>(gpu: &'a Gpu, name: &'static str, count: usize) -> Result<Launch<'a>> {
    let blocks = u32::try_from(count.div_ceil(THREADS)).expect("a grid has fewer than 2^32 blocks");
    Ok(gpu.launch(name)?.grid(blocks, THREADS as u32))
}

/// Asserts that matrices are of one type and shape.
pub(super) fn assert_alike(op: &str, mats: &[Mat<'_>]) {
    let alike = mats.iter().all(|mat| mat.shape() == mats[0].shape() && mat.dtype == mats[0].dtype);
    assert!(alike, "{op}: {mats:?}");
}

/// Asserts that matrices hold values of that type.
pub(super) fn assert_type(op: &str, dtype: Dtype, mats: &[Mat<'_>]) {
    assert!(mats.iter().all(|mat| mat.dtype == dtype), "{op}: {dtype:?} and {mats:?}");
}

/// Asserts that a matrix is one row of so many f32 values.
pub(super) fn assert_vector(op: &str, mat: Mat<'_>, count: usize) {
    assert!(mat.shape() == (1, count) && mat.dtype == Dtype::F32, "{op}: {count} values in {mat:?}");
}

/// Shapes of the parity tests, and the stride of those matrices that are wider than their values.
#[cfg(test)]
pub(super) const SHAPES: [((usize, usize), usize); 9] = [
    ((0, 8), 8),
    ((1, 1), 1),
    ((3, 7), 8),
    ((9, 8), 16),
    ((5, 576), 592),
    ((2, 577), 580),
    ((3, 4096), 4160),
    ((2, 4100), 4103),
    ((2, 14336), 14336),
];
