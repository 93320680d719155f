//! Text as it comes: tokens in, whole characters out.

use super::Tokenizer;

/// Turns generated tokens into text and holds back bytes that are not yet a whole character.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    pending: Vec<u8>,
    /// Whether a space that comes next is the tokenizer's and not the text's.
    begins: bool,
}

impl<'a> TokenStream<'a> {
    /// The stream of a text that begins.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self::after(tokenizer, None)
    }

    /// The stream of a text that goes on after tokens of which `last` is the last.
    pub fn after(tokenizer: &'a Tokenizer, last: Option<u32>) -> Self {
        Self { tokenizer, pending: Vec::new(), begins: tokenizer.begins_text(last) }
    }

    /// The text that this token completes, if it completes any. Control tokens have no text. Bytes that can no longer become
    /// a character come out as U+FFFD.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.tokenizer.is_control(id) {
            bytes = &[];
        } else if self.begins && self.tokenizer.adds_space() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.begins = self.tokenizer.begins_text(Some(id));
        self.pending.extend_from_slice(bytes);
        self.take(false)
    }

    /// The rest: bytes still held back, as U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        self.take(true)
    }

    fn take(&mut self, at_end: bool) -> Option<String> {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("checked just now"));
                    rest = bad;
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[length..];
                        }
                        None if at_end => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &[];
                            break;
                        }
                        None => break,
                    }
                }
            }
        }
        let held = rest.len();
        self.pending.drain(..self.pending.len() - held);
        (!text.is_empty()).then_some(text)
    }
}
