//! Finding the texts of special tokens in a text, longest first, as llama.cpp does.

use super::Kind;

/// A token that is found by its text before words are cut.
pub(super) struct Special {
    text: String,
    id: u32,
    /// Found only where the caller asks for special tokens.
    only_if_asked: bool,
}

/// A piece of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'a> {
    /// Text to be cut into words.
    Text(&'a str),
    /// A special token.
    Token(u32),
}

/// The special tokens of a vocabulary, longest text first.
pub(super) fn sorted(tokens: &[String], kinds: &[Kind]) -> Vec<Special> {
    let special = |((text, &kind), id): ((&String, &Kind), u32)| {
        let only_if_asked = match kind {
            Kind::Control | Kind::Unknown => true,
            Kind::UserDefined => false,
            Kind::Normal | Kind::Byte | Kind::Other => return None,
        };
        (!text.is_empty()).then(|| Special { text: text.clone(), id, only_if_asked })
    };
    let mut specials: Vec<Special> = tokens.iter().zip(kinds).zip(0..).filter_map(special).collect();
    specials.sort_by_key(|special| std::cmp::Reverse(special.text.len()));
    specials
}

/// Cuts a text at its special tokens.
pub(super) fn partition<'a>(text: &'a str, specials: &[Special], parse_special: bool) -> Vec<Fragment<'a>> {
    let mut fragments = Vec::new();
    if !text.is_empty() {
        fragments.push(Fragment::Text(text));
    }
    for special in specials.iter().filter(|special| parse_special || !special.only_if_asked) {
        let holds = |fragment: &Fragment<'_>| matches!(fragment, Fragment::Text(text) if text.contains(&special.text));
        if fragments.iter().any(holds) {
            fragments = fragments.into_iter().flat_map(|fragment| cut(fragment, special)).collect();
        }
    }
    fragments
}

fn cut<'a>(fragment: Fragment<'a>, special: &Special) -> Vec<Fragment<'a>> {
    let Fragment::Text(text) = fragment else { return vec![fragment] };
    let mut pieces = Vec::new();
    for (index, piece) in text.split(special.text.as_str()).enumerate() {
        if index > 0 {
            pieces.push(Fragment::Token(special.id));
        }
        if !piece.is_empty() {
            pieces.push(Fragment::Text(piece));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_specials_win_and_control_tokens_are_text_unless_asked_for() {
        let tokens: Vec<String> = ["<a>", "<a><b>", "<u>", "x"].map(String::from).to_vec();
        let specials = sorted(&tokens, &[Kind::Control, Kind::Control, Kind::UserDefined, Kind::Normal]);
        let asked = partition("x<a><b><a><u>y", &specials, true);
        use Fragment::{Text, Token};
        assert_eq!(asked, [Text("x"), Token(1), Token(0), Token(2), Text("y")]);
        assert_eq!(partition("x<a><u>", &specials, false), [Text("x<a>"), Token(2)]);
        assert_eq!(partition("", &specials, true), []);
    }
}
