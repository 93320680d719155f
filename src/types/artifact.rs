//! What a job leaves to take away: which files a caller may ask for, and those that are there.

use serde::{Deserialize, Serialize};

use super::ids::{ArtifactId, AttemptId, JobId};
use super::text::{stored_as_text, text_enum};

text_enum! {
    /// The kind of an artifact.
    pub enum ArtifactType {
        /// The LoRA as a folder that PEFT loads, in one `.tar`.
        Adapter = "adapter",
        /// Base model and LoRA merged, as one GGUF file.
        Gguf = "gguf",
        /// The LoRA as a GGUF file of its own, for `llama-cli --lora`.
        GgufLora = "gguf_lora",
        /// Base model and LoRA merged in 16-bit safetensors, the folder that transformers loads, in one `.tar`.
        Merged = "merged",
        /// A merged GGUF file and Ollama's Modelfile for it, in one `.tar`.
        Ollama = "ollama",
    }
}

text_enum! {
    /// How a GGUF file stores its matrices.
    pub enum Quantization {
        /// 32-bit floats.
        F32 = "f32",
        /// 16-bit floats.
        F16 = "f16",
        /// 16-bit floats with the range of 32-bit ones.
        Bf16 = "bf16",
        /// 8 bits a weight.
        Q8_0 = "q8_0",
        /// 6 bits.
        Q6K = "q6_k",
        /// 5 bits, more for the most sensitive matrices.
        Q5KM = "q5_k_m",
        /// 5 bits.
        Q5KS = "q5_k_s",
        /// 5 bits in blocks of 32.
        Q5_0 = "q5_0",
        /// 4 bits, more for the most sensitive matrices.
        Q4KM = "q4_k_m",
        /// 4 bits, more for the most sensitive matrices of the first layers.
        Q4KS = "q4_k_s",
        /// 4 bits in blocks of 32.
        Q4_0 = "q4_0",
        /// 3 bits, more for the most sensitive matrices.
        Q3KM = "q3_k_m",
        /// 2 bits, more for the most sensitive matrices.
        Q2K = "q2_k",
    }
}

impl Quantization {
    /// How a GGUF file stores its matrices where nothing is said about it.
    pub const DEFAULT: Self = Self::Q4KM;
}

impl ArtifactType {
    /// Whether it has a GGUF file whose matrices are stored in a way that the caller chooses.
    pub fn takes_quantization(self) -> bool {
        match self {
            Self::Gguf | Self::Ollama => true,
            Self::Adapter | Self::GgufLora | Self::Merged => false,
        }
    }
}

/// How close an artifact is to what was trained: both models' logits on the same few prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Parity {
    /// Prompts that both models saw.
    pub prompts: u32,
    /// Tokens of all prompts; each has a logit for every token of the vocabulary.
    pub positions: u32,
    /// The largest difference of two logits.
    pub largest_logit_difference: f64,
    /// The mean difference of two logits.
    pub mean_logit_difference: f64,
    /// The standard deviation of the trained model's logits at a position.
    pub logit_deviation: f64,
    /// Share of positions at which both models hold the same token for the most likely one.
    pub greedy_agreement: f64,
    /// The most that `mean_logit_difference` / `logit_deviation` may be for this type; what is beyond is not published.
    pub bound: f64,
}

impl std::fmt::Display for Parity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let json = serde_json::to_string(self).map_err(|_| std::fmt::Error)?;
        formatter.write_str(&json)
    }
}

impl std::str::FromStr for Parity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|error| format!("parity `{text}` cannot be read: {error}"))
    }
}

stored_as_text!(Parity);

/// An artifact that a job is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ArtifactRequest {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: ArtifactType,
    /// How the GGUF file of `gguf` and `ollama` stores its matrices, default q4_k_m; absent for the other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub quantization: Option<Quantization>,
}

/// A row of the table `artifact`.
#[derive(Debug, Clone, PartialEq)]
pub struct Artifact {
    /// Its id.
    pub id: ArtifactId,
    /// The job that made it.
    pub job_id: JobId,
    /// The attempt that made it.
    pub attempt_id: AttemptId,
    /// Its kind.
    pub kind: ArtifactType,
    /// How a GGUF file stores its matrices.
    pub quantization: Option<Quantization>,
    /// The name to save it under.
    pub filename: String,
    /// Where storage has the bytes.
    pub object_key: String,
    /// Number of bytes.
    pub size_bytes: i64,
    /// Hash of the bytes, in hexadecimal digits.
    pub sha256: String,
    /// How close it is to what was trained.
    pub parity: Option<Parity>,
    /// When it was made.
    pub created_at_ms: i64,
}
