//! The parity certificate: what an exported file computes, read back, against what the trained model computes.
//!
//! Both see the same prompts (fixed texts, rendered by the model's chat template where it takes them), and every logit of every
//! position is compared. A file whose logits are further away on average than its type explains is not published.

use std::fmt;

use candle_core::Tensor;
use serde::Serialize;

use super::Quantization;
use crate::adapter::LoraParams;
use crate::data::{ChatTemplate, Message, Role, chat_prompt};
use crate::model::Llama;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// What is asked, in ordinary prose, digits and another script.
const PROMPTS: [&str; 4] = [
    "Which three colours does a rainbow begin with?",
    "Add 17 and 26, then halve the sum.",
    "Write one line of Python that prints the word tide.",
    "Wie heißt der längste Fluss der Erde?",
];
/// Tokens of a prompt that are compared at most: a small model's tokens are single bytes.
const MAX_PROMPT_TOKENS: usize = 64;

/// What the comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Certificate {
    /// Prompts that both models saw.
    pub prompts: usize,
    /// Tokens of all prompts; each has a logit for every token of the vocabulary.
    pub positions: usize,
    /// The largest difference of two logits.
    pub largest_logit_difference: f64,
    /// The mean difference of two logits.
    pub mean_logit_difference: f64,
    /// The standard deviation of the trained model's logits about their mean at a position, to see the differences against.
    pub logit_deviation: f64,
    /// Share of positions at which both models hold the same token for the most likely one.
    pub greedy_agreement: f64,
    /// The most that `mean_logit_difference` / `logit_deviation` may be for a file of this type.
    pub bound: f64,
}

impl fmt::Display for Certificate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "logits differ by {:.2e} on average, {:.2e} at most (their deviation is {:.2}), {:.1} % the same greedy token at {} positions",
            self.mean_logit_difference,
            self.largest_logit_difference,
            self.logit_deviation,
            100.0 * self.greedy_agreement,
            self.positions
        )
    }
}

/// How far an adapter may be from the trained model: its values are the trained ones, but for the rounding of rsLoRA's scale.
pub(super) const ADAPTER_BOUND: f64 = 1e-5;
/// How far a model in f16 may be.
pub(super) const F16_BOUND: f64 = 0.02;
/// How far a model in bf16 may be.
pub(super) const BF16_BOUND: f64 = 0.1;

/// How far from the trained model a file may be: mean difference over deviation of the logits.
///
/// An adapter holds the trained values themselves. 16-bit floats and blocks of integers round every weight. Down to six bits the
/// bounds are several times what is measured on SmolLM2-135M (docs/LOG.md), and a file with one projection's rows in the wrong
/// order is beyond them. With fewer bits a small model, quantized before, may be as far off as unrelated logits are (1.1): there
/// the bound only finds what has gone out of all proportion.
pub(super) fn bound_of(quantization: Quantization) -> f64 {
    match quantization {
        Quantization::F32 => 1e-4,
        Quantization::F16 => F16_BOUND,
        Quantization::Bf16 => BF16_BOUND,
        Quantization::Q8_0 => 0.2,
        Quantization::Q6K => 0.4,
        Quantization::Q5KM | Quantization::Q5KS | Quantization::Q5_0 => COARSE_BOUND,
        Quantization::Q4KM | Quantization::Q4KS | Quantization::Q4_0 => COARSE_BOUND,
        Quantization::Q3KM | Quantization::Q2K => COARSE_BOUND,
    }
}

/// How far a model in five bits or fewer may be.
const COARSE_BOUND: f64 = 1.5;

/// The trained model's logits on the held prompts.
pub(super) struct Reference {
    prompts: Vec<Vec<u32>>,
    logits: Vec<Tensor>,
}

impl Reference {
    /// Computes them.
    ///
    /// # Errors
    /// A prompt that cannot be tokenized.
    pub(super) fn new(
        model: &Llama,
        lora: &LoraParams,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Self> {
        let prompts = PROMPTS.iter().map(|text| prompt(text, tokenizer, template)).collect::<Result<Vec<_>>>()?;
        let longest = MAX_PROMPT_TOKENS.min(model.config().context_length);
        let cut = |mut prompt: Vec<u32>| {
            prompt.truncate(longest);
            prompt
        };
        let prompts: Vec<Vec<u32>> = prompts.into_iter().map(cut).filter(|prompt| !prompt.is_empty()).collect();
        let logits = prompts.iter().map(|prompt| model.logits(prompt, Some(lora))).collect::<Result<_>>()?;
        Ok(Self { prompts, logits })
    }

    /// Compares with what came out of a file.
    ///
    /// # Errors
    /// [`Error::ReadBack`] where the two are further apart than `bound`, or a logit is no number.
    pub(super) fn certify(&self, model: &Llama, lora: Option<&LoraParams>, bound: f64) -> Result<Certificate> {
        let mut sums = Sums::default();
        for (prompt, expected) in self.prompts.iter().zip(&self.logits) {
            let (found, expected) = (model.logits(prompt, lora)?.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
            expected.iter().zip(&found).for_each(|(expected, found)| sums.add(expected, found));
        }
        let certificate = sums.certificate(self.prompts.len(), bound);
        // Written so that a logit that is no number fails as well.
        if certificate.mean_logit_difference <= bound * certificate.logit_deviation {
            return Ok(certificate);
        }
        Err(Error::ReadBack(format!(
            "it does not compute what was trained: {certificate}; on average at most {bound} deviations were expected"
        )))
    }
}

/// The text as a user's message, or as it stands where the template does not take it.
fn prompt(text: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Vec<u32>> {
    let messages = [Message::new(Role::User, text)];
    let rendered = template.map(|template| chat_prompt(&messages, template, tokenizer));
    match rendered {
        Some(Ok(tokens)) => Ok(tokens),
        Some(Err(_)) | None => {
            let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
            Ok(bos.into_iter().chain(tokenizer.encode(text, false)?).collect())
        }
    }
}

#[derive(Default)]
struct Sums {
    positions: usize,
    logits: usize,
    largest: f64,
    differences: f64,
    squares: f64,
    agreements: usize,
}

impl Sums {
    fn add(&mut self, expected: &[f32], found: &[f32]) {
        self.positions += 1;
        self.logits += expected.len();
        let mean = expected.iter().map(|&logit| f64::from(logit)).sum::<f64>() / expected.len() as f64;
        for (&expected, &found) in expected.iter().zip(found) {
            let difference = (f64::from(expected) - f64::from(found)).abs();
            self.differences += difference;
            self.largest = self.largest.max(difference);
            self.squares += (f64::from(expected) - mean).powi(2);
        }
        self.agreements += usize::from(most_likely(expected) == most_likely(found));
    }

    fn certificate(&self, prompts: usize, bound: f64) -> Certificate {
        let logits = self.logits.max(1) as f64;
        Certificate {
            prompts,
            positions: self.positions,
            largest_logit_difference: self.largest,
            mean_logit_difference: self.differences / logits,
            logit_deviation: (self.squares / logits).sqrt(),
            greedy_agreement: self.agreements as f64 / self.positions.max(1) as f64,
            bound,
        }
    }
}

fn most_likely(logits: &[f32]) -> usize {
    let larger = |best: usize, index: usize| if logits[index] > logits[best] { index } else { best };
    (0..logits.len()).fold(0, larger)
}
