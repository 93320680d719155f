//! What a `llama` model looks like: its shape and constants, read from GGUF metadata and checked.

use crate::files::shorten;
use crate::gguf::GgufFile;
use crate::ops::rope::RopeLayout;
use crate::spec::Target;
use crate::{Error, Result};

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Blocks, L.
    pub layers: usize,
    /// Hidden size, C.
    pub hidden: usize,
    /// Query heads, H.
    pub heads: usize,
    /// Key and value heads, KV.
    pub kv_heads: usize,
    /// Size of a head, D.
    pub head_dim: usize,
    /// Intermediate size of the MLP, F.
    pub intermediate: usize,
    /// Rows of the embedding table, V.
    pub vocabulary: usize,
    /// Which elements of a head RoPE turns together.
    pub rope_layout: RopeLayout,
}

impl Shape {
    /// (out, in) of a projection's weight.
    pub fn projection(&self, target: Target) -> (usize, usize) {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match target {
            Target::QProj => (queries, self.hidden),
            Target::KProj | Target::VProj => (keys, self.hidden),
            Target::OProj => (self.hidden, queries),
            Target::GateProj | Target::UpProj => (self.intermediate, self.hidden),
            Target::DownProj => (self.hidden, self.intermediate),
        }
    }

    #[cfg(test)]
    pub(crate) fn tiny() -> Self {
        Self {
            layers: 2,
            hidden: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            intermediate: 64,
            vocabulary: 300,
            rope_layout: RopeLayout::Interleaved,
        }
    }
}

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Sizes.
    pub shape: Shape,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// RoPE angle of each pair of a head, radians a position.
    pub rope_frequencies: Vec<f64>,
    /// Tokens that the model was made for.
    pub context_length: usize,
}

impl Config {
    /// Reads a GGUF file's metadata.
    ///
    /// # Errors
    /// Another architecture, or a value that is missing, senseless or not supported; the message names the key.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let architecture = file.require_string("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::UnsupportedArchitecture(shorten(architecture)));
        }
        let size = |key: &str, most: usize| positive(file, key, most)?.ok_or_else(|| missing(key));
        let hidden = size("llama.embedding_length", 1 << 20)?;
        let heads = size("llama.attention.head_count", 1 << 14)?;
        let kv_heads = positive(file, "llama.attention.head_count_kv", 1 << 14)?.unwrap_or(heads);
        let head_dim = positive(file, "llama.attention.key_length", 1 << 14)?.unwrap_or(hidden / heads);
        let shape = Shape {
            layers: size("llama.block_count", 1 << 12)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: size("llama.feed_forward_length", 1 << 22)?,
            vocabulary: vocabulary(file)?,
            rope_layout: RopeLayout::Interleaved,
        };
        check_shape(file, &shape)?;
        let eps_key = "llama.attention.layer_norm_rms_epsilon";
        let rms_norm_eps = file.f32(eps_key)?.ok_or_else(|| missing(eps_key))?;
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(Error::Model(format!("{eps_key} must be in (0, 1), got `{rms_norm_eps}`")));
        }
        Ok(Self {
            rope_frequencies: rope_frequencies(file, head_dim)?,
            context_length: size("llama.context_length", 1 << 24)?,
            shape,
            rms_norm_eps,
        })
    }
}

/// Rows of the embedding table as the table itself has them: the key `vocab_size` may be missing.
fn vocabulary(file: &GgufFile) -> Result<usize> {
    let table = file.tensor("token_embd.weight");
    let table = table.ok_or_else(|| Error::Model("it has no tensor `token_embd.weight`".to_owned()))?;
    match table.shape[..] {
        [rows, _] if rows > 0 => Ok(rows),
        _ => Err(Error::Model(format!("`token_embd.weight` has shape {:?}, expected two dimensions", table.shape))),
    }
}

fn check_shape(file: &GgufFile, shape: &Shape) -> Result<()> {
    let wrong = |what: String| Err(Error::Model(what));
    if !shape.heads.is_multiple_of(shape.kv_heads) {
        return wrong(format!("{} heads are no multiple of {} kv heads", shape.heads, shape.kv_heads));
    }
    if !shape.head_dim.is_multiple_of(8) || shape.head_dim == 0 {
        return wrong(format!("head size must be a multiple of 8, got `{}`", shape.head_dim));
    }
    if let Some(length) = positive(file, "llama.attention.value_length", 1 << 14)?
        && length != shape.head_dim
    {
        return wrong(format!("llama.attention.value_length must be {}, got `{length}`", shape.head_dim));
    }
    if let Some(count) = positive(file, "llama.rope.dimension_count", 1 << 14)?
        && count != shape.head_dim
    {
        return wrong(format!("llama.rope.dimension_count must be the head size {}, got `{count}`", shape.head_dim));
    }
    if let Some(experts) = file.u32("llama.expert_count")?
        && experts != 0
    {
        return wrong(format!("llama.expert_count must be 0, got `{experts}`: mixtures of experts are not supported"));
    }
    Ok(())
}

/// base^(−2i/D) for each pair, divided by the `rope_freqs` factors (Llama 3.1's long contexts) or by a linear factor.
fn rope_frequencies(file: &GgufFile, head_dim: usize) -> Result<Vec<f64>> {
    let base = f64::from(file.f32("llama.rope.freq_base")?.unwrap_or(10_000.0));
    if !(base.is_finite() && base > 1.0) {
        return Err(Error::Model(format!("llama.rope.freq_base must be above 1, got `{base}`")));
    }
    let linear = linear_scaling(file)?;
    let factors = match file.tensor("rope_freqs.weight") {
        None => vec![1.0; head_dim / 2],
        Some(_) => super::weights::vector(file, "rope_freqs.weight", head_dim / 2)?,
    };
    if !(linear.is_finite() && linear > 0.0) || factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
        return Err(Error::Model("RoPE scaling factors must be above 0".to_owned()));
    }
    let pairs = factors.iter().enumerate();
    Ok(pairs.map(|(i, f)| base.powf(-2.0 * i as f64 / head_dim as f64) / (f64::from(*f) * linear)).collect())
}

/// What positions are divided by. As llama.cpp has it, scaling without a type is linear, an older key has the factor too, and
/// 0 stands for none.
fn linear_scaling(file: &GgufFile) -> Result<f64> {
    let factor = match file.f32("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => file.f32("llama.rope.scale_linear")?,
    };
    match file.string("llama.rope.scaling.type")? {
        Some("none") => Ok(1.0),
        None | Some("linear") => Ok(factor.filter(|&factor| factor != 0.0).map_or(1.0, f64::from)),
        Some(other) => {
            let message = format!("llama.rope.scaling.type must be none or linear, got `{}`", shorten(other));
            Err(Error::Model(message))
        }
    }
}

fn positive(file: &GgufFile, key: &str, most: usize) -> Result<Option<usize>> {
    match file.u64(key)? {
        None => Ok(None),
        Some(value) if value >= 1 && value <= most as u64 => Ok(Some(value as usize)),
        Some(value) => Err(Error::Model(format!("{key} must be from 1 to {most}, got `{value}`"))),
    }
}

fn missing(key: &str) -> Error {
    Error::Model(format!("{key} is missing"))
}
