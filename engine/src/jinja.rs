//! The Jinja environment that Hugging Face renders chat templates in, rebuilt on minijinja, with bounds.
//!
//! Two things differ on purpose: the date never changes, and `{% generation %}` blocks are read as plain text around their
//! content (the loss mask comes from the structure of the conversation, see `data/encode.rs`).

mod depth;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Bytes of a template; the longest that models come with have a fifth of it.
pub(crate) const MAX_TEMPLATE_BYTES: usize = 64 << 10;
/// Stack of the thread that reads a template: `a + a + a …` is a tree as deep as it is long, and what drops it calls itself.
const STACK_BYTES: usize = 128 << 20;
/// Instructions, and 64-byte pieces of data, that one rendering may take; docs/LOG.md has the seconds.
///
/// It does not pay for the items of lists before they are walked, when two are compared or added: `x = x + x`, a few dozen times,
/// is larger than any memory. So constants are not computed where a template is only checked (in the server), and what compiles
/// and renders is a worker or a command, with bounded memory (`src/memory.rs`); a worker that makes no progress is killed.
const FUEL: u64 = 4_000_000;
/// Bytes that one rendering may write.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Items of a list whose methods are called, or that is given to a method of a text.
const MAX_ITEMS: usize = 1 << 20;
/// Nesting of a value given to `tojson`.
const MAX_JSON_DEPTH: usize = 64;

/// What `raise_exception` was called with: the template refuses the conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// An environment without templates.
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("join", join);
    environment
}

pub(super) fn syntax() -> SyntaxConfig {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.expect("the default delimiters differ from each other")
}

/// Adds a template under that name.
///
/// # Errors
/// What is wrong with its syntax, and at which line; a template that is too long.
pub(crate) fn add_template(
    environment: &mut Environment<'static>,
    name: &'static str,
    source: &str,
) -> Result<(), String> {
    on_large_stack(source, move |source| {
        depth::check(&source)?;
        environment.add_template_owned(name, source)
    })
}

/// Whether a template can be read; nothing of it is computed.
///
/// # Errors
/// What is wrong with its syntax, and at which line; a template that is too long.
pub(crate) fn check(source: &str) -> Result<(), String> {
    on_large_stack(source, |source| depth::check(&source))
}

fn on_large_stack(
    source: &str,
    read: impl FnOnce(String) -> Result<(), minijinja::Error> + Send,
) -> Result<(), String> {
    if source.len() > MAX_TEMPLATE_BYTES {
        return Err(format!("it has {} bytes, at most {MAX_TEMPLATE_BYTES} are supported", source.len()));
    }
    let source = without_generation_tags(source);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, move || read(source));
        let thread = thread.map_err(|error| format!("no thread could be started to read it: {error}"))?;
        let read = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        read.map_err(|error| syntax_error(&error))
    })
}

fn syntax_error(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// `{% generation %}` and its end become an `if` that always holds: white space is cut as before, and no line moves.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        result.push_str(before);
        // Behind the tag's own two characters: `{%}` is no whole tag.
        let Some(length) = tag[2..].find("%}") else {
            rest = tag;
            break;
        };
        let end = 2 + length;
        let inner = &tag[2..end];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" => result.push_str(&format!("{{%{}%}}", inner.replacen(word, "if true", 1))),
            "endgeneration" => result.push_str(&format!("{{%{}%}}", inner.replacen(word, "endif", 1))),
            _ => result.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    result.push_str(rest);
    result
}

/// Where a template writes to: memory, up to a bound.
#[derive(Default)]
pub(crate) struct Output(Vec<u8>);

impl Output {
    pub(crate) fn into_string(self) -> String {
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

/// Python's methods of texts, lists and maps.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, minijinja::Error> {
    // A list can be far longer than the memory that it takes, and these methods do not pay for what they walk.
    let is_list = |value: &&Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    let mut lists = std::iter::once(value).chain(arguments).filter(is_list);
    if lists.any(|list| list.len().is_none_or(|items| items > MAX_ITEMS)) {
        let message = format!("{method}: the list has more than {MAX_ITEMS} items");
        return Err(minijinja::Error::new(ErrorKind::OutOfFuel, message));
    }
    match (value.as_str(), method, arguments) {
        (Some(joiner), "join", [list]) => join_with(state, list, joiner, None),
        (Some(text), "title", []) => Ok(Value::from(title(text))),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// As Python has it: every letter after what is no letter.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for character in text.chars() {
        if in_word {
            titled.extend(character.to_lowercase());
        } else {
            titled.extend(character.to_uppercase());
        }
        in_word = character.is_alphabetic();
    }
    titled
}

fn join(
    state: &State,
    value: &Value,
    joiner: Option<String>,
    attribute: Option<String>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    let joiner = match joiner {
        None => options.get::<Option<String>>("d")?.unwrap_or_default(),
        Some(joiner) => joiner,
    };
    let attribute = attribute.map_or_else(|| options.get::<Option<String>>("attribute"), |name| Ok(Some(name)))?;
    options.assert_all_used()?;
    join_with(state, value, &joiner, attribute.as_deref())
}

/// The same item may stand in a list many times: unlike minijinja's own, this pays for each before it is written.
fn join_with(state: &State, list: &Value, joiner: &str, attribute: Option<&str>) -> Result<Value, minijinja::Error> {
    let mut joined = String::new();
    for (index, item) in list.try_iter()?.enumerate() {
        let item = match attribute {
            None => item,
            Some(name) => item.get_attr(name)?,
        };
        let text = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
        let added = text.len() + joiner.len();
        state.consume_fuel(1 + (added / 64) as u64)?;
        if joined.len() + added > MAX_OUTPUT_BYTES {
            let message = format!("join: more than {MAX_OUTPUT_BYTES} bytes");
            return Err(minijinja::Error::new(ErrorKind::OutOfFuel, message));
        }
        if index > 0 {
            joined.push_str(joiner);
        }
        joined.push_str(&text);
    }
    Ok(Value::from(joined))
}

/// JSON as a template sees it.
pub(crate) fn to_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(bool) => Value::from(*bool),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64()),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_value).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), to_value(value))))
        }
    }
}

/// As Python's `json.dumps(value, ensure_ascii=False, …)` with Hugging Face's arguments; minijinja's own escapes for HTML.
fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = to_json(state, value, 0)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match separators.as_deref() {
        None => (item, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            let message = "tojson: separators must be two texts";
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let style = Style { item, key, indent: indent.map(|width| width.min(16)), depth: 0, has_value: false };
    let text = write_json(&json, style);
    Ok(if ensure_ascii == Some(true) { escape_non_ascii(&text) } else { text })
}

/// A value as Python's `json.dumps` writes it, with a space after commas and colons.
pub(crate) fn spaced_json(value: &serde_json::Value) -> String {
    write_json(value, Style { item: ", ", key: ": ", indent: None, depth: 0, has_value: false })
}

fn write_json(value: &serde_json::Value, style: Style<'_>) -> String {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, style)).expect("a JSON value, written to memory");
    String::from_utf8(bytes).expect("serde_json writes UTF-8")
}

/// Characters beyond ASCII as `\\uXXXX`, in pairs of surrogates beyond U+FFFF. (Only strings can hold them.)
fn escape_non_ascii(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            escaped.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped
}

fn to_json(state: &State, value: &Value, depth: usize) -> Result<serde_json::Value, minijinja::Error> {
    let bad = |what: String| minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {what}"));
    if depth > MAX_JSON_DEPTH {
        return Err(bad("the value is nested too deep".into()));
    }
    state.consume_fuel(1 + (value.as_str().map_or(0, str::len) / 64) as u64)?;
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
            let items = value.try_iter()?.map(|item| to_json(state, &item, depth + 1));
            items.collect::<Result<Vec<_>, _>>()?.into()
        }
        ValueKind::Map => {
            let mut map = serde_json::Map::new();
            for key in value.try_iter()? {
                map.insert(key.to_string(), to_json(state, &value.get_item(&key)?, depth + 1)?);
            }
            map.into()
        }
        other => return Err(bad(format!("a value of type {other} cannot be written as JSON"))),
    })
}

/// Python's way to write JSON.
struct Style<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl Style<'_> {
    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            None => Ok(()),
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
        }
    }

    fn begin<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(bracket)
    }

    fn end<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        self.has_value = true;
        writer.write_all(bracket)
    }

    fn begin_item<W: ?Sized + io::Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }
}

impl Formatter for Style<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_ends_within_its_own_beginning_is_an_error_and_not_a_panic() {
        for source in ["{%}", "{{{%}8>C", "{%}}}} macro f(='') -%}", "{%"] {
            check(source).unwrap_err();
        }
        check("{% generation %}a{% endgeneration %}").unwrap();
    }

    /// Chains are trees as deep as they are long: what reads them must run out of neither stack nor time.
    #[test]
    fn a_template_of_one_long_chain_is_refused() {
        let chain = |start: &str, link: &str, end: &str| {
            let links = (MAX_TEMPLATE_BYTES - start.len() - end.len()) / link.len();
            format!("{start}{}{end}", link.repeat(links))
        };
        for template in [
            chain("{{ 1", "+1", " }}"),
            chain("{{ x", "+x", " }}"),
            chain("{{ x", ".a", " }}"),
            chain("{{ x", "|e", " }}"),
            chain("{{ x", "[0]", " }}"),
            chain("{{ x", "()", " }}"),
            chain("{{ x", "~x", " }}"),
            chain("{{ x", " is a", " }}"),
            chain("{{ x", " and x", " }}"),
            chain("{{ -1 if x else 1", "+ (1)", " }}"),
            chain("{% if x %}", "{% elif x %}", "{% endif %}"),
            chain("{% for y in x", "~x", " %}{% endfor %}"),
            chain("{% macro f(y=x", "~x", ") %}{% endmacro %}"),
            chain("{% set y = {'a': f(*x", "~x", ")} %}"),
        ] {
            let refused = Err("its statements or expressions are nested more than 500 deep".to_owned());
            assert_eq!(check(&template), refused, "{}", &template[..12]);
            assert_eq!(add_template(&mut environment(), "chain", &template), refused, "{}", &template[..12]);
        }
        for template in
            [chain("{{ 1", "<1", " }}"), chain("", "{{ x }}", ""), chain("{{ x", "~x", " }}")[..990].to_owned() + "}}"]
        {
            assert_eq!(check(&template), Ok(()), "{}", &template[..12]);
            assert_eq!(add_template(&mut environment(), "chain", &template), Ok(()), "{}", &template[..12]);
        }
    }

    #[test]
    fn a_check_computes_nothing() {
        let endless = format!(
            "{{{{ [1] * 1000000000000 == [1] * 1000000000000 }}}}{{{{ {}[] }}}}",
            "[1] * 1000000000000 + ".repeat(40)
        );
        assert_eq!(check(&endless), Ok(()));
        assert_eq!(check("{{ 2 in [1] * 1000000000000000000 }}"), Ok(()));
    }
}
