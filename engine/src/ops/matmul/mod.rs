//! Matrix products with own output, strides and beta, f32 accumulation.
//!
//! Two ways lead here. [`gemm()`] and [`gemm_values`] take views of any strides and call the `gemm` crate: for small products and
//! odd layouts. [`product()`] and [`add_transposed()`] are for the large ones of training, where weights are unpacked from their
//! blocks straight into the order in which the kernel reads them: own kernels (`kernel`), in f32 or bf16, on packed operands
//! (`pack`). Each element is one sum in the order of k, so that no result depends on the number of threads; it does depend on
//! the processor's instruction set.
#![expect(
    unsafe_code,
    reason = "the kernels and the gemm crate take raw pointers; bounds are checked before each call"
)]

mod kernel;
mod pack;
mod product;
mod transpose;

use candle_core::{CpuStorage, Layout, Storage, Tensor};
use gemm::Parallelism;
use serde::{Deserialize, Serialize};

pub(crate) use kernel::COLUMNS as PANEL_COLUMNS;
pub(crate) use pack::Left;
pub(crate) use product::{Output, add_transposed, product};

use crate::Result;
use crate::ops::bail;

/// The type of a product's operands; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// As they are stored.
    F32,
    /// Rounded to bf16, where the processor multiplies pairs of it: ask [`Compute::bf16`].
    Bf16,
}

impl Compute {
    /// bf16, where this processor has instructions for it.
    pub fn bf16() -> Option<Self> {
        (kernel::level() == kernel::Level::Avx512Bf16).then_some(Self::Bf16)
    }

    /// The faster one on this processor.
    pub fn fastest() -> Self {
        Self::bf16().filter(|_| kernel::bf16_is_faster()).unwrap_or(Self::F32)
    }

    /// Lanes that a depth of k values takes.
    fn lanes(self, k: usize) -> usize {
        match self {
            Self::F32 => k,
            Self::Bf16 => k.div_ceil(2),
        }
    }
}

/// A strided matrix over borrowed values.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// Storage from the first element on.
    pub values: &'a [f32],
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Elements between rows and between columns.
    pub strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    /// Row-major, `stride` elements from row to row.
    pub(crate) fn rows(values: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        Self { values, shape: (rows, columns), strides: (stride, 1) }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self { values: self.values, shape: (self.shape.1, self.shape.0), strides: (self.strides.1, self.strides.0) }
    }
}

/// Elements that a strided matrix spans, 0 when it is empty.
fn span(shape: (usize, usize), strides: (usize, usize)) -> usize {
    if shape.0 == 0 || shape.1 == 0 { 0 } else { (shape.0 - 1) * strides.0 + (shape.1 - 1) * strides.1 + 1 }
}

/// out = alpha · a b + beta · out on borrowed values; with `parallel`, on all threads of rayon's pool.
///
/// # Panics
/// If shapes do not fit each other, a matrix reaches beyond its values, or two elements of `out` share a place.
pub(crate) fn gemm_values(
    out: &mut [f32],
    out_strides: (usize, usize),
    (alpha, a, b, beta): (f32, Matrix<'_>, Matrix<'_>, f32),
    parallel: bool,
) {
    let ((m, k), (b_rows, n)) = (a.shape, b.shape);
    assert_eq!(k, b_rows, "inner dimensions differ");
    assert!(span((m, n), out_strides) <= out.len(), "output reaches beyond its values");
    assert!(span(a.shape, a.strides) <= a.values.len(), "left matrix reaches beyond its values");
    assert!(span(b.shape, b.strides) <= b.values.len(), "right matrix reaches beyond its values");
    let (rows, columns) = out_strides;
    let apart = (columns >= 1 && rows >= columns * n) || (rows >= 1 && columns >= rows * m) || m <= 1 || n <= 1;
    assert!(apart, "output elements overlap");
    if m == 0 || n == 0 {
        return;
    }
    // What stands in the output must not be multiplied by 0: it may be NaN.
    let keep = beta != 0.0;
    let threads = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: every index that gemm forms is i·row_stride + j·column_stride with i, j inside the three shapes, at most
    // `span` − 1, which was just checked against each slice's length; the mutable slice cannot alias the others.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            columns as isize,
            rows as isize,
            keep,
            a.values.as_ptr(),
            a.strides.1 as isize,
            a.strides.0 as isize,
            b.values.as_ptr(),
            b.strides.1 as isize,
            b.strides.0 as isize,
            beta,
            alpha,
            false,
            false,
            false,
            threads,
        );
    }
}

/// out = alpha · a b + beta · out; `out` may be a view, `a` and `b` may be transposed or strided views of other storages.
///
/// # Errors
/// Tensors that are not two-dimensional f32 on the CPU, or whose shapes do not fit.
pub fn gemm(out: &Tensor, a: &Tensor, b: &Tensor, alpha: f32, beta: f32) -> Result<()> {
    let ((m, k), (b_rows, n)) = (a.dims2()?, b.dims2()?);
    if k != b_rows || out.dims2()? != (m, n) {
        bail!("gemm: {:?} = {:?} × {:?} does not fit", out.dims(), a.dims(), b.dims());
    }
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let (a, b) = (matrix(&a_storage, a_layout)?, matrix(&b_storage, b_layout)?);
    super::host_mut(out, |values| {
        gemm_values(values, (n, 1), (alpha, a, b, beta), true);
        Ok(())
    })
}

fn matrix<'a>(storage: &'a Storage, layout: &Layout) -> Result<Matrix<'a>> {
    let Storage::Cpu(CpuStorage::F32(values)) = storage else {
        bail!("gemm: expected f32 on the CPU");
    };
    let (dims, strides) = (layout.dims(), layout.stride());
    Ok(Matrix {
        values: &values[layout.start_offset()..],
        shape: (dims[0], dims[1]),
        strides: (strides[0], strides[1]),
    })
}

#[cfg(test)]
mod tests;
