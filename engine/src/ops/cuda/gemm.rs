//! Large matrix products through cuBLASLt: own output, strides, beta, and an addend that may lie elsewhere.
//!
//! out (M, N) = a op(b) + c, all row-major; a, b of one type, out and c of one type, sums in f32. cuBLAS reads
//! column-major matrices: it is given outᵀ = op(b)ᵀ op(a)ᵀ, which is the same bytes. The algorithm of each shape is the first that the
//! library's heuristic names, kept for later: the same build, library and GPU give the same bits.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;

use super::{Dtype, Gpu, Mat, failed};
use crate::{Error, Result};

/// Bytes that an algorithm may use beside its operands; cuBLAS wants 32 MiB on Hopper.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;

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

/// What is kept of a shape.
#[derive(Debug)]
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// a, b, c and out as cuBLAS sees them.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `plan`, used nowhere else.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// cuBLASLt on one GPU.
#[derive(Debug)]
pub(crate) struct Gemm {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
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
        let handle = result::create_handle().map_err(refused)?;
        // SAFETY: the context is current; the memory is freed in `drop`.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }.map_err(failed("allocating memory"))?;
        gpu.allocated_bytes.set(gpu.allocated_bytes.get() + WORKSPACE_BYTES);
        Ok(Self { handle, plans: HashMap::new(), workspace })
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
            let plan = self.plan(&key, product, out, c)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let [of_a, of_b, of_c, of_out] = plan.layouts;
        let (alpha, beta) = (1f32, if add.is_some() { 1f32 } else { 0.0 });
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: shapes and strides were checked against each other above, and each matrix lies in its buffer; the workspace is
        // this stream's alone.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
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
        let layout = |mat: Mat<'_>| {
            result::create_matrix_layout(kind(mat.dtype), mat.columns as u64, mat.rows as u64, mat.stride as i64)
        };
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
                .map_err(refused)?;
        let mut plan = Plan {
            description,
            layouts: [
                layout(product.a).map_err(refused)?,
                layout(product.b).map_err(refused)?,
                layout(c).map_err(refused)?,
                layout(out).map_err(refused)?,
            ],
            // SAFETY: plain numbers, set below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        let preference = result::create_matmul_pref().map_err(refused)?;
        // SAFETY: every object was made above; attributes are given with their own sizes.
        let found = unsafe {
            let transposed = i32::from(product.b_transposed);
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            result::set_matmul_desc_attribute(description, attribute, (&raw const transposed).cast(), 4)
                .map_err(refused)?;
            let bytes = WORKSPACE_BYTES;
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let mut set = result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), 8);
            let (of_a, of_b, of_c, of_out) = key.alignment;
            for (attribute, bytes) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_b),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_a),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, of_c),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, of_out),
            ] {
                set = set.and_then(|()| {
                    result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), 4)
                });
            }
            let [a, b, c, out] = plan.layouts;
            let found = set
                .and_then(|()| result::get_matmul_algo_heuristic(self.handle, description, b, a, c, out, preference));
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        plan.algorithm = found.map_err(refused)?.algo;
        Ok(plan)
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the stream was waited for by whoever drops this; handle and workspace are this object's alone.
        unsafe {
            let _ = result::destroy_handle(self.handle);
            let _ = driver::free_sync(self.workspace);
        }
    }
}

fn kind(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn refused(error: cudarc::cublaslt::result::CublasError) -> Error {
    Error::Device(format!("a matrix product: {error}"))
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
