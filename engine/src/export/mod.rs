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

use serde::Serialize;

use crate::gguf::GgufFile;
use crate::spec::{LoraSpec, Target};

pub use gguf::{merged_gguf, merged_gguf_bytes};
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
    /// Takes the place of the base's chat templates.
    pub chat_template: Option<&'a str>,
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

#[cfg(test)]
mod tests;
