//! The chat format: OpenAI's `messages: [{role, content, tool_calls?, weight?}]`, optional `tools`.

use serde_json::{Map, Value};

use super::super::report::{BadRowCode, Problem};
use super::super::{Message, Role};
use super::fields::{Fields, empty, invalid, missing, type_name, weight, wrong_type};
use super::tools::{self, parse_call};
use super::{Content, Example, check_conversation};
use crate::files::shorten;

pub(super) fn parse(fields: &Fields<'_>) -> Result<Example, Problem> {
    let list = fields.list("messages")?;
    let pointer = fields.pointer("messages");
    // `functions` is OpenAI's older name of `tools`.
    let tools_field = if fields.get("tools").is_some_and(|tools| !tools.is_null()) { "tools" } else { "functions" };
    let tools = tools::parse(fields.get(tools_field), &fields.pointer(tools_field))?;
    let mut ignored = fields.ignored(&["messages", "tools", "functions"]);
    let mut messages = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let pointer = format!("{pointer}/{index}");
        let Value::Object(object) = value else { return Err(wrong_type(&pointer, "an object", value)) };
        let message = parse_message(object, &pointer)?;
        ignored.extend(unknown_fields(object, message.role));
        messages.push(message);
    }
    ignored.sort_unstable();
    ignored.dedup();
    check_conversation(&messages, &pointer)?;
    Ok(Example { content: Content::Conversation { pointer, messages, tools }, ignored })
}

fn unknown_fields(object: &Map<String, Value>, role: Role) -> impl Iterator<Item = String> {
    let known: &[&str] = match role {
        Role::Assistant => &["role", "content", "weight", "tool_calls", "function_call"],
        Role::Tool => &["role", "content", "weight", "tool_call_id", "name"],
        Role::System | Role::User => &["role", "content", "weight"],
    };
    let unknown = object.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
    unknown.map(|(key, _)| format!("messages.{}", shorten(key)))
}

fn parse_message(object: &Map<String, Value>, pointer: &str) -> Result<Message, Problem> {
    let role_pointer = format!("{pointer}/role");
    let name = match object.get("role") {
        None => return Err(missing(&role_pointer)),
        Some(Value::String(role)) => role,
        Some(other) => return Err(wrong_type(&role_pointer, "a string", other)),
    };
    let role = match name.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" | "function" => Role::Tool,
        other => {
            let message = format!("{role_pointer} is `{}`", shorten(other));
            return Err(Problem::new(role_pointer, BadRowCode::UnknownRole, message)
                .hint("supported: system, developer, user, assistant, tool"));
        }
    };
    let tool_calls = tool_calls(object, role, pointer)?;
    let content = match object.get("content") {
        None | Some(Value::Null) if !tool_calls.is_empty() => String::new(),
        content => parse_content(content, &format!("{pointer}/content"))?,
    };
    let trained = weight(object, pointer, role == Role::Assistant)?;
    if trained && tool_calls.is_empty() && content.trim().is_empty() {
        return Err(empty(&format!("{pointer}/content")));
    }
    let text = |key: &str| match object.get(key).filter(|_| role == Role::Tool) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(wrong_type(&format!("{pointer}/{key}"), "a string", other)),
    };
    let (tool_call_id, name) = (text("tool_call_id")?, text("name")?);
    Ok(Message { trained, tool_calls, tool_call_id, name, ..Message::new(role, content) })
}

fn tool_calls(object: &Map<String, Value>, role: Role, pointer: &str) -> Result<Vec<Value>, Problem> {
    let given = |key: &str| object.get(key).filter(|value| !value.is_null());
    for key in ["tool_calls", "function_call"] {
        if role != Role::Assistant && given(key).is_some() {
            let what = format!("stands in a message of role {}, but only the assistant calls functions", role.name());
            return Err(invalid(&format!("{pointer}/{key}"), &what));
        }
    }
    let mut calls = Vec::new();
    if let Some(list) = given("tool_calls") {
        let pointer = format!("{pointer}/tool_calls");
        let Value::Array(list) = list else { return Err(wrong_type(&pointer, "an array", list)) };
        for (index, call) in list.iter().enumerate() {
            calls.push(parse_call(call, &format!("{pointer}/{index}"))?);
        }
    }
    if let Some(call) = given("function_call") {
        calls.push(parse_call(call, &format!("{pointer}/function_call"))?);
    }
    Ok(calls)
}

/// A string, or OpenAI's list of parts, of which the texts are taken, a line break between them.
fn parse_content(content: Option<&Value>, pointer: &str) -> Result<String, Problem> {
    let parts = match content {
        None => return Err(missing(pointer)),
        Some(Value::String(text)) => return Ok(text.clone()),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(wrong_type(pointer, "a string", other)),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let pointer = format!("{pointer}/{index}");
        let kind = part.get("type").and_then(Value::as_str);
        if kind != Some("text") {
            let what =
                kind.map_or_else(|| type_name(part).to_owned(), |kind| format!("a part of type `{}`", shorten(kind)));
            let message = format!("{pointer} is {what}, but only parts of type `text` are supported");
            return Err(Problem::new(pointer, BadRowCode::UnsupportedField, message));
        }
        let pointer = format!("{pointer}/text");
        match part.get("text") {
            None => return Err(missing(&pointer)),
            Some(Value::String(text)) => texts.push(text.as_str()),
            Some(other) => return Err(wrong_type(&pointer, "a string", other)),
        }
    }
    Ok(texts.join("\n"))
}
