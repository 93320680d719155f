//! Text to tokens and back, as the model's own GGUF metadata says.
//!
//! Byte-level BPE (`tokenizer.ggml.model = gpt2`); agrees token for token with llama.cpp. `add_eos_token` is not read: what ends a
//! training row comes from the template, and a prompt has no end.

mod byte_level;
mod pre;
mod special;
mod stream;
#[cfg(test)]
mod tests;

use tokenizers::models::bpe::{BPE, Vocab};

use crate::files::shorten;
use crate::gguf::GgufFile;
use crate::{Error, Result};
use pre::Pre;
use special::{Fragment, Special};

pub use stream::TokenStream;

/// Texts of tokens that end a turn in the chat formats in use; where a vocabulary has one, generation stops at it.
const END_OF_TURN: [&str; 7] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>"];

/// What a GGUF file says about its tokenizer, key by key (`tokenizer.ggml.*`).
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    /// `model`: the algorithm.
    pub model: String,
    /// `pre`: how words are cut.
    pub pre: Option<String>,
    /// `tokens`: the text of each token.
    pub tokens: Vec<String>,
    /// `token_type`: the kind of each token; empty where the file has none.
    pub token_types: Vec<i32>,
    /// `merges`: pairs of texts, the first merged first.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
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
            bos: file.u32("tokenizer.ggml.bos_token_id")?,
            eos: file.u32("tokenizer.ggml.eos_token_id")?,
            eot: file.u32("tokenizer.ggml.eot_token_id")?,
            add_bos: file.bool("tokenizer.ggml.add_bos_token")?,
            chat_template: string("tokenizer.chat_template")?,
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
    Other,
}

impl Kind {
    fn from_gguf(number: i32) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            _ => Self::Other,
        }
    }
}

/// A model's tokenizer.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    specials: Vec<Special>,
    tokens: Vec<String>,
    token_bytes: Vec<Vec<u8>>,
    kinds: Vec<Kind>,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    stop_tokens: Vec<u32>,
    chat_template: Option<String>,
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
        if metadata.model != "gpt2" {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.model `{}` is not supported, supported: gpt2 (byte-level BPE)",
                shorten(&metadata.model)
            )));
        }
        let pre = Pre::named(metadata.pre.as_deref())?;
        let vocabulary = vocabulary(&metadata.tokens)?;
        let kinds = kinds(&metadata)?;
        let bos = special_id("bos_token_id", metadata.bos, &metadata.tokens)?;
        let eos = special_id("eos_token_id", metadata.eos, &metadata.tokens)?;
        let eot = special_id("eot_token_id", metadata.eot, &metadata.tokens)?;
        let ends = END_OF_TURN.iter().filter_map(|&text| vocabulary.get(text).copied());
        let mut stop_tokens: Vec<u32> = eos.into_iter().chain(eot).chain(ends).collect();
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let kinds: Vec<Kind> = kinds
            .into_iter()
            .enumerate()
            // A stop token that the file calls a normal one would be cut into words and never be recognised.
            .map(|(id, kind)| if stop_tokens.contains(&(id as u32)) { Kind::Control } else { kind })
            .collect();
        let token_bytes = token_bytes(&metadata.tokens, &kinds);
        let bpe = build_bpe(&pre, vocabulary, &metadata.merges)?;
        Ok(Self {
            bpe,
            specials: special::sorted(&metadata.tokens, &kinds),
            tokens: metadata.tokens,
            token_bytes,
            kinds,
            bos,
            eos,
            adds_bos: metadata.add_bos.unwrap_or(pre.adds_bos) && bos.is_some(),
            stop_tokens,
            chat_template: metadata.chat_template,
        })
    }

    /// The tokens of a text; no BOS is added. With `parse_special` the text of a control token becomes that token, otherwise
    /// it is text like any other. (Tokens that a user defined are found either way.)
    ///
    /// # Errors
    /// Only a fault in the tokenizer itself.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for fragment in special::partition(text, &self.specials, parse_special) {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => {
                    let encoding = self
                        .bpe
                        .encode_fast(text, false)
                        .map_err(|error| Error::Tokenizer(format!("cannot encode a text: {error}")))?;
                    ids.extend_from_slice(encoding.get_ids());
                }
            }
        }
        Ok(ids)
    }

    /// The text of tokens, control tokens left out; bytes that are no UTF-8 come out as U+FFFD.
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

    /// How many tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
}

fn vocabulary(tokens: &[String]) -> Result<Vocab> {
    if tokens.is_empty() {
        return Err(Error::Tokenizer("tokenizer.ggml.tokens is empty".into()));
    }
    let last = u32::try_from(tokens.len())
        .map_err(|_| Error::Tokenizer(format!("tokenizer.ggml.tokens has {} entries", tokens.len())))?;
    Ok(tokens.iter().cloned().zip(0..last).collect())
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

fn token_bytes(tokens: &[String], kinds: &[Kind]) -> Vec<Vec<u8>> {
    let alphabet = byte_level::Alphabet::new();
    let bytes = |(text, &kind): (&String, &Kind)| match kind {
        Kind::Normal => alphabet.decode(text).unwrap_or_else(|| text.as_bytes().to_vec()),
        Kind::Unknown | Kind::Control | Kind::UserDefined | Kind::Other => text.as_bytes().to_vec(),
    };
    tokens.iter().zip(kinds).map(bytes).collect()
}

fn build_bpe(pre: &Pre, vocabulary: Vocab, merges: &[String]) -> Result<tokenizers::Tokenizer> {
    if merges.is_empty() {
        return Err(Error::Tokenizer("tokenizer.ggml.merges is missing or empty".into()));
    }
    // Bytes without a token are dropped from a text, by llama.cpp and here: worth a word, once.
    let missing = (0..=0xF4u8).filter(|&b| !matches!(b, 0xC0 | 0xC1)).map(byte_level::byte_to_char);
    let missing = missing.filter(|c| !vocabulary.contains_key(c.to_string().as_str())).count();
    if missing > 0 {
        tracing::debug!(missing, "the vocabulary lacks tokens for some bytes, characters with such bytes are lost");
    }
    let merges = merges.iter().map(|merge| split_merge(merge, &vocabulary)).collect::<Result<Vec<_>>>()?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| Error::Tokenizer(format!("byte-level BPE: {error}")))?;
    let mut bpe = tokenizers::Tokenizer::new(model);
    bpe.with_pre_tokenizer(Some(pre.build()?));
    Ok(bpe)
}

/// The two texts of a merge, `Ġt he` for one; both and what they make must be tokens.
fn split_merge(merge: &str, vocabulary: &Vocab) -> Result<(String, String)> {
    // The space between the two is not the first character, which may be a space itself.
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let Some(space) = merge[first..].find(' ').map(|at| at + first) else {
        return Err(Error::Tokenizer(format!("tokenizer.ggml.merges: `{}` is not two texts", shorten(merge))));
    };
    let (left, right) = (&merge[..space], &merge[space + 1..]);
    for text in [left, right, &format!("{left}{right}")] {
        if !vocabulary.contains_key(text) {
            let (merge, text) = (shorten(merge), shorten(text));
            return Err(Error::Tokenizer(format!("tokenizer.ggml.merges: `{merge}` needs the token `{text}`")));
        }
    }
    Ok((left.to_owned(), right.to_owned()))
}
