//! Telling the format of a file by the keys of its rows.

use serde_json::{Map, Value};

use super::super::report::Format;
use crate::files::shorten;

/// The format of the first row that tells it, or what was found instead; `None` where there is no row to tell it.
pub(in super::super) fn detect<'a>(
    rows: impl Iterator<Item = &'a Map<String, Value>> + Clone,
) -> Option<Result<Format, String>> {
    if let Some(row) = rows.clone().find(|row| preference_key(row).is_some()) {
        return Some(Err(describe(row)));
    }
    if let Some(format) = rows.clone().find_map(of_row) {
        return Some(Ok(format));
    }
    rows.clone().next().map(|row| Err(describe(row)))
}

/// The key that makes a row one of preferences, of which a training on examples would learn the wrong half too.
pub(super) fn preference_key(row: &Map<String, Value>) -> Option<&'static str> {
    let keys = ["chosen", "rejected", "preferred_output", "non_preferred_output"];
    let labelled = || row.contains_key("completion") && row.get("label").is_some_and(Value::is_boolean);
    keys.into_iter().find(|&key| row.contains_key(key)).or_else(|| labelled().then_some("label"))
}

fn of_row(row: &Map<String, Value>) -> Option<Format> {
    let has = |key| row.contains_key(key);
    if has("messages") {
        Some(Format::Chat)
    } else if has("conversations") {
        Some(Format::Sharegpt)
    } else if has("instruction") {
        Some(Format::Alpaca)
    } else if (has("prompt") && has("completion")) || (has("input") && has("output")) {
        Some(Format::Completion)
    } else if has("output") {
        Some(Format::Alpaca)
    } else if has("text") {
        Some(Format::Text)
    } else {
        None
    }
}

/// What the keys of a row say to one who knows other formats.
fn describe(row: &Map<String, Value>) -> String {
    let keys: Vec<String> = row.keys().take(10).map(|key| format!("`{}`", shorten(key))).collect();
    let keys = if keys.is_empty() { "no keys".to_owned() } else { format!("keys {}", keys.join(", ")) };
    if preference_key(row).is_some() {
        return format!("a row has {keys} (this looks like preference data, which is not supported)");
    }
    let questions = ["question", "query", "prompt", "instruction", "input", "problem"];
    let answers = ["answer", "response", "completion", "output", "solution"];
    let find = |names: &[&'static str]| names.iter().copied().find(|&name| row.contains_key(name));
    match (find(&questions), find(&answers)) {
        (Some(question), Some(answer)) => format!(
            "the first has {keys} (name them: dataset.columns {{\"instruction\": \"{question}\", \"output\": \"{answer}\"}})"
        ),
        _ => format!("the first has {keys}"),
    }
}
