//! One stream of text from a prompt: KV cache, greedy or sampled, text as it comes.

use std::ops::ControlFlow;

use candle_transformers::generation::{LogitsProcessor, Sampling};

use crate::adapter::LoraParams;
use crate::model::Llama;
use crate::tokenizer::{TokenStream, Tokenizer};
use crate::{Error, Result};

/// How the next token is chosen, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateSpec {
    /// Most tokens that are made, at least 1.
    pub max_tokens: usize,
    /// 0: the most likely token; above: logits are divided by it and drawn from.
    pub temperature: f64,
    /// Share of probability that the most likely tokens must reach to be drawn from, in (0, 1].
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
    /// The receiver broke off.
    Broken,
}

/// A finished text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Its text.
    pub text: String,
    /// Its tokens, the one that ended it not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Continues a prompt; `on_text` gets each piece as soon as it is whole characters.
///
/// # Errors
/// A sampling value out of its range, an empty prompt, or one that fills the model's context.
pub fn generate(
    model: &Llama,
    tokenizer: &Tokenizer,
    lora: Option<&LoraParams>,
    prompt: &[u32],
    spec: &GenerateSpec,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut sampler = LogitsProcessor::from_sampling(spec.seed, sampling(spec)?);
    let context = model.config().context_length;
    if prompt.is_empty() {
        return Err(Error::Model("an empty prompt has nothing to go on from".to_owned()));
    }
    if prompt.len() >= context {
        let message = format!("a prompt of {} tokens fills the model's context length {context}", prompt.len());
        return Err(Error::Model(message));
    }
    let room = spec.max_tokens.min(context - prompt.len());
    let mut cache = model.cache(prompt.len() + room)?;
    let mut stream = TokenStream::after(tokenizer, prompt.last().copied());
    let mut generated = Generated { text: String::new(), tokens: Vec::new(), finish_reason: FinishReason::Length };
    let mut logits = model.decode(prompt, &mut cache, lora)?;
    while generated.tokens.len() < room {
        let token = sampler.sample(&logits)?;
        if tokenizer.stop_tokens().contains(&token) {
            generated.finish_reason = FinishReason::Stop;
            break;
        }
        generated.tokens.push(token);
        if let Some(piece) = stream.push(token) {
            generated.text.push_str(&piece);
            if on_text(&piece).is_break() {
                generated.finish_reason = FinishReason::Broken;
                return Ok(generated);
            }
        }
        if generated.tokens.len() < room {
            logits = model.decode(&[token], &mut cache, lora)?;
        }
    }
    if let Some(rest) = stream.finish() {
        generated.text.push_str(&rest);
        let _ = on_text(&rest);
    }
    Ok(generated)
}

fn sampling(spec: &GenerateSpec) -> Result<Sampling> {
    let wrong = |field: &'static str, value: f64, right: &str| {
        let message = format!("{field} must be {right}, got `{value}`");
        Err(Error::Spec(crate::spec::SpecError { field, message }))
    };
    if spec.max_tokens == 0 {
        return wrong("max_tokens", 0.0, "at least 1");
    }
    if !(0.0..=10.0).contains(&spec.temperature) {
        return wrong("temperature", spec.temperature, "in [0, 10]");
    }
    if !(spec.top_p > 0.0 && spec.top_p <= 1.0) {
        return wrong("top_p", spec.top_p, "in (0, 1]");
    }
    Ok(match (spec.temperature, spec.top_p) {
        (temperature, _) if temperature < 1e-7 => Sampling::ArgMax,
        (temperature, 1.0) => Sampling::All { temperature },
        (temperature, p) => Sampling::TopP { p, temperature },
    })
}
