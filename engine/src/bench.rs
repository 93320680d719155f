//! Timings of the training on a GPU: whole micro-steps on random weights of a well-known shape, and each kernel alone.

use std::str::FromStr;

use serde_json::Value;

use crate::Result;
use crate::device::Device;
use crate::model::Shape;
use crate::ops::rope::RopeLayout;
use crate::quant::BlockType;
use crate::spec::GradientCheckpointing;

/// What to time.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchSpec {
    /// The model whose shape the random weights have.
    pub shape: BenchShape,
    /// How the frozen projections are stored.
    pub quantization: BenchQuantization,
    /// Rank of the LoRA, on all seven projections.
    pub rank: u32,
    /// Rows of a micro-batch.
    pub micro_batch_size: u32,
    /// Tokens of each row; every one but a row's first is a target.
    pub max_seq_length: u32,
    /// Which activations are kept for the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// The GPU.
    pub device: Device,
    /// Micro-steps that are timed, after those that warm up; an optimizer step follows every fourth.
    pub micro_steps: u32,
    /// Whether dequantized projections stay in the GPU's memory, where they have room and no activation is computed again.
    pub dense_resident: bool,
    /// Most bytes of the GPU's memory that the run may take; `None`: what is free.
    pub memory_bytes: Option<u64>,
}

/// A model whose sizes are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchShape {
    /// Meta-Llama-3-8B.
    Llama3_8B,
    /// Llama-3.2-1B.
    Llama32_1B,
    /// Llama-3.2-3B.
    Llama32_3B,
    /// SmolLM2-135M.
    SmolLm2_135M,
    /// Meta-Llama-3-70B.
    Llama3_70B,
}

impl BenchShape {
    /// All there are.
    pub const ALL: [Self; 5] =
        [Self::Llama3_8B, Self::Llama32_1B, Self::Llama32_3B, Self::SmolLm2_135M, Self::Llama3_70B];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama3_8B => "llama-3-8b",
            Self::Llama32_1B => "llama-3.2-1b",
            Self::Llama32_3B => "llama-3.2-3b",
            Self::SmolLm2_135M => "smollm2-135m",
            Self::Llama3_70B => "llama-3-70b",
        }
    }

    /// The model's sizes, as its `config.json` has them.
    pub fn shape(self) -> Shape {
        let (layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary) = match self {
            Self::Llama3_8B => (32, 4096, 32, 8, 128, 14_336, 128_256),
            Self::Llama32_1B => (16, 2048, 32, 8, 64, 8192, 128_256),
            Self::Llama32_3B => (28, 3072, 24, 8, 128, 8192, 128_256),
            Self::SmolLm2_135M => (30, 576, 9, 3, 64, 1536, 49_152),
            Self::Llama3_70B => (80, 8192, 64, 8, 128, 28_672, 128_256),
        };
        let rope_layout = RopeLayout::HalfSplit;
        Shape { layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, rope_layout }
    }

    /// Whether the output projection is the embedding table.
    pub fn has_tied_embeddings(self) -> bool {
        match self {
            Self::Llama3_8B | Self::Llama3_70B => false,
            Self::Llama32_1B | Self::Llama32_3B | Self::SmolLm2_135M => true,
        }
    }
}

impl FromStr for BenchShape {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        one_of(&Self::ALL, |shape| shape.name().to_owned(), name)
    }
}

/// How a frozen projection is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchQuantization {
    /// bitsandbytes' NF4, double-quantized.
    Nf4,
    /// The same with factors in f32.
    Nf4Single,
    /// A type of GGUF files, or bf16.
    Blocks(BlockType),
}

impl BenchQuantization {
    /// All there are.
    pub fn all() -> Vec<Self> {
        [Self::Nf4, Self::Nf4Single].into_iter().chain(BlockType::ALL.map(Self::Blocks)).collect()
    }

    /// Its name on the command line, `q4_k` for one.
    pub fn name(self) -> String {
        match self {
            Self::Nf4 => "nf4".to_owned(),
            Self::Nf4Single => "nf4_single".to_owned(),
            Self::Blocks(dtype) => dtype.name().to_lowercase(),
        }
    }
}

impl FromStr for BenchQuantization {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        one_of(&Self::all(), |quantization| quantization.name(), name)
    }
}

fn one_of<T: Copy>(all: &[T], name_of: impl Fn(T) -> String, name: &str) -> Result<T, String> {
    let found = all.iter().copied().find(|&value| name_of(value) == name);
    found.ok_or_else(|| {
        let known: Vec<String> = all.iter().copied().map(name_of).collect();
        format!("must be one of {}, got `{name}`", known.join(", "))
    })
}

/// Times micro-steps of a training on random weights; one JSON object.
///
/// # Errors
/// A build without CUDA, a device that is no GPU of this machine, too little memory on it.
pub fn train(spec: &BenchSpec) -> Result<Value> {
    crate::ops::cuda::bench_train(spec)
}

/// Times each kernel against what its bytes or operations take at least; one JSON object a kernel and size.
///
/// # Errors
/// A build without CUDA, a device that is no GPU of this machine.
pub fn ops(device: Device) -> Result<Vec<Value>> {
    crate::ops::cuda::bench_ops(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_have_the_parameters_of_their_models() {
        for (shape, millions) in [
            (BenchShape::Llama3_8B, 8030),
            (BenchShape::Llama32_1B, 1236),
            (BenchShape::Llama32_3B, 3213),
            (BenchShape::SmolLm2_135M, 135),
            (BenchShape::Llama3_70B, 70_554),
        ] {
            let sizes = shape.shape();
            let weight = |target| {
                let (rows, columns) = sizes.projection(target);
                rows * columns
            };
            let block = crate::spec::Target::ALL.map(weight).iter().sum::<usize>() + 2 * sizes.hidden;
            let tables = if shape.has_tied_embeddings() { 1 } else { 2 } * sizes.vocabulary * sizes.hidden;
            assert_eq!((sizes.layers * block + tables + sizes.hidden + 500_000) / 1_000_000, millions, "{shape:?}");
        }
    }

    #[test]
    fn a_name_that_is_not_known_is_refused_with_those_that_are() {
        for shape in BenchShape::ALL {
            assert_eq!(shape.name().parse(), Ok(shape));
        }
        for quantization in BenchQuantization::all() {
            assert_eq!(quantization.name().parse(), Ok(quantization));
        }
        let shape = "llama-4".parse::<BenchShape>().unwrap_err();
        assert!(shape.contains("smollm2-135m") && shape.contains("`llama-4`"), "{shape}");
        let quantization = "int4".parse::<BenchQuantization>().unwrap_err();
        assert!(
            quantization.contains("nf4, nf4_single, f32, f16, bf16, q4_0") && quantization.contains("`int4`"),
            "{quantization}"
        );
    }
}
