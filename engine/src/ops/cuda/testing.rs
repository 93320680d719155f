//! What the parity tests share: a GPU or a skip that is said aloud, matrices with poisoned padding, and a comparison.

use std::rc::Rc;

use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{Buffer, Dtype, Gpu, Mat, devices};
use crate::testing::normal;

/// What padding is filled with: NaN in every type.
const POISON: u8 = 0xff;

/// The first GPU; without one the test says that it was skipped.
///
/// # Panics
/// Where there is one that cannot be used.
pub(crate) fn gpu() -> Option<Rc<Gpu>> {
    let found = devices().and_then(|all| all.first().map(|gpu| gpu.ordinal).ok_or_else(|| "no GPU".to_owned()));
    match found {
        Ok(ordinal) => Some(Gpu::new(ordinal).unwrap()),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            None
        }
    }
}

/// Random normal values, the same for the same seed.
pub(crate) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| normal(&mut random)).collect()
}

/// Values as the type holds them.
pub(crate) fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::F32 => values.to_vec(),
        Dtype::Bf16 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
    }
}

/// A matrix of a test in a buffer of its own, with rows that are further apart than they are long.
pub(crate) struct Held {
    buffer: Buffer,
    shape: (usize, usize),
    stride: usize,
    dtype: Dtype,
}

impl Held {
    /// NaN everywhere.
    pub(crate) fn poisoned(gpu: &Rc<Gpu>, shape: (usize, usize), stride: usize, dtype: Dtype) -> Self {
        let bytes = shape.0 * stride * dtype.bytes();
        let buffer = Buffer::of(gpu, &vec![POISON; bytes]).unwrap();
        Self { buffer, shape, stride, dtype }
    }

    /// Those values, row by row, and NaN between the rows.
    pub(crate) fn of(gpu: &Rc<Gpu>, values: &[f32], shape: (usize, usize), stride: usize, dtype: Dtype) -> Self {
        assert_eq!(values.len(), shape.0 * shape.1);
        let held = Self::poisoned(gpu, shape, stride, dtype);
        for (row, values) in values.chunks(shape.1.max(1)).enumerate() {
            let offset = row * stride * dtype.bytes();
            match dtype {
                Dtype::F32 => held.buffer.write(offset, values).unwrap(),
                Dtype::Bf16 => {
                    let bits: Vec<u16> = values.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
                    held.buffer.write(offset, &bits).unwrap();
                }
            }
        }
        held
    }

    /// The matrix.
    pub(crate) fn mat(&self) -> Mat<'_> {
        self.buffer.mat(0, self.shape, self.stride, self.dtype)
    }

    /// Its values, row by row.
    ///
    /// # Panics
    /// Where something was written between the rows.
    pub(crate) fn values(&self) -> Vec<f32> {
        let (size, row_bytes) = (self.dtype.bytes(), self.stride * self.dtype.bytes());
        let mut bytes = vec![0u8; self.shape.0 * row_bytes];
        self.buffer.read(0, &mut bytes).unwrap();
        let mut values = Vec::with_capacity(self.shape.0 * self.shape.1);
        for row in bytes.chunks(row_bytes.max(1)) {
            let (inside, padding) = row.split_at(self.shape.1 * size);
            assert!(padding.iter().all(|&byte| byte == POISON), "written beyond the row's end");
            values.extend(inside.chunks_exact(size).map(|bytes| match self.dtype {
                Dtype::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                Dtype::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            }));
        }
        values
    }
}

/// How far values may be from the reference, as a share of its norm.
pub(crate) fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-5,
        Dtype::Bf16 => 2e-2,
    }
}

/// Asserts that the difference's norm is within that share of the reference's.
pub(crate) fn assert_near(name: &str, ours: &[f32], reference: &[f32], tolerance: f64) {
    assert_eq!(ours.len(), reference.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(reference).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let scale = norm(&mut reference.iter().map(|value| f64::from(*value)));
    assert!(difference <= tolerance * scale.max(1e-3), "{name}: off by {difference:e} of {scale:e}");
}
