//! Conversations to text: the model's chat template, or the Alpaca prompt.

use std::error::Error as _;

use minijinja::{Environment, Value, context};

use super::jinja::{self, Output, Raised};
use crate::files::shorten;
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
}

impl Role {
    /// The name that templates and files use.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    /// The role of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::System, Self::User, Self::Assistant].into_iter().find(|role| role.name() == name)
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
}

impl Message {
    /// A message without an input of its own, trained on if it is the assistant's.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), input: None, trained: role == Role::Assistant }
    }

    fn to_value(&self) -> Value {
        let role = ("role", Value::from(self.role.name()));
        let Some(input) = &self.input else {
            return Value::from_pairs([role, ("content", Value::from(self.content.as_str()))]);
        };
        let content = format!("{}\n\n{input}", self.content);
        let instruction = ("instruction", Value::from(self.content.as_str()));
        Value::from_pairs([role, ("content", content.into()), instruction, ("input", Value::from(input.as_str()))])
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
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts that it may write for those tokens.
    ///
    /// # Errors
    /// [`Error::Template`] for a template that does not compile.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = jinja::environment();
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| Error::Template(format!("it does not compile: {error}")))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template that a run uses: the model's own, or the Alpaca prompt where it has none or where that is asked for.
    ///
    /// # Errors
    /// A template that does not compile; the Alpaca prompt for a model without an end-of-sequence token.
    pub fn for_model(choice: Template, tokenizer: &Tokenizer) -> Result<Self> {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let own = match choice {
            Template::Auto => tokenizer.chat_template(),
            Template::Alpaca => None,
        };
        if own.is_none() && eos.is_empty() {
            return Err(Error::Template("the Alpaca prompt needs an eos_token_id, and the model has none".into()));
        }
        Self::new(own.unwrap_or(ALPACA), bos, eos)
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Template`] where the template refuses the conversation or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        Ok(self.try_render(messages, add_generation_prompt)?)
    }

    pub(super) fn try_render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, RenderError> {
        let messages: Value = messages.iter().map(Message::to_value).collect();
        // Hugging Face passes these two as none, and templates tell that from absent.
        let context = context! {
            messages, add_generation_prompt, bos_token => self.bos.as_str(), eos_token => self.eos.as_str(), tools => (), documents => (),
        };
        let template = self.environment.get_template(NAME).map_err(classify)?;
        let mut output = Output::default();
        template.render_captured_to(context, &mut output).map_err(classify)?;
        Ok(output.into_string())
    }
}

fn classify(error: minijinja::Error) -> RenderError {
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
