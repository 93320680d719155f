//! A row's JSON to messages: which format it is, and what is wrong with it.
//!
//! Fields that a format does not know are tolerated and counted in the report, because published data sets carry ids and
//! categories; fields that would change what is learnt (tools) are refused.

use serde_json::{Map, Value};

use super::report::{BadRowCode, Format, Problem};
use super::{Message, Role};
use crate::files::shorten;

/// A row that can be used.
#[derive(Debug)]
pub(super) struct Example {
    /// The conversation; the last message is the assistant's.
    pub(super) messages: Vec<Message>,
    /// Fields that were not looked at.
    pub(super) ignored: Vec<String>,
}

/// Parses a row's text.
pub(super) fn parse_json(text: &[u8]) -> Result<Map<String, Value>, (u64, Problem)> {
    if let Err(error) = std::str::from_utf8(text) {
        let message = format!("the text is no UTF-8 at byte {}", error.valid_up_to() + 1);
        return Err((0, Problem::new("", BadRowCode::InvalidUtf8, message).hint("save the file as UTF-8")));
    }
    match serde_json::from_slice(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let message = format!("the row is {}, not an object", type_name(&other));
            Err((0, Problem::new("", BadRowCode::NotAnObject, message)))
        }
        Err(error) => {
            let full = error.to_string();
            let what = full.split(" at line ").next().unwrap_or_default();
            let message = format!("invalid JSON at column {}: {what}", error.column());
            let problem = Problem::new("", BadRowCode::InvalidJson, message)
                .hint("each line holds one whole JSON object, or the file is one JSON array of objects");
            Err((error.line().saturating_sub(1) as u64, problem))
        }
    }
}

/// The format of the first row that tells it, or what was found instead; `None` where there is no row to tell it.
pub(super) fn detect<'a>(rows: impl Iterator<Item = &'a Map<String, Value>> + Clone) -> Option<Result<Format, String>> {
    let of = |row: &Map<String, Value>| {
        if row.get("messages").is_some() {
            Some(Format::Chat)
        } else if row.contains_key("instruction") || row.contains_key("output") {
            Some(Format::Alpaca)
        } else {
            None
        }
    };
    if let Some(format) = rows.clone().find_map(of) {
        return Some(Ok(format));
    }
    rows.clone().next().map(|row| Err(describe(row)))
}

/// What the keys of a row say to one who knows other formats.
fn describe(row: &Map<String, Value>) -> String {
    let has = |key| row.contains_key(key);
    let keys: Vec<String> = row.keys().take(10).map(|key| format!("`{}`", shorten(key))).collect();
    let keys = if keys.is_empty() { "no keys".to_owned() } else { format!("keys {}", keys.join(", ")) };
    let known = if has("chosen") || has("rejected") || has("preferred_output") {
        Some("preference data, which is not supported")
    } else if has("conversations") {
        Some("the sharegpt format, which is not supported yet")
    } else if has("prompt") && has("completion") {
        Some("the completion format, which is not supported yet")
    } else if has("text") {
        Some("plain text, which is not supported yet")
    } else {
        None
    };
    match known {
        Some(known) => format!("the first has {keys} (this looks like {known})"),
        None => format!("the first has {keys}"),
    }
}

/// Judges a row of a known format.
pub(super) fn parse_row(row: &Map<String, Value>, format: Format) -> Result<Example, Problem> {
    let other = match format {
        Format::Alpaca => row.contains_key("messages").then_some("messages"),
        Format::Chat => (!row.contains_key("messages") && row.contains_key("instruction")).then_some("instruction"),
    };
    if let Some(key) = other {
        let message = format!("the row has the key `{key}`, but the format of this file is {}", format.name());
        return Err(Problem::new("", BadRowCode::MixedFormat, message).hint("a file holds rows of one format"));
    }
    match format {
        Format::Alpaca => parse_alpaca(row),
        Format::Chat => parse_chat(row),
    }
}

fn parse_alpaca(row: &Map<String, Value>) -> Result<Example, Problem> {
    let instruction = filled_text(row, "instruction", "")?;
    let input = match row.get("input") {
        None | Some(Value::Null) => None,
        Some(Value::String(input)) => (!input.trim().is_empty()).then(|| input.clone()),
        Some(other) => return Err(wrong_type("/input", "a string", other)),
    };
    let output = filled_text(row, "output", "")?;
    let user = Message { input, ..Message::new(Role::User, instruction) };
    let messages = vec![user, Message::new(Role::Assistant, output)];
    let known = ["instruction", "input", "output"];
    let ignored = row.keys().filter(|key| !known.contains(&key.as_str())).map(|key| shorten(key)).collect();
    Ok(Example { messages, ignored })
}

fn parse_chat(row: &Map<String, Value>) -> Result<Example, Problem> {
    for key in ["tools", "functions"] {
        if row.get(key).is_some_and(|value| !value.is_null()) {
            return Err(unsupported(&format!("/{key}"), &format!("`{key}`"), "tool use"));
        }
    }
    let list = match row.get("messages") {
        None => return Err(missing("/messages")),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("/messages", "an array", other)),
    };
    let mut ignored: Vec<String> = row.keys().filter(|key| *key != "messages").map(|key| shorten(key)).collect();
    let mut messages = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let pointer = format!("/messages/{index}");
        let Value::Object(object) = value else { return Err(wrong_type(&pointer, "an object", value)) };
        messages.push(parse_message(object, &pointer)?);
        let known = ["role", "content", "weight"];
        let unknown = object.keys().filter(|key| !known.contains(&key.as_str()));
        ignored.extend(unknown.map(|key| format!("messages.{}", shorten(key))));
    }
    ignored.sort_unstable();
    ignored.dedup();
    check_conversation(&messages)?;
    Ok(Example { messages, ignored })
}

fn parse_message(object: &Map<String, Value>, pointer: &str) -> Result<Message, Problem> {
    let role_pointer = format!("{pointer}/role");
    let role = match object.get("role") {
        None => return Err(missing(&role_pointer)),
        Some(Value::String(role)) => role,
        Some(other) => return Err(wrong_type(&role_pointer, "a string", other)),
    };
    let Some(role) = Role::from_name(role) else {
        let message = format!("{role_pointer} is `{}`", shorten(role));
        return Err(Problem::new(role_pointer, BadRowCode::UnknownRole, message)
            .hint("supported: system, user, assistant; tool use is not supported yet"));
    };
    for key in ["tool_calls", "function_call", "tool_call_id"] {
        if object.get(key).is_some_and(|value| !value.is_null()) {
            return Err(unsupported(&format!("{pointer}/{key}"), &format!("`{key}`"), "tool use"));
        }
    }
    let content = match object.get("content") {
        Some(Value::Array(_)) => {
            return Err(unsupported(&format!("{pointer}/content"), "a list of parts", "content other than a string"));
        }
        _ => text(object, "content", pointer)?,
    };
    let trained = match (object.get("weight"), role) {
        (None | Some(Value::Null), _) => role == Role::Assistant,
        (Some(weight), Role::Assistant) if weight.as_f64() == Some(0.0) => false,
        (Some(weight), Role::Assistant) if weight.as_f64() == Some(1.0) => true,
        (Some(weight), _) => {
            let pointer = format!("{pointer}/weight");
            let message =
                format!("{pointer} is `{}` on a message of the {}", shorten(&weight.to_string()), role.name());
            return Err(Problem::new(pointer, BadRowCode::InvalidValue, message)
                .hint("weight is 0 or 1, and only on messages of the assistant"));
        }
    };
    if trained && content.trim().is_empty() {
        return Err(empty(&format!("{pointer}/content")));
    }
    Ok(Message { trained, ..Message::new(role, content) })
}

fn check_conversation(messages: &[Message]) -> Result<(), Problem> {
    let bad = |code, message: &str, hint: &str| Err(Problem::new("/messages", code, message).hint(hint));
    if !messages.iter().any(|message| message.trained) {
        let hint = "at least one message has the role assistant, and not weight 0";
        return bad(BadRowCode::NoAssistantMessage, "no message of the assistant is to be trained on", hint);
    }
    if messages.first().is_some_and(|message| message.role == Role::Assistant) {
        let hint = "a message of the user or a system message comes first";
        return bad(BadRowCode::NoPrompt, "the conversation begins with the assistant", hint);
    }
    if messages.last().is_some_and(|message| message.role != Role::Assistant) {
        let hint = "drop what follows the assistant's last message";
        return bad(BadRowCode::LastMessageNotAssistant, "the last message is not the assistant's", hint);
    }
    Ok(())
}

fn text(object: &Map<String, Value>, key: &str, pointer: &str) -> Result<String, Problem> {
    let pointer = format!("{pointer}/{key}");
    match object.get(key) {
        None => Err(missing(&pointer)),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(wrong_type(&pointer, "a string", other)),
    }
}

fn filled_text(object: &Map<String, Value>, key: &str, pointer: &str) -> Result<String, Problem> {
    let text = text(object, key, pointer)?;
    if text.trim().is_empty() { Err(empty(&format!("{pointer}/{key}"))) } else { Ok(text) }
}

fn missing(pointer: &str) -> Problem {
    Problem::new(pointer, BadRowCode::MissingField, format!("{pointer} is missing"))
}

fn empty(pointer: &str) -> Problem {
    Problem::new(pointer, BadRowCode::EmptyField, format!("{pointer} is empty"))
}

fn wrong_type(pointer: &str, right: &str, got: &Value) -> Problem {
    let message = format!("{pointer} must be {right}, got {}", type_name(got));
    Problem::new(pointer, BadRowCode::WrongType, message)
}

fn unsupported(pointer: &str, what: &str, need: &str) -> Problem {
    let message = format!("{pointer} holds {what}, but {need} is not supported yet");
    Problem::new(pointer, BadRowCode::UnsupportedField, message)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
