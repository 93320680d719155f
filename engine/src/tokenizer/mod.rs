//! Text to tokens and back, as the model's own GGUF metadata says.
//!
//! Byte-level BPE (`tokenizer.ggml.model = gpt2`) and SentencePiece (`llama`); both agree token for token with llama.cpp.
//! `add_eos_token` is not read: what ends a training row comes from the template, and a prompt has no end.

mod bpe;
mod byte_level;
mod cut;
mod merge;
mod pre;
mod sentence_piece;
mod special;
mod stream;
#[cfg(test)]
mod tests;
mod unicode;

use std::collections::HashMap;

use crate::files::shorten;
use crate::gguf::GgufFile;
use crate::{Error, Result};
use bpe::Bpe;
use pre::Pre;
use sentence_piece::SentencePiece;
use special::{Fragment, Special};

pub use stream::TokenStream;

/// Texts of tokens that end a turn in the chat formats in use; where a vocabulary has one, generation stops at it.
const END_OF_TURN: [&str; 8] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "</s>"];

/// Tokens by their text; of two tokens with one text, the later.
type Vocabulary<'a> = HashMap<&'a str, u32>;

/// What a GGUF file says about its tokenizer, key by key (`tokenizer.ggml.*`).
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    /// `model`: the algorithm.
    pub model: String,
    /// `pre`: how words are cut before BPE.
    pub pre: Option<String>,
    /// `tokens`: the text of each token.
    pub tokens: Vec<String>,
    /// `token_type`: the kind of each token; empty where the file has none.
    pub token_types: Vec<i32>,
    /// `merges`: pairs of texts, the first merged first; only of BPE.
    pub merges: Vec<String>,
    /// `scores`: of each token; the highest is made first. Only of SentencePiece; all 0 where the file has none.
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`: whether SentencePiece puts a space before a text.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`.
    pub tool_use_template: Option<String>,
}

impl Metadata {
    /// What a GGUF file says.
    ///
    /// # Errors
    /// A key that must be there and is not, or holds another type than it must.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let strings = |key| -> Result<Vec<String>> {
            Ok(file.strings(key)?.unwrap_or_default().into_iter().map(str::to_owned).collect())
        };
        let string = |key| -> Result<Option<String>> { Ok(file.string(key)?.map(str::to_owned)) };
        Ok(Self {
            model: file.require_string("tokenizer.ggml.model")?.to_owned(),
            pre: string("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?,
            token_types: file.i32s("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: strings("tokenizer.ggml.merges")?,
            scores: file.f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            bos: file.u32("tokenizer.ggml.bos_token_id")?,
            eos: file.u32("tokenizer.ggml.eos_token_id")?,
            eot: file.u32("tokenizer.ggml.eot_token_id")?,
            unknown: file.u32("tokenizer.ggml.unknown_token_id")?,
            add_bos: file.bool("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: file.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: string("tokenizer.chat_template")?,
            tool_use_template: string("tokenizer.chat_template.tool_use")?,
        })
    }
}

/// Kinds of token, as GGUF numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
    Other,
}

impl Kind {
    fn from_gguf(number: i32) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Other,
        }
    }
}

/// How a text without special tokens becomes tokens.
enum Algorithm {
    ByteLevel(Bpe),
    SentencePiece(SentencePiece),
}

/// A model's tokenizer.
pub struct Tokenizer {
    algorithm: Algorithm,
    specials: Vec<Special>,
    tokens: Vec<String>,
    token_bytes: Vec<Vec<u8>>,
    kinds: Vec<Kind>,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    stop_tokens: Vec<u32>,
    chat_template: Option<String>,
    tool_use_template: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// As [`Metadata::from_gguf`] and [`Tokenizer::new`], and more tokens than the embedding table has rows.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let tokenizer = Self::new(Metadata::from_gguf(file)?)?;
        let rows = file.tensor("token_embd.weight").map_or(0, |table| table.rows());
        if tokenizer.vocab_size() > rows {
            let message = format!("{} tokens do not fit an embedding table of {rows} rows", tokenizer.vocab_size());
            return Err(Error::Tokenizer(message));
        }
        Ok(tokenizer)
    }

    /// Builds the tokenizer that the metadata describe.
    ///
    /// # Errors
    /// An algorithm or pre-tokenizer that is not supported, or metadata that contradict themselves.
    pub fn new(metadata: Metadata) -> Result<Self> {
        let vocabulary = vocabulary(&metadata.tokens)?;
        let special = |key, id| special_id(key, id, &metadata.tokens);
        let (bos, eos) = (special("bos_token_id", metadata.bos)?, special("eos_token_id", metadata.eos)?);
        let (eot, unknown) = (special("eot_token_id", metadata.eot)?, special("unknown_token_id", metadata.unknown)?);
        let ends = END_OF_TURN.iter().filter_map(|&text| vocabulary.get(text).copied());
        let mut stop_tokens: Vec<u32> = eos.into_iter().chain(eot).chain(ends).collect();
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let kinds: Vec<Kind> = kinds(&metadata)?
            .into_iter()
            .zip(0..)
            // A stop token that the file calls a normal one would be cut into words and never be recognised.
            .map(|(kind, id)| if stop_tokens.contains(&id) { Kind::Control } else { kind })
            .collect();
        let (algorithm, adds_bos) = algorithm(&metadata, &vocabulary, unknown)?;
        Ok(Self {
            token_bytes: token_bytes(&metadata.tokens, &kinds, &algorithm),
            algorithm,
            specials: special::sorted(&metadata.tokens, &kinds),
            tokens: metadata.tokens,
            kinds,
            bos,
            eos,
            adds_bos: metadata.add_bos.unwrap_or(adds_bos) && bos.is_some(),
            stop_tokens,
            chat_template: metadata.chat_template,
            tool_use_template: metadata.tool_use_template,
        })
    }

    /// The tokens of a text; no BOS is added. With `parse_special` the text of a control token becomes that token, otherwise
    /// it is text like any other. (Tokens that a user defined are found either way.)
    ///
    /// # Errors
    /// A text of 4 GiB or more.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        self.encode_after(None, text, parse_special)
    }

    /// As [`Tokenizer::encode`], for a text that goes on after tokens of which `last` is the last: SentencePiece puts a space
    /// before a text only at its start and after a special token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_after(&self, last: Option<u32>, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        // Spaces may grow to three bytes.
        if text.len() >= u32::MAX as usize / 3 {
            return Err(Error::Tokenizer(format!("a text of {} bytes is too long for one piece", text.len())));
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut after_special = self.begins_text(last);
        for fragment in special::partition(text, &self.specials, parse_special) {
            match (fragment, &self.algorithm) {
                (Fragment::Token(id), _) => ids.push(id),
                (Fragment::Text(text), Algorithm::ByteLevel(bpe)) => bpe.encode(text, &mut ids),
                (Fragment::Text(text), Algorithm::SentencePiece(model)) => model.encode(text, after_special, &mut ids),
            }
            after_special = matches!(fragment, Fragment::Token(_));
        }
        Ok(ids)
    }

    /// Characters of a text that no token stands for, so that a model never sees them. Vocabularies that lack a byte are common
    /// (SmolLM2's has none for U+0004), but the bytes are rare.
    pub fn lost_characters(&self, text: &str) -> usize {
        match &self.algorithm {
            Algorithm::ByteLevel(bpe) => bpe.lost_characters(text),
            Algorithm::SentencePiece(_) => 0,
        }
    }

    /// Whether a text after that token is treated as one that begins.
    fn begins_text(&self, last: Option<u32>) -> bool {
        let kind = last.and_then(|id| self.kinds.get(id as usize));
        last.is_none() || matches!(kind, Some(Kind::Control | Kind::UserDefined | Kind::Unknown))
    }

    /// Whether a text that begins has a space before it which is not its own.
    fn adds_space(&self) -> bool {
        match &self.algorithm {
            Algorithm::ByteLevel(_) => false,
            Algorithm::SentencePiece(model) => model.adds_space,
        }
    }

    /// The text of tokens, control tokens left out; bytes that are no UTF-8 come out as U+FFFD. The space that SentencePiece
    /// puts before a text is left out too.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = TokenStream::new(self);
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.finish());
        text
    }

    /// The bytes that a token stands for; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.token_bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// The text of a token as the vocabulary has it (`<|im_end|>`, `Ġthe`).
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    /// Whether a token is a mark for the model and no text.
    pub fn is_control(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Control)
    }

    /// Whether a token is found by its text before words are cut.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(Kind::Control | Kind::Unknown | Kind::UserDefined))
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether the model expects BOS before a text.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens at which generation stops, in order of their ids.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// The model's chat template, a Jinja text.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The model's chat template for conversations in which functions can be called, where it has one of its own for them.
    pub fn tool_use_template(&self) -> Option<&str> {
        self.tool_use_template.as_deref()
    }

    /// How many tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
}

fn vocabulary(tokens: &[String]) -> Result<Vocabulary<'_>> {
    if tokens.is_empty() {
        return Err(Error::Tokenizer("tokenizer.ggml.tokens is empty".into()));
    }
    let last = u32::try_from(tokens.len())
        .map_err(|_| Error::Tokenizer(format!("tokenizer.ggml.tokens has {} entries", tokens.len())))?;
    Ok(tokens.iter().map(String::as_str).zip(0..last).collect())
}

/// The algorithm, and whether a text starts with BOS where the file does not say.
fn algorithm(metadata: &Metadata, vocabulary: &Vocabulary<'_>, unknown: Option<u32>) -> Result<(Algorithm, bool)> {
    match metadata.model.as_str() {
        "gpt2" => {
            let pre = Pre::named(metadata.pre.as_deref())?;
            let adds_bos = pre.adds_bos;
            Ok((Algorithm::ByteLevel(Bpe::new(pre, vocabulary, &metadata.merges)?), adds_bos))
        }
        "llama" => {
            let (scores, tokens) = (metadata.scores.len(), metadata.tokens.len());
            if scores != 0 && scores != tokens {
                return Err(Error::Tokenizer(format!(
                    "tokenizer.ggml.scores has {scores} entries, but tokenizer.ggml.tokens has {tokens}"
                )));
            }
            let adds_space = metadata.add_space_prefix.unwrap_or(true);
            let model = SentencePiece::new(vocabulary, &metadata.scores, adds_space, unknown)?;
            Ok((Algorithm::SentencePiece(model), true))
        }
        other => Err(Error::Tokenizer(format!(
            "tokenizer.ggml.model `{}` is not supported, supported: gpt2 (byte-level BPE), llama (SentencePiece)",
            shorten(other)
        ))),
    }
}

fn kinds(metadata: &Metadata) -> Result<Vec<Kind>> {
    let (tokens, types) = (metadata.tokens.len(), metadata.token_types.len());
    if types == 0 {
        return Ok(vec![Kind::Normal; tokens]);
    }
    if types != tokens {
        return Err(Error::Tokenizer(format!(
            "tokenizer.ggml.token_type has {types} entries, but tokenizer.ggml.tokens has {tokens}"
        )));
    }
    Ok(metadata.token_types.iter().map(|&number| Kind::from_gguf(number)).collect())
}

/// 4294967295 means that there is no such token.
fn special_id(key: &str, id: Option<u32>, tokens: &[String]) -> Result<Option<u32>> {
    match id {
        None | Some(u32::MAX) => Ok(None),
        Some(id) if (id as usize) < tokens.len() => Ok(Some(id)),
        Some(id) => Err(Error::Tokenizer(format!(
            "tokenizer.ggml.{key} is {id}, but the vocabulary has {} tokens",
            tokens.len()
        ))),
    }
}

fn token_bytes(tokens: &[String], kinds: &[Kind], algorithm: &Algorithm) -> Vec<Vec<u8>> {
    let alphabet = byte_level::Alphabet::new();
    let plain = |text: &str| text.as_bytes().to_vec();
    let bytes = |(text, &kind): (&String, &Kind)| match (kind, algorithm) {
        (Kind::Unknown | Kind::Control | Kind::UserDefined, _) => plain(text),
        (Kind::Normal, Algorithm::ByteLevel(_)) => alphabet.decode(text).unwrap_or_else(|| plain(text)),
        (Kind::Byte | Kind::Other, Algorithm::ByteLevel(_)) => plain(text),
        (Kind::Byte, Algorithm::SentencePiece(_)) => {
            sentence_piece::byte_of(text).map_or_else(|| plain(text), |byte| vec![byte])
        }
        (Kind::Normal | Kind::Other, Algorithm::SentencePiece(_)) => sentence_piece::text_of(text),
    };
    tokens.iter().zip(kinds).map(bytes).collect()
}
