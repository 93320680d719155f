//! Conversations to text: the model's chat template, or the Alpaca prompt.

use std::error::Error as _;

use minijinja::{Environment, Value, context};

use super::tool_text;
use crate::files::shorten;
use crate::jinja::{self, Output, Raised};
use crate::spec::Template;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions that stand before the conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// What a function gave back.
    Tool,
}

impl Role {
    /// The name that templates and files use.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// The `input` of an Alpaca row, which the Alpaca prompt gives a place of its own and a chat template gets at the end of
    /// the content.
    pub input: Option<String>,
    /// Whether its tokens have a loss. Without meaning but for messages of the assistant.
    pub trained: bool,
    /// Functions that the assistant calls: OpenAI's `tool_calls`, with the arguments as an object.
    pub tool_calls: Vec<serde_json::Value>,
    /// Which call a result answers.
    pub tool_call_id: Option<String>,
    /// Which function a result is of.
    pub name: Option<String>,
}

impl Message {
    /// A message of nothing but text, trained on if it is the assistant's.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            input: None,
            trained: role == Role::Assistant,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }

    fn to_value(&self) -> Value {
        let content = match &self.input {
            None => self.content.clone(),
            Some(input) => format!("{}\n\n{input}", self.content),
        };
        let mut pairs = vec![("role", Value::from(self.role.name())), ("content", content.into())];
        if let Some(input) = &self.input {
            pairs.extend([("instruction", self.content.as_str().into()), ("input", input.as_str().into())]);
        }
        if !self.tool_calls.is_empty() {
            pairs.push(("tool_calls", self.tool_calls.iter().map(jinja::to_value).collect()));
        }
        let texts = [("tool_call_id", &self.tool_call_id), ("name", &self.name)];
        pairs.extend(texts.into_iter().filter_map(|(key, text)| Some((key, Value::from(text.as_deref()?)))));
        Value::from_pairs(pairs)
    }
}

/// The prompt of Stanford's Alpaca, with its two preambles, as a template. A system message takes the preamble's place, and
/// each later turn repeats the headings only.
const ALPACA: &str = r#"
{%- if messages and messages[0].role == 'system' -%}
    {{ messages[0].content }}
{%- elif messages and messages[0].input -%}
    Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.
{%- else -%}
    Below is an instruction that describes a task. Write a response that appropriately completes the request.
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{ '\n\n### Instruction:\n' + (message.instruction or message.content) }}
        {%- if message.input %}{{ '\n\n### Input:\n' + message.input }}{% endif -%}
    {%- elif message.role == 'assistant' -%}
        {{ '\n\n### Response:\n' + message.content + eos_token }}
    {%- elif not loop.first -%}
        {{ raise_exception('the Alpaca prompt has a place for a system message only at the start') }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif -%}
"#;

/// Why a conversation was not rendered.
#[derive(Debug)]
pub(super) enum RenderError {
    /// The template refuses this conversation (`raise_exception`), or it is too long for the template's bounds.
    Refused(String),
    /// The template is at fault.
    Broken(String),
}

impl From<RenderError> for Error {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Refused(message) => Self::Template(format!("it refuses the conversation: {message}")),
            RenderError::Broken(message) => Self::Template(message),
        }
    }
}

/// A compiled template that renders conversations.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    chat: Source,
    /// The model's own template for conversations in which functions can be called, where it has one.
    tool_use: Option<Source>,
    /// The template's text, where it is not the model's own.
    replacement: Option<String>,
}

/// One of a model's templates, and what it has a place for.
struct Source {
    name: &'static str,
    /// It writes the functions that can be called.
    tools: bool,
    /// It writes calls and their results.
    tool_calls: bool,
}

/// A conversation in the form that a template is given.
pub(super) struct Prepared {
    /// The messages; tool use is part of their text where the template has no place for it.
    pub(super) messages: Vec<Message>,
    /// The names of the functions that can be called.
    pub(super) tool_names: Vec<String>,
    values: Vec<Value>,
    tools: Value,
    template: &'static str,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts that it may write for those tokens.
    ///
    /// # Errors
    /// [`Error::Template`] for a template that does not compile.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = jinja::environment();
        let chat = add(&mut environment, "chat_template", source)?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned(), chat, tool_use: None, replacement: None })
    }

    /// The template that a run uses: the one that it was given, the model's own, or the Alpaca prompt where it has none or
    /// where that is asked for.
    ///
    /// # Errors
    /// A template that does not compile; the Alpaca prompt for a model without an end-of-sequence token.
    pub fn for_model(choice: &Template, tokenizer: &Tokenizer) -> Result<Self> {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let (source, tool_use) = match choice {
            Template::Auto => (tokenizer.chat_template(), tokenizer.tool_use_template()),
            Template::Alpaca => (None, None),
            Template::Jinja(source) => (Some(source.as_str()), None),
        };
        if source.is_none() && eos.is_empty() {
            return Err(Error::Template("the Alpaca prompt needs an eos_token_id, and the model has none".into()));
        }
        let mut template = Self::new(source.unwrap_or(ALPACA), bos, eos)?;
        let own = source.is_some() && *choice == Template::Auto;
        template.replacement = (!own).then(|| source.unwrap_or(ALPACA).to_owned());
        if let Some(tool_use) = tool_use {
            template.tool_use = Some(add(&mut template.environment, "tool_use", tool_use)?);
        }
        Ok(template)
    }

    /// As [`Self::for_model`], for what is made of a tuned model: a model whose own template cannot be used has none, and can
    /// be exported nevertheless.
    ///
    /// # Errors
    /// As [`Self::for_model`], for a template that was asked for.
    pub fn for_export(choice: &Template, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        match (Self::for_model(choice, tokenizer), choice) {
            (template, Template::Auto) => Ok(template.ok()),
            (template, Template::Alpaca | Template::Jinja(_)) => template.map(Some),
        }
    }

    /// The template's Jinja text, where it is not the model's own: whoever prompts the tuned model must be told of it.
    pub fn replacement(&self) -> Option<&str> {
        self.replacement.as_deref()
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Template`] where the template refuses the conversation or fails.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(self.render_all(&self.prepare(messages, tools), add_generation_prompt)?)
    }

    /// The text of all messages.
    pub(super) fn render_all(&self, prepared: &Prepared, add_generation_prompt: bool) -> Result<String, RenderError> {
        self.try_render(prepared, prepared.messages.len(), add_generation_prompt)
    }

    /// A conversation in the form that this template takes; `tools` are functions as OpenAI writes them.
    pub(super) fn prepare(&self, messages: &[Message], tools: &[serde_json::Value]) -> Prepared {
        let source = self.tool_use.as_ref().filter(|_| !tools.is_empty()).unwrap_or(&self.chat);
        let mut messages = messages.to_vec();
        let uses_tools = |message: &Message| message.role == Role::Tool || !message.tool_calls.is_empty();
        if !source.tool_calls && messages.iter().any(uses_tools) {
            messages = tool_text::write_calls(messages);
        }
        if !source.tools && !tools.is_empty() {
            tool_text::add_tools(&mut messages, tools);
        }
        let name = |tool: &serde_json::Value| tool["function"]["name"].as_str().map(str::to_owned);
        Prepared {
            values: messages.iter().map(Message::to_value).collect(),
            messages,
            tool_names: tools.iter().filter_map(name).collect(),
            // Hugging Face passes none where there are no tools, and templates tell that from an empty list.
            tools: if tools.is_empty() { Value::from(()) } else { tools.iter().map(jinja::to_value).collect() },
            template: source.name,
        }
    }

    /// The text of the first `count` messages.
    pub(super) fn try_render(
        &self,
        prepared: &Prepared,
        count: usize,
        add_generation_prompt: bool,
    ) -> Result<String, RenderError> {
        let messages: Value = prepared.values.iter().take(count).cloned().collect();
        let context = context! {
            messages, add_generation_prompt, bos_token => self.bos.as_str(), eos_token => self.eos.as_str(),
            tools => prepared.tools.clone(), documents => (),
        };
        let template = self.environment.get_template(prepared.template).map_err(|error| classify(&error))?;
        let mut output = Output::default();
        template.render_captured_to(context, &mut output).map_err(|error| classify(&error))?;
        Ok(output.into_string())
    }
}

fn add(environment: &mut Environment<'static>, name: &'static str, text: &str) -> Result<Source> {
    jinja::add_template(environment, name, text)
        .map_err(|what| Error::Template(format!("it does not compile, {what}")))?;
    Ok(Source { name, tools: text.contains("tools"), tool_calls: text.contains("tool_calls") })
}

fn classify(error: &minijinja::Error) -> RenderError {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return RenderError::Refused(shorten(message));
        }
        source = cause.source();
    }
    match error.kind() {
        minijinja::ErrorKind::OutOfFuel | minijinja::ErrorKind::WriteFailure => {
            RenderError::Refused(format!("the conversation is too long for it: {error}"))
        }
        _ => RenderError::Broken(format!("it does not render: {error}")),
    }
}
