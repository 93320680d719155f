//! What a tuned model is taken away as: an adapter for PEFT or llama.cpp, or merged with its base as GGUF or safetensors.

mod gguf;
mod gguf_lora;
mod hf_config;
mod merge;
mod merged;
mod mix;
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
use crate::spec::{LoraSpec, Target};

pub use gguf::merged_gguf;
pub use gguf_lora::{gguf_lora, read_gguf_lora};
pub use mix::Quantization;
pub use model_card::{ModelCard, TrainingFacts};
pub use parity::Certificate;
pub use tuned::{ExportKind, Exported, OnProgress, Tuned, Wanted, check_exportable};

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

/// What goes into merged files besides the LoRA's values.
#[derive(Debug, Clone, Copy)]
pub struct Merge<'a> {
    /// The frozen base.
    pub base: &'a GgufFile,
    /// Rank, scale and targets of the LoRA; without one the base is only stored in other types.
    pub lora: Option<&'a LoraSpec>,
    /// Appended to the base's `general.name`, after a space.
    pub name_suffix: Option<&'a str>,
}

/// How far an export has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tensors done so far: each counts once when it is written, and once for every file it has been read back from.
    pub done: usize,
    /// What `done` ends with.
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
    /// Matrices stored in another type than the quantization has for them, because their rows are no multiple of its block.
    pub fallback_tensors: Vec<String>,
    /// Size of the file.
    pub size_bytes: u64,
}

/// Writes the base with a trained LoRA merged in, a file for each quantization, as [`merged_gguf`] does; the suffix sets their
/// name off from the base's.
///
/// # Errors
/// As [`merged_gguf`].
pub fn merged_lora(
    base: &GgufFile,
    lora: &LoraParams,
    name_suffix: Option<&str>,
    outputs: &[(Quantization, &Path)],
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Vec<ExportReport>>> {
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
    let merge = Merge { base, lora: Some(lora.layout().spec()), name_suffix };
    merged_gguf(&merge, &borrow, outputs, on_progress)
}

#[cfg(test)]
mod tests;
