//! The sharegpt format: `conversations: [{from, value, weight?}]`, optional `system` and `tools`.

use serde_json::{Map, Value};

use super::super::report::{BadRowCode, Problem};
use super::super::{Message, Role};
use super::fields::{Fields, empty, invalid, missing, weight, wrong_type};
use super::tools::{self, parse_calls_in_string};
use super::{Content, Example, check_conversation};
use crate::files::shorten;

pub(super) fn parse(fields: &Fields<'_>) -> Result<Example, Problem> {
    let list = fields.list("conversations")?;
    let pointer = fields.pointer("conversations");
    let tools = tools::parse(fields.get("tools"), &fields.pointer("tools"))?;
    let system = fields.optional_text("system")?;
    let mut ignored = fields.ignored(&["conversations", "system", "tools"]);
    let mut messages: Vec<Message> = system.map(|system| Message::new(Role::System, system)).into_iter().collect();
    for (index, value) in list.iter().enumerate() {
        let pointer = format!("{pointer}/{index}");
        let Value::Object(object) = value else { return Err(wrong_type(&pointer, "an object", value)) };
        let message = parse_turn(object, &pointer)?;
        if message.role == Role::System && !messages.is_empty() {
            let what = "is a second system message, or one that does not come first";
            return Err(invalid(&pointer, what).hint("one system message, at the start or in the row's `system`"));
        }
        messages.push(message);
        let known = ["from", "value", "weight"];
        let unknown = object.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
        ignored.extend(unknown.map(|(key, _)| format!("conversations.{}", shorten(key))));
    }
    ignored.sort_unstable();
    ignored.dedup();
    check_conversation(&messages, &pointer)?;
    Ok(Example { content: Content::Conversation { pointer, messages, tools }, ignored })
}

fn parse_turn(object: &Map<String, Value>, pointer: &str) -> Result<Message, Problem> {
    let from_pointer = format!("{pointer}/from");
    let from = match object.get("from") {
        None if object.contains_key("role") => {
            return Err(missing(&from_pointer).hint(
                "these are messages of the chat format: dataset.format chat, dataset.columns {\"messages\": \"conversations\"}",
            ));
        }
        None => return Err(missing(&from_pointer)),
        Some(Value::String(from)) => from,
        Some(other) => return Err(wrong_type(&from_pointer, "a string", other)),
    };
    let value_pointer = format!("{pointer}/value");
    let value = match object.get("value") {
        None => return Err(missing(&value_pointer)),
        Some(Value::String(value)) => value.clone(),
        Some(other) => return Err(wrong_type(&value_pointer, "a string", other)),
    };
    let role = match from.as_str() {
        "human" | "user" => Role::User,
        "gpt" | "assistant" | "chatgpt" | "bard" | "model" | "function_call" => Role::Assistant,
        "system" => Role::System,
        "tool" | "function" | "function_response" | "observation" => Role::Tool,
        other => {
            let message = format!("{from_pointer} is `{}`", shorten(other));
            return Err(Problem::new(from_pointer, BadRowCode::UnknownRole, message).hint(
                "supported: human, user, gpt, assistant, chatgpt, bard, model, system, function_call, tool, function, function_response, observation",
            ));
        }
    };
    let trained = weight(object, pointer, role == Role::Assistant)?;
    if from == "function_call" {
        let tool_calls = parse_calls_in_string(&value, &value_pointer)?;
        return Ok(Message { trained, tool_calls, ..Message::new(role, "") });
    }
    if trained && value.trim().is_empty() {
        return Err(empty(&value_pointer));
    }
    Ok(Message { trained, ..Message::new(role, value) })
}
