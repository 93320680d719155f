//! What the optimizer remembers of past gradients, in f32 or in 8 bits.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::checkpoint::{File, Stored, damaged};
use crate::Result;
use crate::adapter::{LoraLayout, LoraParams};
use crate::ops::adamw::{self, Update};
use crate::ops::{adamw_8bit, host, tensor};
use crate::spec::Optimizer;

const VALUES: &str = "moments";
const CODES: &str = "moment_codes";
const FACTORS: &str = "moment_factors";
const SMALL: &str = "moments_of_small_tensors";

/// AdamW's moments.
#[derive(Debug)]
pub(super) enum Moments {
    /// (2, N).
    F32(Tensor),
    EightBit(adamw_8bit::Moments),
}

impl Moments {
    /// Before the first step.
    pub(super) fn zeros(optimizer: Optimizer, layout: &LoraLayout) -> Result<Self> {
        Ok(match optimizer {
            Optimizer::AdamW => Self::F32(Tensor::zeros((2, layout.len()), DType::F32, &Device::Cpu)?),
            Optimizer::AdamW8bit => Self::EightBit(adamw_8bit::Moments::zeros(&layout.tensors())),
        })
    }

    /// Bytes of the moments of a LoRA of that layout.
    pub(super) fn size_bytes(optimizer: Optimizer, layout: &LoraLayout) -> u64 {
        match optimizer {
            Optimizer::AdamW => 8 * layout.len() as u64,
            Optimizer::AdamW8bit => adamw_8bit::Moments::size_bytes(&layout.tensors()) as u64,
        }
    }

    /// Whether they can be those of a LoRA of that layout.
    pub(super) fn fit(&self, layout: &LoraLayout) -> bool {
        match self {
            Self::F32(values) => values.dims() == [2, layout.len()],
            Self::EightBit(moments) => moments.fit(&layout.tensors()),
        }
    }

    /// Moves the LoRA and the moments by one step.
    pub(super) fn step(&mut self, lora: &LoraParams, gradient: &Tensor, update: Update) -> Result<()> {
        match self {
            Self::F32(values) => adamw::step(lora.flat(), values, gradient, update),
            Self::EightBit(moments) => {
                adamw_8bit::step(lora.flat(), &lora.layout().tensors(), moments, gradient, update)
            }
        }
    }

    /// Whether every value is a number.
    pub(super) fn are_finite(&self) -> Result<bool> {
        match self {
            Self::F32(values) => Ok(are_finite(&host(values)?)),
            Self::EightBit(moments) => Ok(are_finite(&moments.factors) && are_finite(&moments.small)),
        }
    }

    /// As tensors of a checkpoint file.
    pub(super) fn stored(&self) -> Result<Vec<(&'static str, Stored<'_>)>> {
        Ok(match self {
            Self::F32(values) => vec![(VALUES, Stored::Tensor(host(values)?))],
            Self::EightBit(moments) => vec![
                (CODES, Stored::Codes(&moments.codes)),
                (FACTORS, Stored::Values(&moments.factors)),
                (SMALL, Stored::Values(&moments.small)),
            ],
        })
    }

    /// Out of a checkpoint file.
    pub(super) fn load(optimizer: Optimizer, file: &File<'_>) -> Result<Self> {
        match optimizer {
            Optimizer::AdamW => {
                let values = file.values(VALUES)?;
                let count = values.len() / 2;
                let whole = (values.len() == 2 * count).then_some(values).ok_or_else(|| damaged(VALUES))?;
                Ok(Self::F32(tensor(whole, (2, count))?))
            }
            Optimizer::AdamW8bit => {
                let (codes, factors, small) = (file.codes(CODES)?, file.values(FACTORS)?, file.values(SMALL)?);
                Ok(Self::EightBit(adamw_8bit::Moments { codes, factors, small }))
            }
        }
    }
}

/// Whether every value is a number.
pub(super) fn are_finite(values: &[f32]) -> bool {
    values.par_chunks(1 << 16).all(|values| values.iter().all(|value| value.is_finite()))
}
