//! The Jinja environment that Hugging Face renders chat templates in, rebuilt on minijinja, with bounds.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Instructions, and 64-byte pieces of data, that one rendering may take: about a second.
const FUEL: u64 = 10_000_000;
/// Bytes that one rendering may write.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Nesting of a value given to `tojson`.
const MAX_JSON_DEPTH: usize = 64;

/// What `raise_exception` was called with: the template refuses the conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters differ from each other"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment
}

/// Where a template writes to: memory, up to a bound.
#[derive(Default)]
pub(super) struct Output(Vec<u8>);

impl Output {
    pub(super) fn into_string(self) -> String {
        String::from_utf8(self.0).expect("minijinja writes strings")
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(format!("more than {MAX_OUTPUT_BYTES} bytes of output")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The date that templates see is always Friday, 26 July 2024, midnight: the one that Llama 3.2's template itself falls back
/// to. With today's date, a run resumed tomorrow would train on other tokens, and a model would be asked with other ones.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::with_capacity(format.len() + 16);
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let directive = characters.next();
        text.push_str(match directive {
            Some('Y') => "2024",
            Some('y') => "24",
            Some('m') => "07",
            Some('B') => "July",
            Some('b') => "Jul",
            Some('d') => "26",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('H' | 'M' | 'S') => "00",
            Some('F') => "2024-07-26",
            Some('%') => "%",
            Some(other) => return Err(unknown_directive(&other.to_string())),
            None => return Err(unknown_directive("")),
        });
    }
    Ok(text)
}

fn unknown_directive(directive: &str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: `%{directive}` is not supported"))
}

/// As Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; minijinja's own escapes for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let json = to_json(value, 0)?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => json.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            json.serialize(&mut Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(indent.as_bytes())))
        }
    };
    let text = written.ok().and_then(|()| String::from_utf8(bytes).ok());
    text.ok_or_else(|| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson: the value cannot be written as JSON")
    })
}

fn to_json(value: &Value, depth: usize) -> Result<serde_json::Value, minijinja::Error> {
    let bad = |what: String| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {what}"));
    if depth > MAX_JSON_DEPTH {
        return Err(bad("the value is nested too deep".into()));
    }
    let text = || value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Ok(match value.kind() {
        ValueKind::None => serde_json::Value::Null,
        ValueKind::Bool => value.is_true().into(),
        ValueKind::String => text().into(),
        ValueKind::Number if value.is_integer() => match value.as_i64() {
            Some(number) => number.into(),
            None => return Err(bad(format!("the number {value} is too large"))),
        },
        ValueKind::Number => f64::try_from(value.clone())?.into(),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| to_json(&item, depth + 1));
            items.collect::<Result<Vec<_>, _>>()?.into()
        }
        ValueKind::Map => {
            let mut map = serde_json::Map::new();
            for key in value.try_iter()? {
                map.insert(key.to_string(), to_json(&value.get_item(&key)?, depth + 1)?);
            }
            map.into()
        }
        other => return Err(bad(format!("a value of type {other} cannot be written as JSON"))),
    })
}

/// Python's separators: a space after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
