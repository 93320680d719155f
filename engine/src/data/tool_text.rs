//! Tool use under a template that knows none: functions, calls and results as text, in the marks that Hermes made common
//! (`<tools>`, `<tool_call>`, `<tool_response>`) and that servers know how to find in an answer.

use serde_json::{Value, json};

use super::{Message, Role};
use crate::jinja::spaced_json;

/// The functions, as a part of the system message; a system message is made where there is none.
pub(super) fn add_tools(messages: &mut Vec<Message>, tools: &[Value]) {
    let mut text = "These functions can be called:\n<tools>\n".to_owned();
    for tool in tools {
        text.push_str(&spaced_json(tool));
        text.push('\n');
    }
    text.push_str(
        "</tools>\nA call is written so:\n<tool_call>\n{\"name\": \"the function\", \"arguments\": {}}\n</tool_call>",
    );
    match messages.first_mut().filter(|message| message.role == Role::System) {
        Some(system) if !system.content.trim().is_empty() => system.content = format!("{}\n\n{text}", system.content),
        Some(system) => system.content = text,
        None => messages.insert(0, Message::new(Role::System, text)),
    }
}

/// Calls become the end of the assistant's text, results become messages of the user (one for results that follow each other:
/// many templates want the roles in turn).
pub(super) fn write_calls(messages: Vec<Message>) -> Vec<Message> {
    let mut written: Vec<Message> = Vec::with_capacity(messages.len());
    let mut last_is_result = false;
    for mut message in messages {
        let is_result = message.role == Role::Tool;
        if is_result {
            let text = format!("<tool_response>\n{}\n</tool_response>", message.content);
            match written.last_mut().filter(|_| last_is_result) {
                Some(last) => last.content = format!("{}\n{text}", last.content),
                None => written.push(Message::new(Role::User, text)),
            }
        } else {
            for call in std::mem::take(&mut message.tool_calls) {
                let function = &call["function"];
                let call = spaced_json(&json!({"name": function["name"], "arguments": function["arguments"]}));
                let space = if message.content.is_empty() { "" } else { "\n" };
                message.content.push_str(&format!("{space}<tool_call>\n{call}\n</tool_call>"));
            }
            written.push(message);
        }
        last_is_result = is_result;
    }
    written
}
