//! A row's fields under the names that its file gives them.

use serde_json::{Map, Value};

use super::super::report::{BadRowCode, Problem};
use crate::files::shorten;
use crate::spec::Columns;

/// A row seen through the column mapping.
pub(super) struct Fields<'a> {
    pub(super) row: &'a Map<String, Value>,
    columns: &'a Columns,
}

impl<'a> Fields<'a> {
    pub(super) fn new(row: &'a Map<String, Value>, columns: &'a Columns) -> Self {
        Self { row, columns }
    }

    /// The name of that field in the file.
    fn name<'b>(&'b self, field: &'b str) -> &'b str {
        self.columns.get(field).map_or(field, String::as_str)
    }

    /// Whether a column of that name was named by the caller.
    pub(super) fn is_named(&self, column: &str) -> bool {
        self.columns.values().any(|name| name == column)
    }

    /// Whether the caller named the column of that field.
    pub(super) fn is_mapped(&self, field: &str) -> bool {
        self.columns.contains_key(field)
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.row.get(self.name(field))
    }

    /// The JSON pointer to a field.
    pub(super) fn pointer(&self, field: &str) -> String {
        format!("/{}", self.name(field).replace('~', "~0").replace('/', "~1"))
    }

    /// A text that must be there.
    pub(super) fn text(&self, field: &str) -> Result<String, Problem> {
        let pointer = self.pointer(field);
        match self.get(field) {
            None => Err(missing(&pointer)),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(wrong_type(&pointer, "a string", other)),
        }
    }

    /// A text that must be there and say something.
    pub(super) fn filled_text(&self, field: &str) -> Result<String, Problem> {
        let text = self.text(field)?;
        if text.trim().is_empty() { Err(empty(&self.pointer(field))) } else { Ok(text) }
    }

    /// A text that may be absent, null or empty.
    pub(super) fn optional_text(&self, field: &str) -> Result<Option<String>, Problem> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(_) => self.text(field).map(Some),
        }
    }

    /// A list that must be there.
    pub(super) fn list(&self, field: &str) -> Result<&'a [Value], Problem> {
        let pointer = self.pointer(field);
        match self.get(field) {
            None => Err(missing(&pointer)),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(wrong_type(&pointer, "an array", other)),
        }
    }

    /// The columns that are none of these fields.
    pub(super) fn ignored(&self, known: &[&str]) -> Vec<String> {
        let is_known = |key: &str| known.iter().any(|&field| self.name(field) == key);
        self.row.keys().filter(|key| !is_known(key)).map(|key| shorten(key)).collect()
    }
}

pub(super) fn missing(pointer: &str) -> Problem {
    Problem::new(pointer, BadRowCode::MissingField, format!("{pointer} is missing"))
}

pub(super) fn empty(pointer: &str) -> Problem {
    Problem::new(pointer, BadRowCode::EmptyField, format!("{pointer} is empty"))
}

pub(super) fn wrong_type(pointer: &str, right: &str, got: &Value) -> Problem {
    let message = format!("{pointer} must be {right}, got {}", type_name(got));
    Problem::new(pointer, BadRowCode::WrongType, message)
}

pub(super) fn invalid(pointer: &str, what: &str) -> Problem {
    Problem::new(pointer, BadRowCode::InvalidValue, format!("{pointer} {what}"))
}

pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Whether a message of the assistant is trained on, by its `weight`: 0 or 1, and only on messages of the assistant.
pub(super) fn weight(object: &Map<String, Value>, pointer: &str, of_assistant: bool) -> Result<bool, Problem> {
    match (object.get("weight"), of_assistant) {
        (None | Some(Value::Null), _) => Ok(of_assistant),
        (Some(weight), true) if weight.as_f64() == Some(0.0) => Ok(false),
        (Some(weight), true) if weight.as_f64() == Some(1.0) => Ok(true),
        (Some(weight), _) => {
            let whose = if of_assistant { "the assistant" } else { "another than the assistant" };
            let what = format!("is `{}` on a message of {whose}", shorten(&weight.to_string()));
            let hint = "weight is 0 or 1, and only on messages of the assistant";
            Err(invalid(&format!("{pointer}/weight"), &what).hint(hint))
        }
    }
}
