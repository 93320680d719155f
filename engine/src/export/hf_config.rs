//! `config.json` and `generation_config.json` of a merged folder: what a GGUF file's metadata says, in Hugging Face's words.

use serde_json::{Value, json};

use super::safetensors::Float;
use crate::gguf::GgufFile;
use crate::model::Config;
use crate::model::weights::vector;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Context length that Llama 3.1's RoPE scaling is told against. Only its ratios to the other two parameters matter.
const LLAMA3_ORIGINAL_CONTEXT: f64 = 8192.0;

/// The two files' contents.
pub(super) struct Configs {
    pub(super) config: Value,
    pub(super) generation_config: Value,
}

impl Configs {
    /// Reads them off the base.
    ///
    /// # Errors
    /// [`Error::Model`] for RoPE factors that are not Llama 3's formula.
    pub(super) fn new(base: &GgufFile, config: &Config, tokenizer: &Tokenizer, float: Float) -> Result<Self> {
        let shape = &config.shape;
        let rope_theta = base.f32("llama.rope.freq_base")?.unwrap_or(10_000.0);
        let rope_scaling = rope_scaling(base, shape.head_dim, f64::from(rope_theta))?;
        let stops = tokenizer.stop_tokens();
        let pad = base.u32("tokenizer.ggml.padding_token_id")?.filter(|&id| (id as usize) < tokenizer.vocab_size());
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer.bos(),
            "eos_token_id": tokenizer.eos(),
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": config.context_length,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": pad,
            "pretraining_tp": 1,
            "rms_norm_eps": shortest(config.rms_norm_eps),
            "rope_scaling": rope_scaling,
            "rope_theta": shortest(rope_theta),
            "tie_word_embeddings": base.tensor("output.weight").is_none(),
            "torch_dtype": float.torch_name(),
            "use_cache": true,
            "vocab_size": shape.vocabulary,
        });
        let generation_config = json!({
            "bos_token_id": tokenizer.bos(),
            "eos_token_id": stops,
            "pad_token_id": pad,
        });
        Ok(Self { config, generation_config })
    }
}

/// The shortest decimal number that is this f32: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn rope_scaling(base: &GgufFile, head_dim: usize, rope_theta: f64) -> Result<Value> {
    let linear = match base.f32("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => base.f32("llama.rope.scale_linear")?,
    };
    let is_linear = base.string("llama.rope.scaling.type")?.is_none_or(|kind| kind == "linear");
    let linear = linear.filter(|&factor| is_linear && factor != 0.0 && factor != 1.0);
    let factors = match base.tensor("rope_freqs.weight") {
        Some(_) => vector(base, "rope_freqs.weight", head_dim / 2)?,
        None => Vec::new(),
    };
    let plain = factors.iter().all(|&factor| factor == 1.0);
    match (linear, plain) {
        (None, true) => Ok(Value::Null),
        (Some(factor), true) => Ok(json!({"rope_type": "linear", "factor": shortest(factor)})),
        (Some(_), false) => Err(Error::Model(
            "llama.rope.scaling.factor beside `rope_freqs.weight` cannot be told to Hugging Face".to_owned(),
        )),
        (None, false) => {
            let Llama3 { factor, low, high } = Llama3::from_factors(&factors, rope_theta).ok_or_else(|| {
                Error::Model(
                    "`rope_freqs.weight` does not follow Llama 3's formula, which config.json would have to name"
                        .to_owned(),
                )
            })?;
            Ok(json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT as u32,
            }))
        }
    }
}

/// Parameters of Llama 3's RoPE scaling: waves shorter than context / high stay, those longer than context / low are stretched
/// by `factor`, between them 1 / stretch is interpolated over context / wave length.
#[derive(Debug, PartialEq)]
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
}

impl Llama3 {
    /// The parameters that give these factors, to f32's last digits.
    fn from_factors(factors: &[f32], rope_theta: f64) -> Option<Self> {
        let factor = rounded(f64::from(factors.iter().copied().fold(1.0, f32::max)));
        let usual = Self { factor, low: 1.0, high: 4.0 };
        let fits = |candidate: &Self| candidate.gives(factors, rope_theta);
        if fits(&usual) {
            return Some(usual);
        }
        Self::fitted(factor, factors, rope_theta).filter(fits)
    }

    /// Solves for the bounds: the interpolated share is linear in context / wave length.
    fn fitted(factor: f64, factors: &[f32], rope_theta: f64) -> Option<Self> {
        let points = factors
            .iter()
            .enumerate()
            .filter(|&(_, &f)| f64::from(f) > 1.0 + 1e-6 && f64::from(f) < factor * (1.0 - 1e-6));
        let points: Vec<(f64, f64)> = points
            .map(|(pair, &f)| {
                let share = (1.0 / f64::from(f) - 1.0 / factor) / (1.0 - 1.0 / factor);
                (LLAMA3_ORIGINAL_CONTEXT / wave_length(pair, factors.len(), rope_theta), share)
            })
            .collect();
        let (&(x0, y0), &(x1, y1)) = (points.first()?, points.last()?);
        // share = (x − low) / (high − low)
        let slope = (y0 - y1) / (x0 - x1);
        let low = rounded(x0 - y0 / slope);
        Some(Self { factor, low, high: rounded(low + 1.0 / slope) })
            .filter(|found| found.low > 0.0 && found.high > found.low)
    }

    fn gives(&self, factors: &[f32], rope_theta: f64) -> bool {
        factors.iter().enumerate().all(|(pair, &found)| {
            let share = LLAMA3_ORIGINAL_CONTEXT / wave_length(pair, factors.len(), rope_theta);
            let share = ((share - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - share) / self.factor + share);
            (f64::from(found) / expected - 1.0).abs() < 1e-5
        })
    }
}

fn wave_length(pair: usize, pairs: usize, rope_theta: f64) -> f64 {
    std::f64::consts::TAU * rope_theta.powf(pair as f64 / pairs as f64)
}

/// The nearest thousandth where the value is within a thousandth of that.
fn rounded(value: f64) -> f64 {
    let near = (value * 1000.0).round() / 1000.0;
    if (near - value).abs() < 1e-6 * value.abs().max(1.0) * 10.0 { near } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The factors as Meta's code has them, in f32.
    fn factors(factor: f32, low: f32, high: f32, context: f32, theta: f32, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|pair| {
                let wave = 2.0 * std::f32::consts::PI * theta.powf(2.0 * pair as f32 / head_dim as f32);
                if wave < context / high {
                    1.0
                } else if wave > context / low {
                    factor
                } else {
                    let smooth = (context / wave - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect()
    }

    #[test]
    fn llama_3s_parameters_are_found_again() {
        for (factor, head_dim) in [(8.0, 128), (32.0, 64), (32.0, 128)] {
            let found = Llama3::from_factors(&factors(factor, 1.0, 4.0, 8192.0, 5e5, head_dim), 5e5);
            assert_eq!(found, Some(Llama3 { factor: f64::from(factor), low: 1.0, high: 4.0 }));
        }
        let other = factors(4.0, 2.0, 16.0, 16384.0, 1e4, 128);
        let found = Llama3::from_factors(&other, 1e4).expect("the formula");
        assert!((found.low - 1.0).abs() < 1e-3 && (found.high - 8.0).abs() < 1e-2, "{found:?}");
    }

    #[test]
    fn other_factors_are_no_llama_3() {
        let mut some = factors(8.0, 1.0, 4.0, 8192.0, 5e5, 128);
        some[40] *= 1.01;
        assert_eq!(Llama3::from_factors(&some, 5e5), None);
        assert_eq!(Llama3::from_factors(&[1.0, 3.0, 2.0, 1.5], 1e4), None);
    }
}
