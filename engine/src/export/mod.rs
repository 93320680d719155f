//! What a tuned model is taken away as: an adapter for PEFT or llama.cpp, or merged with its base as GGUF or safetensors.

mod gguf;
mod gguf_lora;
mod hf_config;
mod merge;
mod merged;
mod model_card;
mod ollama;
mod parity;
mod safetensors;
mod tokenizer_json;
mod tuned;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use serde::Serialize;

use crate::Result;
use crate::adapter::LoraParams;
use crate::gguf::GgufFile;
use crate::ops::host;
use crate::quant::BlockType;
use crate::spec::{LoraSpec, Target};

pub use gguf::merged_gguf;
pub use gguf_lora::{gguf_lora, read_gguf_lora};
pub use model_card::{ModelCard, TrainingFacts};
pub use parity::Certificate;
pub use tuned::{ExportKind, Exported, OnProgress, Tuned, Wanted, check_exportable};

/// How the matrices of an exported GGUF file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// 16-bit floating point.
    F16,
    /// 8-bit integers in blocks of 32 with a scale; F16 where a row is no multiple of 32.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl Quantization {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::F16, Self::Q8_0];

    /// The name in the API and in file names, `q8_0` for one.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// The quantization of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quantization| quantization.name() == name)
    }

    fn dtype(self) -> BlockType {
        match self {
            Self::F16 => BlockType::F16,
            Self::Q8_0 => BlockType::Q8_0,
        }
    }

    /// llama.cpp's number for `general.file_type`: most matrices are of this type.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q8_0 => 7,
        }
    }
}

/// The LoRA of one projection, in the base's own row order.
#[derive(Debug, Clone)]
pub struct Delta<'a> {
    /// A, (R, in), row-major.
    pub lora_a: Cow<'a, [f32]>,
    /// B, (out, R), row-major.
    pub lora_b: Cow<'a, [f32]>,
}

/// The LoRA of a layer's projection; asked for the targets alone, `None` where that layer has none.
pub type Deltas<'f, 'a> = &'f dyn Fn(usize, Target) -> Option<Delta<'a>>;

/// What goes into a merged file besides the LoRA's values.
#[derive(Debug, Clone, Copy)]
pub struct Merge<'a> {
    /// The frozen base.
    pub base: &'a GgufFile,
    /// Rank, scale and targets of the LoRA.
    pub lora: &'a LoraSpec,
    /// How matrices are stored.
    pub quantization: Quantization,
    /// Appended to the base's `general.name`, after a space.
    pub name_suffix: Option<&'a str>,
}

/// How far an export has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tensors done so far: each counts once when it is written and once when it has been read back.
    pub done: usize,
    /// Twice the tensors of the file.
    pub total: usize,
}

/// What was written, read back and found equal to the last bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// How matrices are stored.
    pub quantization: Quantization,
    /// Tensors of the file.
    pub tensors: usize,
    /// Tensors that a LoRA was merged into.
    pub merged_tensors: usize,
    /// Matrices stored as F16 because their rows are no multiple of a block.
    pub fallback_tensors: Vec<String>,
    /// Size of the file.
    pub size_bytes: u64,
}

/// Writes the base with a trained LoRA merged in, as [`merged_gguf`] does; the suffix sets its name off from the base's.
///
/// # Errors
/// As [`merged_gguf`].
pub fn merged_lora(
    base: &GgufFile,
    lora: &LoraParams,
    (quantization, name_suffix): (Quantization, Option<&str>),
    target: &Path,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<ExportReport>> {
    let mut copies = HashMap::new();
    for (layer, projection) in lora.projections() {
        let Some(pair) = lora.pair(layer, projection) else { continue };
        let copy = |matrix| Ok::<_, crate::Error>(Cow::Owned(host(matrix)?.to_vec()));
        copies.insert((layer, projection), Delta { lora_a: copy(&pair.lora_a)?, lora_b: copy(&pair.lora_b)? });
    }
    let borrow = |layer, projection| {
        let Delta { lora_a, lora_b } = copies.get(&(layer, projection))?;
        Some(Delta { lora_a: Cow::Borrowed(lora_a), lora_b: Cow::Borrowed(lora_b) })
    };
    let merge = Merge { base, lora: lora.layout().spec(), quantization, name_suffix };
    merged_gguf(&merge, &borrow, target, on_progress)
}

#[cfg(test)]
mod tests;
