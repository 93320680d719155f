//! The alphabet of byte-level BPE: GPT-2 writes each of the 256 bytes as one printable character.
//!
//! Bytes that print in Latin-1 stand for themselves; the other 68, in order, are the characters from U+0100 on.

/// The character that stands for a byte.
pub(super) fn byte_to_char(byte: u8) -> char {
    if prints(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !prints(b)).count();
    char::from_u32(0x100 + rank as u32).expect("0x100 to 0x143 are characters")
}

/// The byte that each character of the alphabet stands for.
pub(super) struct Alphabet(Vec<Option<u8>>);

impl Alphabet {
    pub(super) fn new() -> Self {
        let mut bytes = vec![None; 0x144];
        for byte in 0..=255u8 {
            bytes[byte_to_char(byte) as usize] = Some(byte);
        }
        Self(bytes)
    }

    /// The bytes that a token's text stands for, or `None` where the text is not written in the alphabet.
    pub(super) fn decode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.0.get(c as usize).copied().flatten()).collect()
    }
}

fn prints(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let alphabet = Alphabet::new();
        for byte in 0..=255u8 {
            assert_eq!(alphabet.decode(&byte_to_char(byte).to_string()), Some(vec![byte]));
        }
        assert_eq!((byte_to_char(b' '), byte_to_char(b'\n')), ('Ġ', 'Ċ'));
        assert_eq!(alphabet.decode("<|x|> "), None);
    }
}
