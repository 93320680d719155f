//! A row's content to tokens, and which of them have a loss.
//!
//! The mask of a conversation is found from the template's structure and never by searching text: for each turn of the
//! assistant, `prompt` = the messages before it with the generation prompt, `full` = the messages up to it without; `full`
//! begins with `prompt`, what is left is the turn, and the next turn's `prompt` begins with `full`. A turn ends in a token that
//! stops generation; white space that the template writes after it belongs to the next prompt.
//!
//! Prompts and turns are tokenized one by one and then joined. Tokenized as one text, the end of a prompt and the start of an
//! answer could merge into a token that is neither the prompt's last nor the answer's first, and the model would be trained
//! on prefixes that generation never sees: it starts from the prompt's own tokens.

use super::Row;
use super::format::Content;
use super::report::{BadRowCode, Problem};
use super::template::{ChatTemplate, Message, Prepared, RenderError, Role};
use crate::spec::TrainOn;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Why a row has no tokens.
#[derive(Debug)]
pub(super) enum EncodeError {
    /// This row is at fault.
    Row(Problem),
    /// The template writes turns that cannot be told from each other.
    NoMask(String),
    /// The template or the tokenizer is at fault, for every row.
    Fatal(Error),
}

impl From<RenderError> for EncodeError {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Refused(message) => refused(format!("the chat template refuses the row: {message}")),
            broken @ RenderError::Broken(_) => Self::Fatal(broken.into()),
        }
    }
}

impl EncodeError {
    fn at(mut self, pointer: &str) -> Self {
        if let Self::Row(problem) = &mut self {
            problem.pointer = pointer.to_owned();
        }
        self
    }
}

fn refused(message: String) -> EncodeError {
    EncodeError::Row(Problem::new("", BadRowCode::TemplateRefused, message))
}

fn no_end_token() -> EncodeError {
    EncodeError::Fatal(Error::Template("the model has no eos_token_id, which is to end a row".into()))
}

/// Makes tokens of rows.
#[derive(Clone, Copy)]
pub(super) struct Encoder<'a> {
    pub(super) template: &'a ChatTemplate,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) train_on: TrainOn,
    /// Where rows will be cut. [`Self::encode`] does not cut, but the turns of a conversation are told apart up to there only:
    /// a row of very many turns would be rendered once for each of them.
    pub(super) max_tokens: usize,
}

impl Encoder<'_> {
    /// The tokens of a row; the last one is a token that ends a turn or a text.
    pub(super) fn encode(&self, content: &Content) -> Result<Row, EncodeError> {
        let mut row = match content {
            Content::Conversation { pointer, messages, tools } => {
                let prepared = self.template.prepare(messages, tools);
                self.conversation(&prepared).map_err(|error| error.at(pointer))?
            }
            Content::Completion { prompt, completion } => self.completion(prompt, completion)?,
            Content::Text(text) => self.text(text)?,
        };
        // The first token has nothing before it that could predict it.
        if let Some(first) = row.trained.first_mut() {
            *first = false;
        }
        Ok(row)
    }

    fn conversation(&self, prepared: &Prepared) -> Result<Row, EncodeError> {
        let no_mask = match self.turn_by_turn(prepared) {
            Err(EncodeError::NoMask(why)) => why,
            done => return done,
        };
        let all_trained = prepared.messages.iter().all(|message| message.trained || message.role != Role::Assistant);
        if self.train_on == TrainOn::Completions || !all_trained {
            let message =
                format!("{no_mask}; give another dataset.template, or train on every token: dataset.train_on all");
            return Err(EncodeError::Fatal(Error::Template(message)));
        }
        let text = self.template.render_all(prepared, false)?;
        let tokens = Turns::new(self.template, self.tokenizer, prepared).whole(&text)?;
        let mut row = Row::default();
        row.push(&tokens, true);
        Ok(row)
    }

    fn turn_by_turn(&self, prepared: &Prepared) -> Result<Row, EncodeError> {
        let mut row = Row::default();
        let mut turns = Turns::new(self.template, self.tokenizer, prepared);
        let messages = prepared.messages.iter().enumerate();
        for (index, message) in messages.filter(|(_, message)| message.role == Role::Assistant) {
            if row.tokens.len() >= self.max_tokens {
                row.push(&turns.rest()?, false);
                break;
            }
            let (prompt, turn) = turns.turn(index)?;
            row.push(&prompt, self.train_on == TrainOn::All);
            row.push(&turn, message.trained);
        }
        Ok(row)
    }

    fn completion(&self, prompt: &str, completion: &str) -> Result<Row, EncodeError> {
        let mut row = Row::default();
        row.push(&with_bos(tokens_of(self.tokenizer, prompt)?, self.tokenizer), self.train_on == TrainOn::All);
        let last = row.tokens.last().copied();
        row.push(&self.with_end(tokens_after(self.tokenizer, last, completion)?)?, true);
        Ok(row)
    }

    fn text(&self, text: &str) -> Result<Row, EncodeError> {
        let mut row = Row::default();
        let tokens = with_bos(tokens_of(self.tokenizer, text)?, self.tokenizer);
        row.push(&self.with_end(tokens)?, true);
        Ok(row)
    }

    /// A text that does not end in a token that stops generation gets the one that ends texts.
    fn with_end(&self, mut tokens: Vec<u32>) -> Result<Vec<u32>, EncodeError> {
        if !ends(&tokens, self.tokenizer) {
            tokens.push(self.tokenizer.eos().ok_or_else(no_end_token)?);
        }
        Ok(tokens)
    }
}

/// The tokens from which a model answers a conversation: the same that training saw before an answer.
///
/// # Errors
/// [`Error::Template`] where the template refuses or fails.
pub fn chat_prompt(messages: &[Message], template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let prepared = template.prepare(messages, &[]);
    let tokens = match prompt_by_turns(&prepared, template, tokenizer) {
        Err(EncodeError::NoMask(_)) => {
            let text = template.render_all(&prepared, true)?;
            tokens_of(tokenizer, &text).map(|tokens| with_bos(tokens, tokenizer))
        }
        done => done,
    };
    tokens.map_err(|error| match error {
        EncodeError::Row(problem) => Error::Template(problem.message),
        EncodeError::NoMask(message) => Error::Template(message),
        EncodeError::Fatal(error) => error,
    })
}

fn prompt_by_turns(
    prepared: &Prepared,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, EncodeError> {
    let mut tokens = Vec::new();
    let mut turns = Turns::new(template, tokenizer, prepared);
    let messages = prepared.messages.iter().enumerate();
    for (index, _) in messages.filter(|(_, message)| message.role == Role::Assistant) {
        let (prompt, turn) = turns.turn(index)?;
        tokens.extend(prompt);
        tokens.extend(turn);
    }
    tokens.extend(turns.prompt(prepared.messages.len())?.0);
    Ok(tokens)
}

fn tokens_of(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, EncodeError> {
    tokens_after(tokenizer, None, text)
}

/// The tokens of a text that goes on after the token `last`.
fn tokens_after(tokenizer: &Tokenizer, last: Option<u32>, text: &str) -> Result<Vec<u32>, EncodeError> {
    tokenizer.encode_after(last, text, true).map_err(|error| match error {
        Error::Tokenizer(message) => EncodeError::Row(Problem::new("", BadRowCode::TokenizerRefused, message)),
        other => EncodeError::Fatal(other),
    })
}

/// The tokens of a whole text; a template that writes BOS itself has written it already.
fn with_bos(mut tokens: Vec<u32>, tokenizer: &Tokenizer) -> Vec<u32> {
    let bos = tokenizer.bos().filter(|&bos| tokenizer.adds_bos() && tokens.first() != Some(&bos));
    tokens.splice(0..0, bos);
    tokens
}

fn ends(tokens: &[u32], tokenizer: &Tokenizer) -> bool {
    tokens.last().is_some_and(|last| tokenizer.stop_tokens().contains(last))
}

/// A conversation that is rendered turn by turn.
struct Turns<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    prepared: &'a Prepared,
    /// How many messages are rendered.
    done: usize,
    /// Their text.
    rendered: String,
    /// How much of it is in tokens already: all but white space at its end.
    encoded: usize,
}

impl<'a> Turns<'a> {
    fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer, prepared: &'a Prepared) -> Self {
        Self { template, tokenizer, prepared, done: 0, rendered: String::new(), encoded: 0 }
    }

    /// The tokens since the last turn up to where the assistant answers the first `count` messages, and the text of all of it.
    fn prompt(&self, count: usize) -> Result<(Vec<u32>, String), EncodeError> {
        let prompt = self.render(count, true)?;
        self.check_prompt(count, &prompt[self.encoded..])?;
        let mut tokens = tokens_of(self.tokenizer, &prompt[self.encoded..])?;
        if self.encoded == 0 {
            tokens = with_bos(tokens, self.tokenizer);
        }
        Ok((tokens, prompt))
    }

    /// The tokens since the last turn up to the end of the conversation.
    fn rest(&self) -> Result<Vec<u32>, EncodeError> {
        let full = self.render(self.prepared.messages.len(), false)?;
        tokens_of(self.tokenizer, full[self.encoded..].trim_end())
    }

    /// The tokens of a conversation whose turns cannot be told from each other.
    fn whole(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        self.check_prompt(self.prepared.messages.len(), text)?;
        let tokens = with_bos(tokens_of(self.tokenizer, text.trim_end())?, self.tokenizer);
        self.check_end(&tokens).map(|()| tokens)
    }

    /// The text of the first `count` messages, of which some are rendered already.
    fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String, EncodeError> {
        let text = self.template.try_render(self.prepared, count, add_generation_prompt)?;
        if text.starts_with(&self.rendered) {
            return Ok(text);
        }
        let message =
            "what it writes for a message is changed by those after it, so the tokens of each turn cannot be told";
        Err(EncodeError::NoMask(message.into()))
    }

    /// The tokens of the prompt before the assistant's message `index`, and those of the message, its end token included.
    fn turn(&mut self, index: usize) -> Result<(Vec<u32>, Vec<u32>), EncodeError> {
        let (prompt_tokens, prompt) = self.prompt(index)?;
        let full = self.template.try_render(self.prepared, index + 1, false)?;
        let Some(turn) = full.strip_prefix(&prompt) else {
            let message =
                "the assistant's turn does not begin with the generation prompt, so its tokens cannot be told";
            return Err(EncodeError::NoMask(message.into()));
        };
        self.check_calls(index, turn)?;
        let turn = turn.trim_end();
        let tokens = tokens_after(self.tokenizer, prompt_tokens.last().copied(), turn)?;
        self.check_end(&tokens)?;
        self.encoded = prompt.len() + turn.len();
        self.rendered = full;
        self.done = index + 1;
        Ok((prompt_tokens, tokens))
    }

    fn check_end(&self, tokens: &[u32]) -> Result<(), EncodeError> {
        if ends(tokens, self.tokenizer) {
            return Ok(());
        }
        let stops: Vec<&str> =
            self.tokenizer.stop_tokens().iter().filter_map(|&id| self.tokenizer.token_text(id)).collect();
        Err(EncodeError::Fatal(Error::Template(format!(
            "the assistant's turn does not end in a token that stops generation ({}), so the model would learn never to stop",
            stops.join(", ")
        ))))
    }

    /// That a template which has no place for a role or for tools did not leave them out in silence.
    fn check_prompt(&self, count: usize, text: &str) -> Result<(), EncodeError> {
        let leaves_out = |what: &str| Err(refused(format!("the chat template leaves out {what}")));
        for message in &self.prepared.messages[self.done..count] {
            let content = message.content.trim();
            let in_json = || {
                let quoted = serde_json::Value::from(content).to_string();
                text.contains(&quoted[1..quoted.len() - 1])
            };
            if message.role != Role::Assistant && !text.contains(content) && !in_json() {
                return leaves_out(&format!("a message of role {}", message.role.name()));
            }
        }
        let missing = self.prepared.tool_names.iter().find(|name| self.done == 0 && !text.contains(name.as_str()));
        missing.map_or(Ok(()), |name| leaves_out(&format!("the function `{name}`")))
    }

    fn check_calls(&self, index: usize, turn: &str) -> Result<(), EncodeError> {
        let calls = self.prepared.messages[index].tool_calls.iter();
        let mut names = calls.filter_map(|call| call["function"]["name"].as_str());
        match names.find(|name| !turn.contains(name)) {
            None => Ok(()),
            Some(name) => Err(refused(format!("the chat template leaves out the call of `{name}`"))),
        }
    }
}
