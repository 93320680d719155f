//! One file an op: its maths, its forward and backward side by side.
//!
//! Ops are free functions on candle tensors that read and write their storage directly, since candle's own ops allocate their
//! output, cannot accumulate into it, and keep an autograd graph. Parameter gradients accumulate (`+=`), activation gradients
//! overwrite, the residual stream adds; no output aliases a saved input.

pub mod adamw;
pub mod adamw_8bit;
pub mod add;
pub mod attention;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub mod cuda;
pub mod dropout;
pub mod embedding;
pub(crate) mod exp;
pub mod matmul;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use std::cell::RefCell;
use std::ops::Deref;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor};
use parking_lot::RwLockReadGuard;
use rayon::prelude::*;

use crate::Result;

/// Returns an error that says which shapes or types do not fit.
macro_rules! bail {
    ($($message:tt)*) => {
        return Err($crate::Error::Tensor(candle_core::Error::Msg(format!($($message)*))))
    };
}
pub(crate) use bail;

/// A contiguous f32 tensor's values, borrowed from its storage on the host.
///
/// While it lives, the storage is locked for reading: writing any view of the same storage would wait for ever.
pub(crate) struct Host<'a> {
    storage: RwLockReadGuard<'a, Storage>,
    start: usize,
    len: usize,
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
            _ => unreachable!("`host` let in f32 on the CPU only"),
        }
    }
}

/// Borrows the values of a contiguous f32 tensor on the CPU.
pub(crate) fn host(tensor: &Tensor) -> Result<Host<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        bail!("expected f32 on the CPU, got {:?} on {:?}", tensor.dtype(), tensor.device().location());
    }
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor, got {layout:?}");
    };
    Ok(Host { storage, start, len: end - start })
}

/// Lets `write` change the values of a contiguous f32 tensor on the CPU in place, for every view of its storage.
pub(crate) fn host_mut<R>(tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
    let op = Write { write: RefCell::new(Some(write)), result: RefCell::new(None) };
    tensor.inplace_op1(&op)?;
    op.result.into_inner().expect("candle calls the op of a tensor that it did not refuse")
}

struct Write<F, R> {
    write: RefCell<Option<F>>,
    result: RefCell<Option<Result<R>>>,
}

impl<F: FnOnce(&mut [f32]) -> Result<R>, R> InplaceOp1 for Write<F, R> {
    fn name(&self) -> &'static str {
        "host_mut"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("host_mut: expected f32");
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("host_mut: expected a contiguous tensor, got {layout:?}");
        };
        let write = self.write.borrow_mut().take().expect("candle calls an op once");
        *self.result.borrow_mut() = Some(write(&mut values[start..end]));
        Ok(())
    }
}

/// Wraps values as a tensor on the CPU without copying them.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &candle_core::Device::Cpu)?)
}

/// Runs work that forks and joins again and again on a thread of rayon's pool: from outside, each fork would wake a thread of the
/// pool and each join this one.
pub(crate) fn in_pool<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| run())
}

/// So many zeros; many of them are written by all threads.
pub(crate) fn zeros(count: usize) -> Vec<f32> {
    const TASK: usize = 1 << 16;
    if count <= 4 * TASK {
        return vec![0f32; count];
    }
    (0..count).into_par_iter().with_min_len(TASK).map(|_| 0f32).collect()
}

/// Rows of work that one thread takes at once; fixed, so that results do not depend on how many threads there are.
pub(crate) const ROWS_PER_TASK: usize = 16;

#[cfg(test)]
pub(crate) mod gradcheck;
