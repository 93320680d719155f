//! SentencePiece as GGUF has it (`tokenizer.ggml.model = llama`): characters, merged into the token of the highest score.
//!
//! A space is written `▁`; a text begins with one where `add_space_prefix` says so. What is no token comes out as its bytes'
//! tokens, `<0x0A>` for one. Agrees token for token with llama.cpp, which differs from SentencePiece's own library where a
//! text follows a special token: there, too, a space is put before it.

use std::collections::HashMap;

use super::Vocabulary;
use super::merge::{Merged, NO_TOKEN, Pieces, Quick};
use crate::{Error, Result};

/// What stands for a space within a token.
const SPACE: &str = "\u{2581}";

/// A vocabulary with scores.
pub(super) struct SentencePiece {
    /// Tokens by their text, and the order in which they are made.
    tokens: HashMap<Vec<u8>, Merged, Quick>,
    /// The token of each byte that no other token holds.
    bytes: Vec<u32>,
    /// Bytes of the longest token.
    longest: usize,
    /// Whether a space is put before a text.
    pub(super) adds_space: bool,
}

impl SentencePiece {
    /// Builds it from a file's vocabulary, a score for each token, and what to do without a token for a byte.
    pub(super) fn new(vocabulary: &Vocabulary, scores: &[f32], adds_space: bool, unknown: Option<u32>) -> Result<Self> {
        if let Some(token) = scores.iter().position(|score| score.is_nan()) {
            return Err(Error::Tokenizer(format!("tokenizer.ggml.scores: the score of token {token} is no number")));
        }
        let entry = |(text, &token): (&&str, &u32)| {
            let order = scores.get(token as usize).map_or(0, |&score| order_of(score));
            (text.as_bytes().to_vec(), Merged { order, token })
        };
        let tokens: HashMap<_, _, Quick> = vocabulary.iter().map(entry).collect();
        let of_byte = |byte: u8| {
            let named = vocabulary.get(format!("<0x{byte:02X}>").as_str());
            let token = |found: &Merged| found.token;
            named.copied().or_else(|| tokens.get(&[byte][..]).map(token)).or(unknown).unwrap_or(NO_TOKEN)
        };
        let bytes: Vec<u32> = (0..=u8::MAX).map(of_byte).collect();
        let in_utf8 = (0..=0xF4usize).filter(|byte| !matches!(byte, 0xC0 | 0xC1));
        if let Some(byte) = in_utf8.into_iter().find(|&byte| bytes[byte] == NO_TOKEN) {
            let message = format!("tokenizer.ggml.tokens has neither `<0x{byte:02X}>` nor a token for what is unknown");
            return Err(Error::Tokenizer(message));
        }
        let longest = tokens.keys().map(Vec::len).max().unwrap_or(0);
        Ok(Self { tokens, bytes, longest, adds_space })
    }

    /// Adds the tokens of a text; `after_special` where it begins or follows a special token.
    pub(super) fn encode(&self, text: &str, after_special: bool, ids: &mut Vec<u32>) {
        let prefix = if self.adds_space && after_special { SPACE } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', SPACE));
        let bytes = text.as_bytes();
        let token = |piece: &[u8]| self.tokens.get(piece);
        let mut pieces = Pieces::default();
        let mut encoded = [0; 4];
        for c in text.chars() {
            let c = c.encode_utf8(&mut encoded).as_bytes();
            pieces.push(c.len(), token(c).map_or(NO_TOKEN, |found| found.token));
        }
        pieces.merge(|left, right| {
            let both = &bytes[left.start as usize..right.end as usize];
            if both.len() > self.longest { None } else { token(both).copied() }
        });
        for piece in pieces.iter() {
            match piece.token {
                NO_TOKEN => ids.extend(piece.of(bytes).iter().map(|&byte| self.bytes[usize::from(byte)])),
                token => ids.push(token),
            }
        }
    }
}

/// Scores as numbers that sort the other way round: the highest score comes first.
fn order_of(score: f32) -> u32 {
    // Adding zero makes of -0 the 0 that it equals. A set sign bit turns the order of the others.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { !bits & 0x7FFF_FFFF } else { bits }
}

/// The bytes of a normal token.
pub(super) fn text_of(token: &str) -> Vec<u8> {
    token.replace(SPACE, " ").into_bytes()
}

/// The byte that a token such as `<0x0A>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let are_digits = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if are_digits { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_score_has_the_lowest_order() {
        let scores = [f32::INFINITY, 7.5, 1e-30, 0.0, -1e-30, -1.0, -2.0, -1e10, f32::NEG_INFINITY];
        let orders: Vec<u32> = scores.iter().map(|&score| order_of(score)).collect();
        assert!(orders.is_sorted_by(|a, b| a < b), "{orders:?}");
        assert_eq!(order_of(0.0), order_of(-0.0));
    }

    #[test]
    fn byte_tokens_are_known_by_their_text() {
        assert_eq!((byte_of("<0x0A>"), byte_of("<0xff>")), (Some(10), Some(255)));
        assert!(["<0x>", "<0x123>", "0x0A", "<0xZZ>", "<0x+1>"].iter().all(|text| byte_of(text).is_none()));
    }
}
