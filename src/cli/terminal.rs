//! Texts of files that strangers made, fit for a terminal: what would steer it is shown instead of obeyed.

use std::borrow::Cow;

/// A text with every control character but line ends and tabs written out, and those that change the direction of writing.
pub fn printable(text: &str) -> Cow<'_, str> {
    written_out(text, |c| steers(c) && !matches!(c, '\n' | '\t'))
}

/// The same for a text that has to stay in its line.
pub fn in_line(text: &str) -> Cow<'_, str> {
    written_out(text, steers)
}

fn steers(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

fn written_out(text: &str, is_written_out: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_written_out) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_written_out(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_written_out() {
        let text = "a\u{1b}[31mb\r\n\tc\u{9b}2J \u{202e}d\u{7f} Größe 🦉";
        let shown = "a\\u{1b}[31mb\\u{d}\n\tc\\u{9b}2J \\u{202e}d\\u{7f} Größe 🦉";
        assert_eq!(printable(text), shown);
        assert_eq!(in_line(text), shown.replace('\n', "\\u{a}").replace('\t', "\\u{9}"));
        assert!(matches!(printable("plain\ntext"), Cow::Borrowed("plain\ntext")));
    }
}
