//! Large matrix products through cuBLASLt: own output, strides, beta, and an addend that may lie elsewhere.
//!
//! out (M, N) = a op(b) + c, all row-major; a, b of one type, out and c of one type, sums in f32. cuBLAS reads
//! column-major matrices: it is given outᵀ = op(b)ᵀ op(a)ᵀ, which is the same bytes. The algorithm of each shape is the first that the
//! library's heuristic names, kept for later: the same build, library and GPU give the same bits.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::result as driver;

use super::{Dtype, Gpu, Mat, failed};
use crate::{Error, Result};

/// Bytes that an algorithm may use beside its operands; cuBLAS wants 32 MiB on Hopper.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;

/// Shapes that are kept at a time: those of a hundred numbers of tokens.
const MOST_PLANS: usize = 4096;

/// A product's operands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a> {
    a: Mat<'a>,
    b: Mat<'a>,
    /// Take b's transpose.
    b_transposed: bool,
    /// What is added.
    add: Option<Mat<'a>>,
}

impl<'a> Product<'a> {
    /// a b.
    pub(crate) fn nn(a: Mat<'a>, b: Mat<'a>) -> Self {
        Self { a, b, b_transposed: false, add: None }
    }

    /// a bᵀ.
    pub(crate) fn nt(a: Mat<'a>, b: Mat<'a>) -> Self {
        Self { b_transposed: true, ..Self::nn(a, b) }
    }

    /// Added to that matrix, which may be the output.
    pub(crate) fn plus(self, c: Mat<'a>) -> Self {
        Self { add: Some(c), ..self }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    shape: (usize, usize, usize),
    b_transposed: bool,
    strides: (usize, usize, usize, usize),
    dtypes: (Dtype, Dtype),
    adds: bool,
    alignment: (u32, u32, u32, u32),
}

/// An object of cuBLASLt's, and how it is given back.
#[derive(Debug)]
struct Owned<T: Copy>(T, unsafe fn(T) -> std::result::Result<(), CublasError>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: made with its own way back, used nowhere else.
        let _ = unsafe { self.1(self.0) };
    }
}

type Layout = Owned<sys::cublasLtMatrixLayout_t>;

impl Layout {
    /// A matrix as cuBLAS sees it: its columns are our rows.
    fn new(mat: Mat<'_>) -> Result<Self> {
        let made =
            result::create_matrix_layout(kind(mat.dtype), mat.columns as u64, mat.rows as u64, mat.stride as i64);
        made.map(|layout| Self(layout, result::destroy_matrix_layout)).map_err(refused)
    }
}

/// What is kept of a shape.
#[derive(Debug)]
struct Plan {
    description: Owned<sys::cublasLtMatmulDesc_t>,
    /// Of a, b, c and out.
    layouts: [Layout; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt on one GPU.
#[derive(Debug)]
pub(crate) struct Gemm {
    // Before the handle: fields are dropped in this order.
    plans: HashMap<Key, Plan>,
    handle: Owned<sys::cublasLtHandle_t>,
    workspace: u64,
}

impl Gemm {
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        // SAFETY: looks for the library alone.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "CUDA's library libcublasLt.so is not there: is LD_LIBRARY_PATH set?".to_owned(),
            ));
        }
        let handle = Owned(result::create_handle().map_err(refused)?, result::destroy_handle);
        // SAFETY: the context is current; the memory is freed in `drop`.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }.map_err(failed("allocating memory"))?;
        gpu.allocated_bytes.set(gpu.allocated_bytes.get() + WORKSPACE_BYTES);
        Ok(Self { plans: HashMap::new(), handle, workspace })
    }

    pub(super) fn run(&mut self, gpu: &Gpu, out: Mat<'_>, product: Product<'_>) -> Result<()> {
        let Product { a, b, b_transposed, add } = product;
        let ((m, k), (b_rows, n)) = (a.shape(), if b_transposed { (b.columns, b.rows) } else { b.shape() });
        let fits = k == b_rows && out.shape() == (m, n) && a.dtype == b.dtype;
        let c = add.unwrap_or(out);
        assert!(fits && c.shape() == (m, n) && c.dtype == out.dtype, "gemm: {out:?} = {a:?} × {b:?} + {c:?}");
        if out.is_empty() {
            return Ok(());
        }
        assert!(k > 0, "gemm: a product of depth 0");
        let alignment = |mat: Mat<'_>| 1u32 << mat.pointer.trailing_zeros().min(8);
        let key = Key {
            shape: (m, n, k),
            b_transposed,
            strides: (a.stride, b.stride, c.stride, out.stride),
            dtypes: (a.dtype, out.dtype),
            adds: add.is_some(),
            alignment: (alignment(a), alignment(b), alignment(c), alignment(out)),
        };
        if !self.plans.contains_key(&key) {
            // Micro-batches of ever other numbers of tokens have ever other shapes.
            if self.plans.len() >= MOST_PLANS {
                self.plans.clear();
            }
            let plan = self.plan(&key, product, out, c)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let [of_a, of_b, of_c, of_out] = plan.layouts.each_ref().map(|layout| layout.0);
        let (alpha, beta) = (1f32, if add.is_some() { 1f32 } else { 0.0 });
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: shapes and strides were checked against each other above, and each matrix lies in its buffer; the workspace is
        // this stream's alone.
        unsafe {
            result::matmul(
                self.handle.0,
                plan.description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(b.pointer),
                of_b,
                pointer(a.pointer),
                of_a,
                pointer(c.pointer),
                of_c,
                pointer(out.pointer),
                of_out,
                &raw const plan.algorithm,
                pointer(self.workspace),
                WORKSPACE_BYTES,
                gpu.stream.cu_stream().cast(),
            )
        }
        .map_err(refused)
    }

    fn plan(&self, key: &Key, product: Product<'_>, out: Mat<'_>, c: Mat<'_>) -> Result<Plan> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let description = result::create_matmul_desc(compute, scale).map_err(refused)?;
        let description = Owned(description, result::destroy_matmul_desc);
        let layouts = [Layout::new(product.a)?, Layout::new(product.b)?, Layout::new(c)?, Layout::new(out)?];
        let preference = Owned(result::create_matmul_pref().map_err(refused)?, result::destroy_matmul_pref);
        let transposed = i32::from(product.b_transposed);
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the description was made above; the attribute is given with its own size.
        unsafe { result::set_matmul_desc_attribute(description.0, attribute, (&raw const transposed).cast(), 4) }
            .map_err(refused)?;
        // SAFETY: the preference was made above; each attribute is given with its own size.
        let prefer = |attribute, value: *const c_void, size| unsafe {
            result::set_matmul_pref_attribute(preference.0, attribute, value, size).map_err(refused)
        };
        let bytes = WORKSPACE_BYTES;
        prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), 8)?;
        let (of_a, of_b, of_c, of_out) = key.alignment;
        for (attribute, bytes) in [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_c),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
        ] {
            prefer(attribute, (&raw const bytes).cast(), 4)?;
        }
        let [of_a, of_b, of_c, of_out] = layouts.each_ref().map(|layout| layout.0);
        // SAFETY: every object was made above.
        let found = unsafe {
            let (handle, description) = (self.handle.0, description.0);
            result::get_matmul_algo_heuristic(handle, description, of_b, of_a, of_c, of_out, preference.0)
        };
        let algorithm = found.map_err(refused)?.algo;
        Ok(Plan { description, layouts, algorithm })
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: the stream was waited for by whoever drops this; the workspace is this object's alone.
        let _ = unsafe { driver::free_sync(self.workspace) };
    }
}

fn kind(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn refused(error: CublasError) -> Error {
    match error.0 {
        sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => super::out_of_memory(),
        _ => Error::Device(format!("a matrix product: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, assert_near, gpu, random, rounded, tolerance};
    use super::*;

    fn naive(
        a: &dyn Fn(usize, usize) -> f32,
        b: &dyn Fn(usize, usize) -> f32,
        (m, n, k): (usize, usize, usize),
    ) -> Vec<f32> {
        let element = |i, j| (0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum::<f64>() as f32;
        (0..m * n).map(|at| element(at / n, at % n)).collect()
    }

    #[test]
    fn products_of_strided_and_transposed_matrices_are_the_plain_ones() {
        let Some(gpu) = gpu() else { return };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for (m, n, k) in [(1, 8, 8), (7, 16, 24), (64, 40, 136), (3, 128, 64)] {
                let (a, b, c) = (random(1, m * k), random(2, k * n), random(3, m * n));
                let (a, b, c) = (rounded(&a, dtype), rounded(&b, dtype), rounded(&c, dtype));
                let transpose = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                    (0..rows * columns).map(|at| x[(at % rows) * columns + at / rows]).collect()
                };
                let expected = naive(&|i, l| a[i * k + l], &|l, j| b[l * n + j], (m, n, k));
                let held = |values: &[f32], rows, columns| Held::of(&gpu, values, (rows, columns), columns + 8, dtype);
                let (straight_a, straight_b) = (held(&a, m, k), held(&b, k, n));
                let turned_b = held(&transpose(&b, k, n), n, k);
                for (out_dtype, product) in [
                    (dtype, Product::nn(straight_a.mat(), straight_b.mat())),
                    (dtype, Product::nt(straight_a.mat(), turned_b.mat())),
                    (Dtype::F32, Product::nt(straight_a.mat(), turned_b.mat())),
                ] {
                    let out = Held::poisoned(&gpu, (m, n), n + 16, out_dtype);
                    gpu.gemm("gemm", out.mat(), product).unwrap();
                    assert_near("product", &out.values(), &expected, tolerance(out_dtype));
                }
                let (out, added) = (Held::poisoned(&gpu, (m, n), n + 16, dtype), held(&c, m, n));
                let product = Product::nn(straight_a.mat(), straight_b.mat()).plus(added.mat());
                gpu.gemm("gemm", out.mat(), product).unwrap();
                let sum: Vec<f32> = expected.iter().zip(&c).map(|(x, c)| x + c).collect();
                assert_near("product and addend", &out.values(), &sum, tolerance(dtype));
            }
        }
    }
}
