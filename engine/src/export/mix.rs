//! Which block type every tensor of an exported file gets: the mixes of llama.cpp, with their fall-backs.
//!
//! The choices are those of `llama-quantize` without options (src/llama-quant.cpp of llama.cpp), as far as a dense `llama` model
//! can ask for them. Only matrices called `….weight` that are no norms are chosen for; vectors, `rope_freqs.weight` among them,
//! stay as they are. Where input and output share one embedding, it counts as the output.

use serde::Serialize;

use crate::Result;
use crate::gguf::{GgufFile, TensorInfo, TensorSpec};
use crate::quant::BlockType;

/// How the matrices of an exported GGUF file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Quantization {
    /// 32-bit floating point.
    #[serde(rename = "f32")]
    F32,
    /// 16-bit floating point.
    #[serde(rename = "f16")]
    F16,
    /// 16-bit floating point with f32's range.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8 bits a weight.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 6 bits.
    #[serde(rename = "q6_k")]
    Q6K,
    /// 5 bits, half of the layers' most sensitive matrices 6.
    #[serde(rename = "q5_k_m")]
    Q5KM,
    /// 5 bits.
    #[serde(rename = "q5_k_s")]
    Q5KS,
    /// 5 bits in blocks of 32.
    #[serde(rename = "q5_0")]
    Q5_0,
    /// 4 bits, half of the layers' most sensitive matrices 6.
    #[serde(rename = "q4_k_m")]
    Q4KM,
    /// 4 bits, the first layers' most sensitive matrices 5.
    #[serde(rename = "q4_k_s")]
    Q4KS,
    /// 4 bits in blocks of 32.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 3 bits, the most sensitive matrices 4 and 5.
    #[serde(rename = "q3_k_m")]
    Q3KM,
    /// 2 bits, the more sensitive matrices 3 and 4.
    #[serde(rename = "q2_k")]
    Q2K,
}

impl Quantization {
    /// All there are, from the largest file to the smallest.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5KM,
        Self::Q5KS,
        Self::Q5_0,
        Self::Q4KM,
        Self::Q4KS,
        Self::Q4_0,
        Self::Q3KM,
        Self::Q2K,
    ];

    /// The name in the API and in file names, `q4_k_m` for one.
    pub fn name(self) -> &'static str {
        self.facts().0
    }

    /// The quantization of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quantization| quantization.name() == name)
    }

    /// llama.cpp's number for `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        self.facts().1
    }

    /// The type of most matrices.
    pub(super) fn main_type(self) -> BlockType {
        self.facts().2
    }

    fn facts(self) -> (&'static str, u32, BlockType) {
        match self {
            Self::F32 => ("f32", 0, BlockType::F32),
            Self::F16 => ("f16", 1, BlockType::F16),
            Self::Bf16 => ("bf16", 32, BlockType::BF16),
            Self::Q8_0 => ("q8_0", 7, BlockType::Q8_0),
            Self::Q6K => ("q6_k", 18, BlockType::Q6K),
            Self::Q5KM => ("q5_k_m", 17, BlockType::Q5K),
            Self::Q5KS => ("q5_k_s", 16, BlockType::Q5K),
            Self::Q5_0 => ("q5_0", 8, BlockType::Q5_0),
            Self::Q4KM => ("q4_k_m", 15, BlockType::Q4K),
            Self::Q4KS => ("q4_k_s", 14, BlockType::Q4K),
            Self::Q4_0 => ("q4_0", 2, BlockType::Q4_0),
            Self::Q3KM => ("q3_k_m", 12, BlockType::Q3K),
            Self::Q2K => ("q2_k", 10, BlockType::Q2K),
        }
    }
}

/// The tensors of an exported file, in the base's order.
pub(super) struct Plan {
    /// Every tensor with its type.
    pub(super) specs: Vec<TensorSpec>,
    /// Those whose rows did not fit the type that the mix has for them.
    pub(super) fallbacks: Vec<String>,
}

impl Plan {
    /// Chooses every tensor's type.
    ///
    /// # Errors
    /// [`crate::Error::Model`] where the base has a type that cannot be dequantized, or does not say what the mix depends on.
    pub(super) fn new(base: &GgufFile, quantization: Quantization) -> Result<Self> {
        let facts = Facts::new(base)?;
        let mut plan = Self { specs: Vec::new(), fallbacks: Vec::new() };
        for tensor in base.tensors() {
            let stored = tensor.dtype()?;
            let dtype = if !is_chosen_for(tensor) {
                stored
            } else {
                let wanted = facts.wanted(&tensor.name, tensor.columns(), quantization);
                let dtype = fitting(wanted, tensor.columns());
                if dtype != wanted {
                    plan.fallbacks.push(tensor.name.clone());
                }
                dtype
            };
            plan.specs.push(TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype });
        }
        Ok(plan)
    }
}

fn is_chosen_for(tensor: &TensorInfo) -> bool {
    tensor.rows() > 1 && tensor.name.ends_with("weight") && !tensor.name.contains("_norm.weight")
}

/// What a mix depends on besides a tensor's name.
struct Facts {
    layers: usize,
    /// Query heads that share a key and value head.
    heads_per_kv_head: u32,
    is_70b: bool,
    is_tied: bool,
}

impl Facts {
    fn new(base: &GgufFile) -> Result<Self> {
        let architecture = base.require_string("general.architecture")?;
        let number = |what: &str| base.u32(&format!("{architecture}.{what}"));
        let layers = base.require_u32(&format!("{architecture}.block_count"))? as usize;
        let heads = base.require_u32(&format!("{architecture}.attention.head_count"))?;
        let kv_heads = number("attention.head_count_kv")?.unwrap_or(heads).max(1);
        let is_tied = base.tensor("output.weight").is_none();
        Ok(Self { layers, heads_per_kv_head: heads / kv_heads, is_70b: layers == 80 && heads != kv_heads, is_tied })
    }

    /// The type that the mix has for a matrix, whether or not its rows fit it.
    fn wanted(&self, name: &str, columns: usize, quantization: Quantization) -> BlockType {
        let main = quantization.main_type();
        if !main.is_quantized() {
            return main;
        }
        if name == "output.weight" || (self.is_tied && name == "token_embd.weight") {
            let fits = columns.is_multiple_of(main.block_values());
            return if fits && main != BlockType::Q8_0 { BlockType::Q6K } else { BlockType::Q8_0 };
        }
        let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return main };
        let Ok(layer) = layer.parse::<usize>() else { return main };
        match part {
            "attn_v.weight" => self.values(layer, quantization),
            "attn_output.weight" => match quantization {
                Quantization::Q2K => BlockType::Q3K,
                Quantization::Q3KM => BlockType::Q4K,
                _ => main,
            },
            "ffn_down.weight" => self.down(layer, quantization),
            _ => main,
        }
    }

    /// attn_v: small, and a mistake in it is in every head.
    fn values(&self, layer: usize, quantization: Quantization) -> BlockType {
        let dtype = match quantization {
            Quantization::Q2K if self.heads_per_kv_head >= 4 => BlockType::Q4K,
            Quantization::Q2K => BlockType::Q3K,
            Quantization::Q3KM if layer < 2 => BlockType::Q5K,
            Quantization::Q3KM => BlockType::Q4K,
            Quantization::Q4KM | Quantization::Q5KM if self.takes_more_bits(layer) => BlockType::Q6K,
            Quantization::Q4KS if layer < 4 => BlockType::Q5K,
            _ => quantization.main_type(),
        };
        match dtype {
            BlockType::Q3K | BlockType::Q4K if self.is_70b => BlockType::Q5K,
            dtype => dtype,
        }
    }

    /// ffn_down, whose inputs have the widest range.
    fn down(&self, layer: usize, quantization: Quantization) -> BlockType {
        match quantization {
            Quantization::Q2K => BlockType::Q3K,
            Quantization::Q3KM if layer < self.layers / 16 => BlockType::Q5K,
            Quantization::Q3KM => BlockType::Q4K,
            Quantization::Q4KM | Quantization::Q5KM if self.takes_more_bits(layer) => BlockType::Q6K,
            Quantization::Q4KS if layer < self.layers / 8 => BlockType::Q5K,
            _ => quantization.main_type(),
        }
    }

    /// The first and the last eighth of the layers, and every third one between.
    fn takes_more_bits(&self, layer: usize) -> bool {
        let (layers, eighth) = (self.layers, self.layers / 8);
        layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
    }
}

/// The type itself where rows are a multiple of its block, else the one that takes its place.
fn fitting(wanted: BlockType, columns: usize) -> BlockType {
    let fits = |dtype: BlockType| columns.is_multiple_of(dtype.block_values());
    if fits(wanted) {
        return wanted;
    }
    let instead = match wanted {
        BlockType::Q2K | BlockType::Q3K => BlockType::Q4_0,
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        BlockType::F32
        | BlockType::F16
        | BlockType::BF16
        | BlockType::Q4_0
        | BlockType::Q4_1
        | BlockType::Q5_0
        | BlockType::Q5_1
        | BlockType::Q8_0
        | BlockType::IQ4NL => wanted,
    };
    if fits(instead) { instead } else { BlockType::F16 }
}
