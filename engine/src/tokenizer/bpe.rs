//! Byte-level BPE (`tokenizer.ggml.model = gpt2`): words of bytes, merged by rank.

use std::collections::HashMap;

use super::byte_level::{Alphabet, byte_to_char};
use super::merge::{Merged, NO_TOKEN, Pieces, Quick};
use super::pre::Pre;
use super::{Vocabulary, cut};
use crate::files::shorten;
use crate::{Error, Result};

/// A byte-level BPE.
pub(super) struct Bpe {
    pre: Pre,
    /// The token of each byte.
    bytes: Vec<u32>,
    /// Tokens by their bytes; empty where nothing asks for whole words.
    words: HashMap<Vec<u8>, u32, Quick>,
    /// What a pair of tokens becomes.
    merges: HashMap<u64, Merged, Quick>,
}

impl Bpe {
    /// Builds it from a file's vocabulary and merges.
    pub(super) fn new(pre: Pre, vocabulary: &Vocabulary, merges: &[String]) -> Result<Self> {
        if merges.is_empty() {
            return Err(Error::Tokenizer("tokenizer.ggml.merges is missing or empty".into()));
        }
        let of_byte = |byte| vocabulary.get(byte_to_char(byte).to_string().as_str()).copied().unwrap_or(NO_TOKEN);
        let bytes: Vec<u32> = (0..=u8::MAX).map(of_byte).collect();
        let alphabet = Alphabet::new();
        let word = |(text, &token): (&&str, &u32)| Some((alphabet.decode(text)?, token));
        let words = if pre.ignore_merges { vocabulary.iter().filter_map(word).collect() } else { HashMap::default() };
        let mut pairs = HashMap::with_capacity_and_hasher(merges.len(), Quick::default());
        for (order, merge) in (0u32..).zip(merges) {
            let [left, right, token] = tokens_of_merge(merge, vocabulary)?;
            pairs.entry(pair(left, right)).or_insert(Merged { order, token });
        }
        Ok(Self { pre, bytes, words, merges: pairs })
    }

    /// Adds the tokens of a text.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut pieces = Pieces::default();
        cut::cut(text, self.pre.cuts, &mut |word| self.encode_word(word.as_bytes(), &mut pieces, ids));
    }

    /// Characters of a text that have a byte without a token: llama.cpp drops such bytes, and so does [`Bpe::encode`].
    pub(super) fn lost_characters(&self, text: &str) -> usize {
        let is_lost =
            |c: &char| c.encode_utf8(&mut [0; 4]).bytes().any(|byte| self.bytes[usize::from(byte)] == NO_TOKEN);
        text.chars().filter(is_lost).count()
    }

    fn encode_word(&self, word: &[u8], pieces: &mut Pieces, ids: &mut Vec<u32>) {
        if let Some(&token) = self.words.get(word) {
            return ids.push(token);
        }
        pieces.clear();
        word.iter().for_each(|&byte| pieces.push(1, self.bytes[usize::from(byte)]));
        pieces.merge(|left, right| self.merges.get(&pair(left.token, right.token)).copied());
        ids.extend(pieces.iter().map(|piece| piece.token).filter(|&token| token != NO_TOKEN));
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The two tokens of a merge, `Ġt he` for one, and what they make; all three must be in the vocabulary.
fn tokens_of_merge(merge: &str, vocabulary: &Vocabulary) -> Result<[u32; 3]> {
    // The space between the two is not the first character, which may be a space itself.
    let first = merge.chars().next().map_or(0, char::len_utf8);
    let Some(space) = merge[first..].find(' ').map(|at| at + first) else {
        return Err(Error::Tokenizer(format!("tokenizer.ggml.merges: `{}` is not two texts", shorten(merge))));
    };
    let (left, right) = (&merge[..space], &merge[space + 1..]);
    let token = |text: &str| {
        vocabulary.get(text).copied().ok_or_else(|| {
            let (merge, text) = (shorten(merge), shorten(text));
            Error::Tokenizer(format!("tokenizer.ggml.merges: `{merge}` needs the token `{text}`"))
        })
    };
    Ok([token(left)?, token(right)?, token(&format!("{left}{right}"))?])
}
