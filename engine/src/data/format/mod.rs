//! A row's JSON to what it teaches: which format it is, and what is wrong with it.
//!
//! Fields that a format does not know are tolerated and counted in the report, because published data sets carry ids and
//! categories; fields that would change what is learnt (preferences, nested examples) are refused.

mod alpaca;
mod chat;
mod detect;
mod fields;
mod plain;
mod sharegpt;
mod tools;

use serde_json::{Map, Value};

use super::report::{BadRowCode, Format, Problem};
use super::{Message, Role};
use crate::spec::Columns;
use fields::{Fields, type_name};

pub(super) use detect::detect;

/// A row that can be used.
#[derive(Debug)]
pub(super) struct Example {
    /// What it teaches.
    pub(super) content: Content,
    /// Fields that were not looked at.
    pub(super) ignored: Vec<String>,
}

/// What a row teaches.
#[derive(Debug)]
pub(super) enum Content {
    /// A conversation, which a template makes a text of; the last message is the assistant's.
    Conversation {
        /// Where the messages stand in the row.
        pointer: String,
        /// Who says what.
        messages: Vec<Message>,
        /// Functions that the assistant may call, as OpenAI's `tools`.
        tools: Vec<Value>,
    },
    /// A text and how it goes on; no template.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// A text that is learnt as a whole; no template.
    Text(String),
}

impl Content {
    /// The texts of the row itself, without what a template writes around them.
    pub(super) fn texts(&self) -> Vec<&str> {
        match self {
            Self::Conversation { messages, .. } => {
                let contents = messages.iter().map(|message| message.content.as_str());
                contents.chain(messages.iter().filter_map(|message| message.input.as_deref())).collect()
            }
            Self::Completion { prompt, completion } => vec![prompt, completion],
            Self::Text(text) => vec![text],
        }
    }
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

/// Judges a row of a known format.
pub(super) fn parse_row(row: &Map<String, Value>, format: Format, columns: &Columns) -> Result<Example, Problem> {
    if let Some(key) = detect::preference_key(row) {
        let message = format!("the row has the key `{key}`: preference data is not supported");
        return Err(Problem::new(format!("/{key}"), BadRowCode::UnsupportedField, message)
            .hint("keep the preferred answer only, in one of the supported formats"));
    }
    let fields = Fields::new(row, columns);
    if let Some(key) = key_of_another_format(&fields, format) {
        let message = format!("the row has the key `{key}`, but the format of this file is {}", format.name());
        return Err(Problem::new("", BadRowCode::MixedFormat, message).hint("a file holds rows of one format"));
    }
    match format {
        Format::Alpaca => alpaca::parse(&fields),
        Format::Sharegpt => sharegpt::parse(&fields),
        Format::Chat => chat::parse(&fields),
        Format::Completion => plain::parse_completion(&fields),
        Format::Text => plain::parse_text(&fields),
    }
}

/// The key that tells another format, in a row that lacks what tells this one.
fn key_of_another_format(fields: &Fields<'_>, format: Format) -> Option<&'static str> {
    let own = match format {
        Format::Alpaca => "instruction",
        Format::Sharegpt => "conversations",
        Format::Chat => "messages",
        Format::Completion => "completion",
        Format::Text => "text",
    };
    let telling = ["messages", "conversations", "instruction"];
    let other = telling.into_iter().find(|&key| key != own && fields.row.contains_key(key) && !fields.is_named(key));
    other.filter(|_| fields.get(own).is_none())
}

/// What holds for a conversation of any format.
fn check_conversation(messages: &[Message], pointer: &str) -> Result<(), Problem> {
    let bad = |code, message: &str, hint: &str| Err(Problem::new(pointer, code, message).hint(hint));
    if !messages.iter().any(|message| message.trained) {
        let hint = "at least one message is the assistant's, and not of weight 0";
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
