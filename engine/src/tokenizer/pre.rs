//! How text is cut into words before BPE: a table by the name in `tokenizer.ggml.pre`.
//!
//! Source of the expressions: llama.cpp's `llm_tokenizer_bpe`. There each expression of a list cuts the pieces that those
//! before it left, and what lies between two matches is a piece too; that is a `Split` with behaviour `Isolated`. llama.cpp
//! runs GPT-2's expression by hand and so treats it as if it ended in `|\s+`; here it does.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::{Error, Result};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A pre-tokenizer and what comes with its name.
#[derive(Debug)]
pub(super) struct Pre {
    expressions: &'static [&'static str],
    /// A word that is a token is that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a text starts with BOS where the file does not say.
    pub(super) adds_bos: bool,
}

impl Pre {
    /// The pre-tokenizer of that name; files from before the key existed have none and mean `default`.
    pub(super) fn named(name: Option<&str>) -> Result<Self> {
        let plain = |expressions| Self { expressions, ignore_merges: false, adds_bos: false };
        match name.unwrap_or("default") {
            "smollm" => Ok(plain(&[r"\p{N}", GPT2])),
            "gpt-2" => Ok(plain(&[GPT2])),
            "default" => Ok(plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])),
            "llama-bpe" | "llama3" | "llama-v3" => {
                Ok(Self { expressions: &[LLAMA3], ignore_merges: true, adds_bos: true })
            }
            other => Err(Error::Tokenizer(format!(
                "pre-tokenizer `{other}` (tokenizer.ggml.pre) is not supported, supported: llama-bpe, smollm, gpt-2, default"
            ))),
        }
    }

    /// The same as a pre-tokenizer of the `tokenizers` crate, bytes mapped to their characters at the end.
    pub(super) fn build(&self) -> Result<Sequence> {
        let mut steps = Vec::with_capacity(self.expressions.len() + 1);
        for &expression in self.expressions {
            let pattern = SplitPattern::Regex(expression.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|error| Error::Tokenizer(format!("expression `{expression}`: {error}")))?;
            steps.push(PreTokenizerWrapper::Split(split));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
        Ok(Sequence::new(steps))
    }
}
