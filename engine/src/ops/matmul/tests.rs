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

/// Sizes around the tile's 12 × 32 and its vectors; rows of 1,024 are too regular to be read in place.
const SIZES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (3, 5, 7),
    (12, 32, 16),
    (13, 33, 17),
    (37, 48, 64),
    (24, 100, 31),
    (5, 16, 3),
    (200, 70, 129),
    (14, 20, 1024),
];

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|index| (index * 7919 % 1009) as f32 / 504.0 - 1.0).collect()
}

/// Σ_k a[m][k] b[k][n] in f64.
fn naive(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let element = |at: usize| (0..k).map(|i| f64::from(a[at / n * k + i]) * f64::from(b[i * n + at % n])).sum();
    (0..m * n).map(element).collect()
}

fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-9);
    let error = found.iter().zip(expected).map(|(&x, y)| (f64::from(x) - y).powi(2)).sum::<f64>().sqrt();
    assert!(error <= tolerance * norm, "{what}: {error} of {norm}");
}

#[test]
fn packed_product_is_the_product_of_its_segments() {
    for size @ (m, n, k) in SIZES {
        for (compute, tolerance) in [(Some(Compute::F32), 1e-6), (Compute::bf16(), 6e-3)] {
            let Some(compute) = compute else {
                eprintln!("SKIPPED: this processor has no products of bf16");
                continue;
            };
            let (a, b, begun) = (values(m * k), values(k * n), values(m * n));
            // The right operand once by columns and once, from its transpose, by rows; two left segments.
            let transposed: Vec<f32> = (0..n * k).map(|at| b[at % k * n + at / k]).collect();
            // The kernel may read this one where it lies.
            let left = Left::of(Matrix::rows(&a, m, k, k), compute);
            let twice = Left::pack(Matrix::rows(&a, m, k, k), 2.0, compute);
            let mut out = begun.clone();
            let output = Output { values: &mut out, columns: n, alpha: 0.5, keep: true };
            product(&[&left, &twice], output, &|columns, panel| {
                panel.push_columns(&b, n, k, columns.start);
                panel.push_rows(&transposed[columns.start * k..columns.end * k], k, 1.0);
                Ok(())
            })
            .unwrap();
            let sums = naive(&a, &b, size);
            let expected: Vec<f64> = sums.iter().zip(&begun).map(|(sum, &x)| 1.5 * sum + f64::from(x)).collect();
            assert_near(&out, &expected, tolerance, &format!("{size:?} {compute:?}"));

            let mut fresh = vec![f32::NAN; m * n];
            let output = Output { values: &mut fresh, columns: n, alpha: 1.0, keep: false };
            product(&[&left], output, &|columns, panel| {
                panel.push_rows_with(k, |rows| {
                    rows.copy_from_slice(&transposed[columns.start * k..columns.end * k]);
                    Ok(())
                })
            })
            .unwrap();
            assert_near(&fresh, &sums, tolerance, &format!("{size:?} {compute:?} overwritten"));
        }
    }
}

#[test]
fn sum_over_tokens_adds_to_the_output() {
    for size @ (m, n, tokens) in [(1, 1, 1), (16, 100, 70), (100, 16, 300), (13, 7, 5), (8, 64, 257), (33, 33, 2)] {
        let (a, b, begun) = (values(tokens * m), values(tokens * n), values(m * n));
        let transposed: Vec<f32> = (0..m * tokens).map(|at| a[at % tokens * m + at / tokens]).collect();
        let mut out = begun.clone();
        add_transposed(&mut out, Matrix::rows(&a, tokens, m, m), Matrix::rows(&b, tokens, n, n), 0.25);
        let sums = naive(&transposed, &b, size);
        let expected: Vec<f64> = sums.iter().zip(&begun).map(|(sum, &x)| 0.25 * sum + f64::from(x)).collect();
        assert_near(&out, &expected, 1e-6, &format!("{size:?}"));
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (m, n, k) = (101, 77, 300);
    let (a, b) = (values(m * k), values(k * n));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut out, mut sums) = (vec![0.0; m * n], vec![0.0; m * n]);
            let left = Left::of(Matrix::rows(&a, m, k, k), Compute::F32);
            let output = Output { values: &mut out, columns: n, alpha: 1.0, keep: false };
            product(&[&left], output, &|columns, panel| {
                panel.push_columns(&b, n, k, columns.start);
                Ok(())
            })
            .unwrap();
            add_transposed(&mut sums, Matrix::rows(&a, k, m, m), Matrix::rows(&b, k, n, n), 1.0);
            (out, sums)
        })
    };
    assert_eq!(run(1), run(3));
    assert_eq!(run(1), run(16));
}

#[test]
fn every_level_of_the_processor_gives_the_same_sums() {
    let (m, n, depth) = (7, 32, 50);
    let (a, b) = (values(m * depth), values(depth * n));
    let expected = {
        let transposed: Vec<f32> = (0..m * depth).map(|at| a[at % depth * m + at / depth]).collect();
        naive(&transposed, &b, (m, n, depth))
    };
    for (level, function) in kernel::every_level(m, 2) {
        let mut out = vec![0.0; m * n];
        let tile = kernel::Tile {
            depth,
            a: a.as_ptr().cast(),
            a_step: m,
            b: b.as_ptr().cast(),
            b_step: n,
            c: out.as_mut_ptr(),
            c_step: n,
            alpha: 1.0,
            keep: false,
        };
        // SAFETY: the operands have `depth` steps of m and n values, the output m rows of n.
        unsafe { function(&tile) };
        assert_near(&out, &expected, 1e-6, &format!("{level:?}"));
    }
}
