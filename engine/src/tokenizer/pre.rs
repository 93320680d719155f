//! How text is cut into words before BPE: a table by the name in `tokenizer.ggml.pre`.
//!
//! Source of the cuts: the expressions of llama.cpp's `llm_tokenizer_bpe`. There each expression of a list cuts the pieces that
//! those before it left, and what lies between two matches is a piece too. llama.cpp runs GPT-2's expression by hand and so
//! treats it as if it ended in `|\s+`; here it does.

use super::cut::Cut;
use crate::files::shorten;
use crate::{Error, Result};

/// A pre-tokenizer and what comes with its name.
#[derive(Debug)]
pub(super) struct Pre {
    /// How words are cut, one after the other.
    pub(super) cuts: &'static [Cut],
    /// A word that is a token is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a text starts with BOS where the file does not say.
    pub(super) adds_bos: bool,
}

impl Pre {
    /// The pre-tokenizer of that name; files from before the key existed have none and mean `default`.
    pub(super) fn named(name: Option<&str>) -> Result<Self> {
        let plain = |cuts| Self { cuts, ignore_merges: false, adds_bos: false };
        let whole_words = |cuts| Self { cuts, ignore_merges: true, adds_bos: true };
        Ok(match name.unwrap_or("default") {
            "default" => plain(&[Cut::Punctuation, Cut::Gpt2, Cut::Number, Cut::ThreeDigits]),
            "gpt-2" => plain(&[Cut::Gpt2]),
            "smollm" | "starcoder" | "minerva-7b" => plain(&[Cut::Digit, Cut::Gpt2]),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => whole_words(&[Cut::Llama3 { digits: 3 }]),
            "smaug-bpe" | "dbrx" => plain(&[Cut::Llama3 { digits: 3 }]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => plain(&[Cut::Llama3 { digits: 1 }]),
            "tekken" => whole_words(&[Cut::Tekken]),
            other => {
                let other = shorten(other);
                return Err(Error::Tokenizer(format!(
                    "pre-tokenizer `{other}` (tokenizer.ggml.pre) is not supported, supported: llama-bpe, smollm, gpt-2, \
                     default, tekken, qwen2, smaug-bpe, dbrx, starcoder, minerva-7b, falcon3, pixtral, megrez"
                )));
            }
        })
    }
}
