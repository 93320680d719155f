//! Adds into the residual stream: out += x. Backward passes the gradient on unchanged, so it has no function of its own.
//!
//! Shapes: out and x alike, f32.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::{host, host_mut};

const CHUNK: usize = 1 << 14;

/// out += x, elementwise.
pub fn add(out: &Tensor, x: &Tensor) -> Result<()> {
    let x = host(x)?;
    host_mut(out, |out| {
        assert_eq!(out.len(), x.len(), "add: sizes differ");
        out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| {
            for (out, x) in out.iter_mut().zip(x) {
                *out += x;
            }
        });
        Ok(())
    })
}
