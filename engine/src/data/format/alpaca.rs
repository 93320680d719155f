//! The alpaca format: `instruction`, optional `input` and `system`, `output`.

use serde_json::Value;

use super::super::report::{BadRowCode, Problem};
use super::super::{Message, Role};
use super::fields::Fields;
use super::{Content, Example};

pub(super) fn parse(fields: &Fields<'_>) -> Result<Example, Problem> {
    if fields.get("output").is_none() && fields.row.get("instances").is_some_and(Value::is_array) {
        let message = "/instances holds examples within the row, which is not supported";
        return Err(Problem::new("/instances", BadRowCode::UnsupportedField, message)
            .hint("write each instance as a row of its own: instruction, input, output"));
    }
    if fields.row.get("history").and_then(Value::as_array).is_some_and(|turns| !turns.is_empty()) {
        let message = "/history holds earlier turns, which this format has no place for";
        return Err(Problem::new("/history", BadRowCode::UnsupportedField, message)
            .hint("write conversations in the chat format: messages of role and content"));
    }
    let instruction = fields.filled_text("instruction")?;
    let input = fields.optional_text("input")?;
    let output = fields.filled_text("output")?;
    let system = fields.optional_text("system")?;
    let mut messages: Vec<Message> = system.map(|system| Message::new(Role::System, system)).into_iter().collect();
    messages.push(Message { input, ..Message::new(Role::User, instruction) });
    messages.push(Message::new(Role::Assistant, output));
    let pointer = fields.pointer("instruction");
    let ignored = fields.ignored(&["instruction", "input", "output", "system"]);
    Ok(Example { content: Content::Conversation { pointer, messages, tools: Vec::new() }, ignored })
}
