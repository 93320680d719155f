//! The two formats that no template touches: completion (`prompt`, `completion`; also `input`, `output`) and text (`text`).

use serde_json::Value;

use super::super::report::Problem;
use super::fields::{Fields, wrong_type};
use super::{Content, Example};

pub(super) fn parse_completion(fields: &Fields<'_>) -> Result<Example, Problem> {
    let by_other_name = |field, other| match fields.get(field) {
        None if !fields.is_mapped(field) && fields.row.contains_key(other) => other,
        _ => field,
    };
    let (prompt_field, completion_field) = (by_other_name("prompt", "input"), by_other_name("completion", "output"));
    for field in [prompt_field, completion_field] {
        if let Some(value @ Value::Array(_)) = fields.get(field) {
            let hint = "a conversation is written in the chat format: one list of messages";
            return Err(wrong_type(&fields.pointer(field), "a string", value).hint(hint));
        }
    }
    let prompt = fields.text(prompt_field)?;
    let completion = fields.filled_text(completion_field)?;
    let ignored = fields.ignored(&[prompt_field, completion_field]);
    Ok(Example { content: Content::Completion { prompt, completion }, ignored })
}

pub(super) fn parse_text(fields: &Fields<'_>) -> Result<Example, Problem> {
    Ok(Example { content: Content::Text(fields.filled_text("text")?), ignored: fields.ignored(&["text"]) })
}
