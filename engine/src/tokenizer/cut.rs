//! Cutting text into words, by hand: what llama.cpp's expressions say, in time linear in the text.
//!
//! A cut gives the first piece of a text; each piece is cut again by the next of a list. An expression engine that tracks back
//! gives up on a megabyte of white space; these never look further back than where they began.

use super::unicode::{LETTERS, NUMBERS, PUNCTUATION, Ranges};

/// One way to cut. The expression of each is what it does; what lies between two matches is a piece too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// `\p{N}`: each digit by itself.
    Digit,
    /// `\p{N}+`
    Number,
    /// `[0-9][0-9][0-9]`
    ThreeDigits,
    /// `[\p{P}\$\+<=>\^~\|]+`
    Punctuation,
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    Llama3 {
        /// Digits that stay together.
        digits: usize,
    },
    /// As `Llama3` with one digit and no contractions, `/` beside the line ends after symbols, and words that are cut where a
    /// small letter is followed by a capital one.
    Tekken,
}

/// Cuts a text by each of the list in turn and gives the pieces to `take`.
pub(super) fn cut<'a>(text: &'a str, cuts: &[Cut], take: &mut impl FnMut(&'a str)) {
    let Some((first, others)) = cuts.split_first() else { return take(text) };
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(first.first_piece(rest));
        cut(piece, others, take);
        rest = after;
    }
}

impl Cut {
    /// Bytes of the first piece of a text that is not empty.
    fn first_piece(self, text: &str) -> usize {
        match self {
            Self::Digit => match first_char(text) {
                digit if is_number(digit) => digit.len_utf8(),
                _ => run(text, |c| !is_number(c)),
            },
            Self::Number => match run(text, is_number) {
                0 => run(text, |c| !is_number(c)),
                numbers => numbers,
            },
            Self::ThreeDigits => three_digits(text),
            Self::Punctuation => match run(text, is_punctuation) {
                0 => run(text, |c| !is_punctuation(c)),
                punctuation => punctuation,
            },
            Self::Gpt2 => gpt2(text),
            Self::Llama3 { digits } => llama3(text, digits),
            Self::Tekken => tekken(text),
        }
    }
}

fn gpt2(text: &str) -> usize {
    let contraction = contraction(text, false);
    if contraction > 0 {
        return contraction;
    }
    let space = usize::from(text.starts_with(' '));
    for class in [is_letter, is_number, is_symbol] {
        let length = run(&text[space..], class);
        if length > 0 {
            return space + length;
        }
    }
    white_space(text)
}

fn llama3(text: &str, digits: usize) -> usize {
    let contraction = contraction(text, true);
    if contraction > 0 {
        return contraction;
    }
    let prefix = prefix(text);
    let letters = run(&text[prefix..], is_letter);
    if letters > 0 {
        return prefix + letters;
    }
    let numbers: usize = text.chars().take(digits).take_while(|&c| is_number(c)).map(char::len_utf8).sum();
    if numbers > 0 {
        return numbers;
    }
    symbols(text, &['\r', '\n']).or_else(|| line_ends(text)).unwrap_or_else(|| white_space(text))
}

fn tekken(text: &str) -> usize {
    let prefix = prefix(text);
    let word = two_cases(&text[prefix..]);
    if word > 0 {
        return prefix + word;
    }
    let first = first_char(text);
    if is_number(first) {
        return first.len_utf8();
    }
    symbols(text, &['\r', '\n', '/']).or_else(|| line_ends(text)).unwrap_or_else(|| white_space(text))
}

/// Letters but a–z and then letters but A–Z, at least one of the latter if that can be.
fn two_cases(text: &str) -> usize {
    let upper = run(text, |c| is_letter(c) && !c.is_ascii_lowercase());
    let lower = |from: usize| run(&text[from..], |c| is_letter(c) && !c.is_ascii_uppercase());
    let after = lower(upper);
    if after > 0 {
        return upper + after;
    }
    // None follow: letters of no case count as either, so the last of them ends the word.
    let last_caseless = text[..upper].char_indices().rfind(|(_, c)| !c.is_ascii_uppercase());
    last_caseless.map_or(upper, |(at, c)| at + c.len_utf8())
}

/// Bytes of an English contraction at the start, its apostrophe included.
fn contraction(text: &str, any_case: bool) -> usize {
    let bytes = text.as_bytes();
    if bytes.first() != Some(&b'\'') {
        return 0;
    }
    let letter = |at: usize| bytes.get(at).map(|byte| if any_case { byte.to_ascii_lowercase() } else { *byte });
    match (letter(1), letter(2)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => 2,
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => 3,
        _ => 0,
    }
}

/// Bytes of the character that may stand before a word: any but a line end, a letter or a number.
fn prefix(text: &str) -> usize {
    let first = first_char(text);
    if matches!(first, '\r' | '\n') || is_letter(first) || is_number(first) { 0 } else { first.len_utf8() }
}

/// A space, symbols, and what may follow them; `None` where there is no symbol.
fn symbols(text: &str, may_follow: &[char]) -> Option<usize> {
    let space = usize::from(text.starts_with(' '));
    let symbols = space + run(&text[space..], is_symbol);
    (symbols > space).then(|| symbols + run(&text[symbols..], |c| may_follow.contains(&c)))
}

/// White space up to the last line end in it; `None` where it has none.
fn line_ends(text: &str) -> Option<usize> {
    let white = &text[..run(text, char::is_whitespace)];
    white.rfind(['\r', '\n']).map(|at| at + 1)
}

/// White space without its last character where a word follows, which takes that one.
fn white_space(text: &str) -> usize {
    let white = run(text, char::is_whitespace);
    debug_assert!(white > 0, "every character is a letter, a number, white space or a symbol");
    let last = text[..white].chars().next_back().map_or(0, char::len_utf8);
    if white == text.len() || white == last { white } else { white - last }
}

fn three_digits(text: &str) -> usize {
    let is_three = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_digit);
    let bytes = text.as_bytes();
    match bytes.windows(3).position(is_three) {
        Some(0) => 3,
        Some(at) => at,
        None => text.len(),
    }
}

/// Bytes of the characters at the start that are of a class.
fn run(text: &str, is_of_class: impl Fn(char) -> bool) -> usize {
    text.find(|c| !is_of_class(c)).unwrap_or(text.len())
}

fn first_char(text: &str) -> char {
    text.chars().next().expect("a text that is cut is not empty")
}

fn is_letter(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_alphabetic() } else { is_in(c, LETTERS) }
}

fn is_number(c: char) -> bool {
    if c.is_ascii() { c.is_ascii_digit() } else { is_in(c, NUMBERS) }
}

/// Neither white space nor letter nor number.
fn is_symbol(c: char) -> bool {
    !(c.is_whitespace() || is_letter(c) || is_number(c))
}

fn is_punctuation(c: char) -> bool {
    matches!(c, '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|') || is_in(c, PUNCTUATION)
}

fn is_in(c: char, ranges: &Ranges) -> bool {
    let code = u32::from(c);
    let after = ranges.partition_point(|&(first, _)| first <= code);
    after.checked_sub(1).is_some_and(|at| code <= ranges[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'a>(text: &'a str, cuts: &[Cut]) -> Vec<&'a str> {
        let mut pieces = Vec::new();
        cut(text, cuts, &mut |piece| pieces.push(piece));
        pieces
    }

    #[test]
    fn words_are_cut_as_each_expression_says() {
        let cases: [(&[Cut], &str, &[&str]); 9] = [
            (&[Cut::Gpt2], "I'm 'S  two\n\n x!? ", &["I", "'m", " '", "S", " ", " two", "\n\n", " x", "!?", " "]),
            (&[Cut::Digit, Cut::Gpt2], "a  12", &["a", "  ", "1", "2"]),
            (&[Cut::Number, Cut::ThreeDigits], "x12345y", &["x", "123", "45", "y"]),
            (&[Cut::Punctuation], "a+b… $c", &["a", "+", "b", "…", " ", "$", "c"]),
            (&[Cut::Llama3 { digits: 3 }], "I'LL\t1234 \r\n x", &["I", "'LL", "\t", "123", "4", " \r\n", " x"]),
            (&[Cut::Llama3 { digits: 1 }], "12 a=b\n\nc", &["1", "2", " a", "=b", "\n\n", "c"]),
            (&[Cut::Llama3 { digits: 3 }], " ->\n\n  x", &[" ->\n\n", " ", " x"]),
            (&[Cut::Tekken], "camelCASEWord 12 a//\nb", &["camel", "CASEWord", " ", "1", "2", " a", "//\n", "b"]),
            (&[Cut::Tekken], "ABC 日本AB日", &["ABC", " 日本AB日"]),
        ];
        for (cuts, text, expected) in cases {
            assert_eq!(pieces(text, cuts), expected, "{cuts:?}");
        }
        assert_eq!(pieces("日本AB", &[Cut::Tekken]), ["日本", "AB"]);
    }

    #[test]
    fn a_megabyte_of_anything_is_cut_in_one_go() {
        let all = [Cut::Digit, Cut::Number, Cut::ThreeDigits, Cut::Punctuation, Cut::Gpt2, Cut::Tekken];
        for filling in [" ", "\n", "a", "1", ".", "\u{a0}", "é"] {
            let text = format!("x{}x", filling.repeat(1 << 20));
            for cuts in all.iter().map(std::slice::from_ref).chain([&[Cut::Llama3 { digits: 3 }][..]]) {
                assert_eq!(pieces(&text, cuts).concat(), text);
            }
        }
    }

    #[test]
    fn the_tables_are_in_order_and_agree_with_what_rust_knows() {
        for table in [LETTERS, NUMBERS, PUNCTUATION] {
            assert!(table.iter().all(|(first, last)| first <= last));
            assert!(table.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
        for c in '\0'..=char::MAX {
            assert!(!is_number(c) || c.is_numeric(), "{c:?} is no number");
            assert!(!is_letter(c) || c.is_alphabetic(), "{c:?} is no letter");
            assert!(!c.is_ascii_punctuation() || is_symbol(c), "{c:?} is a symbol");
        }
        assert!("aé日نआ한ʰⅨ".chars().all(|c| is_letter(c) || is_number(c)));
        assert!("\u{301}\u{200d}👋\u{ad}".chars().all(is_symbol));
    }
}
