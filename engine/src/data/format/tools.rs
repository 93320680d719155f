//! Functions that an assistant may call, and its calls, in the one shape that templates expect: OpenAI's, with the arguments as
//! an object.

use serde_json::{Map, Value, json};

use super::super::report::Problem;
use super::fields::{invalid, missing, type_name, wrong_type};

/// The list of functions: OpenAI's `tools`, bare function objects, or either as JSON in a string.
pub(super) fn parse(value: Option<&Value>, pointer: &str) -> Result<Vec<Value>, Problem> {
    let parsed;
    let value = match value {
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => {
            parsed = json_in_string(text, pointer)?;
            &parsed
        }
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(value) => value,
    };
    let Value::Array(list) = value else {
        return Err(wrong_type(pointer, "an array (or one as JSON in a string)", value));
    };
    let tool = |(index, tool): (usize, &Value)| parse_tool(tool, &format!("{pointer}/{index}"));
    list.iter().enumerate().map(tool).collect()
}

fn parse_tool(tool: &Value, pointer: &str) -> Result<Value, Problem> {
    let Value::Object(object) = tool else { return Err(wrong_type(pointer, "an object", tool)) };
    let (function, pointer) = match object.get("function") {
        Some(Value::Object(function)) => (function, format!("{pointer}/function")),
        Some(other) => return Err(wrong_type(&format!("{pointer}/function"), "an object", other)),
        None => (object, pointer.to_owned()),
    };
    name_of(function, &pointer)?;
    Ok(if object.contains_key("function") { tool.clone() } else { json!({"type": "function", "function": function}) })
}

/// A call: OpenAI's `{id?, type?, function: {name, arguments}}` or a bare `{name, arguments}`.
pub(super) fn parse_call(call: &Value, pointer: &str) -> Result<Value, Problem> {
    let Value::Object(object) = call else { return Err(wrong_type(pointer, "an object", call)) };
    let (function, function_pointer) = match object.get("function") {
        Some(Value::Object(function)) => (function, format!("{pointer}/function")),
        Some(other) => return Err(wrong_type(&format!("{pointer}/function"), "an object", other)),
        None => (object, pointer.to_owned()),
    };
    let name = name_of(function, &function_pointer)?;
    let pointer = format!("{function_pointer}/arguments");
    let arguments = match function.get("arguments").or_else(|| function.get("parameters")) {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => json_in_string(text, &pointer)?,
        Some(arguments) => arguments.clone(),
    };
    if !arguments.is_object() {
        return Err(invalid(&pointer, &format!("must be a JSON object, got {}", type_name(&arguments))));
    }
    let mut whole = Map::new();
    if let Some(id) = object.get("id").filter(|id| id.is_string()) {
        whole.insert("id".into(), id.clone());
    }
    whole.insert("type".into(), "function".into());
    whole.insert("function".into(), json!({"name": name, "arguments": arguments}));
    Ok(Value::Object(whole))
}

/// A turn that is one call or a list of calls, as JSON in a string.
pub(super) fn parse_calls_in_string(text: &str, pointer: &str) -> Result<Vec<Value>, Problem> {
    match json_in_string(text, pointer)? {
        Value::Array(calls) if calls.is_empty() => Err(invalid(pointer, "holds no call")),
        Value::Array(calls) => calls.iter().map(|call| parse_call(call, pointer)).collect(),
        call => Ok(vec![parse_call(&call, pointer)?]),
    }
}

fn name_of<'a>(function: &'a Map<String, Value>, pointer: &str) -> Result<&'a str, Problem> {
    let pointer = format!("{pointer}/name");
    match function.get("name") {
        None => Err(missing(&pointer)),
        Some(Value::String(name)) if !name.is_empty() => Ok(name),
        Some(Value::String(_)) => Err(invalid(&pointer, "is empty")),
        Some(other) => Err(wrong_type(&pointer, "a string", other)),
    }
}

fn json_in_string(text: &str, pointer: &str) -> Result<Value, Problem> {
    serde_json::from_str(text).map_err(|error| invalid(pointer, &format!("holds invalid JSON: {error}")))
}
