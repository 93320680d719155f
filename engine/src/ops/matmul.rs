//! Matrix product with own output, strides and beta: out = alpha · a b + beta · out.
//!
//! Shapes: a (M, K), b (K, N), out (M, N), any strides; storage and accumulation f32. Backward is the same function:
//! da = dout bᵀ and db = aᵀ dout, written into or added to the caller's buffer.
//!
//! On the CPU it calls the `gemm` crate directly: with AVX-512 it is about twice candle's own matmul, which also always
//! allocates and cannot accumulate. Work is split over rows and columns, never over K, so that the result does not depend on
//! the number of threads.
#![expect(unsafe_code, reason = "the gemm crate takes raw pointers; bounds are checked before each call")]

use candle_core::{CpuStorage, Layout, Storage, Tensor};
use gemm::Parallelism;

use crate::Result;
use crate::ops::bail;

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
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn close(left: &Tensor, right: &Tensor) -> f32 {
        (left - right).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn product_of_views_accumulates_into_a_view() {
        let device = Device::Cpu;
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (33, 17, 65), (64, 48, 16), (5, 3, 0)] {
            let a = Tensor::randn(0f32, 1.0, (k, m), &device).unwrap().t().unwrap();
            let b = Tensor::randn(0f32, 1.0, (n, k), &device).unwrap().t().unwrap();
            let buffer = Tensor::randn(0f32, 1.0, (m + 2, n), &device).unwrap();
            let out = buffer.narrow(0, 1, m).unwrap();
            let before = buffer.copy().unwrap();
            let product = if k == 0 {
                Tensor::zeros((m, n), candle_core::DType::F32, &device).unwrap()
            } else {
                a.contiguous().unwrap().matmul(&b.contiguous().unwrap()).unwrap()
            };
            let expected = ((product * 0.5).unwrap() + (before.narrow(0, 1, m).unwrap() * 2.0).unwrap()).unwrap();
            gemm(&out, &a, &b, 0.5, 2.0).unwrap();
            assert!(close(&out, &expected) < 1e-4, "{m} {n} {k}");
            assert_eq!(close(&buffer.narrow(0, 0, 1).unwrap(), &before.narrow(0, 0, 1).unwrap()), 0.0);
            assert_eq!(close(&buffer.narrow(0, m + 1, 1).unwrap(), &before.narrow(0, m + 1, 1).unwrap()), 0.0);
        }
    }

    #[test]
    fn beta_0_overwrites_even_nan() {
        let one = Tensor::ones((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let out = Tensor::full(f32::NAN, (2, 2), &Device::Cpu).unwrap().contiguous().unwrap();
        gemm(&out, &one, &one, 1.0, 0.0).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), [[2.0, 2.0], [2.0, 2.0]]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let make = |rows, columns| Tensor::zeros((rows, columns), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(gemm(&make(2, 2), &make(2, 3), &make(2, 2), 1.0, 0.0).is_err());
        assert!(gemm(&make(2, 3), &make(2, 3), &make(3, 2), 1.0, 0.0).is_err());
    }
}
