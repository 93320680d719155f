//! A conversation to tokens, and which of them have a loss.
//!
//! The mask is found from the template's structure and never by searching text: for each turn of the assistant,
//! `prompt` = the messages before it with the generation prompt, `full` = the messages up to it without; `full` begins with
//! `prompt`, what is left is the turn, and the next turn's `prompt` begins with `full`. A turn ends in a token that stops
//! generation; white space that the template writes after it belongs to the next prompt.
//!
//! Prompts and turns are tokenized one by one and then joined. Tokenized as one text, the end of a prompt and the start of an
//! answer could merge into a token that is neither the prompt's last nor the answer's first, and the model would be trained
//! on prefixes that generation never sees: it starts from the prompt's own tokens.

use super::Row;
use super::report::{BadRowCode, Problem};
use super::template::{ChatTemplate, Message, RenderError, Role};
use crate::spec::TrainOn;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Why a conversation has no tokens.
#[derive(Debug)]
pub(super) enum EncodeError {
    /// This conversation is at fault.
    Row(Problem),
    /// The template or the tokenizer is at fault, for every row.
    Fatal(Error),
}

impl From<Error> for EncodeError {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl From<RenderError> for EncodeError {
    fn from(error: RenderError) -> Self {
        match error {
            RenderError::Refused(message) => {
                let message = format!("the chat template refuses the row: {message}");
                Self::Row(Problem::new("/messages", BadRowCode::TemplateRefused, message))
            }
            broken @ RenderError::Broken(_) => Self::Fatal(broken.into()),
        }
    }
}

/// The tokens of a training row; it ends in the token that ends the assistant's last turn. It is not cut at `max_tokens`, but
/// what follows them has no turns any more: a row of very many turns would be rendered once for each of them.
pub(super) fn encode_row(
    messages: &[Message],
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
    max_tokens: usize,
) -> Result<Row, EncodeError> {
    let mut row = Row::default();
    let mut conversation = Conversation::new(template, tokenizer);
    for (index, message) in messages.iter().enumerate().filter(|(_, message)| message.role == Role::Assistant) {
        if row.tokens.len() >= max_tokens {
            row.push(&conversation.rest(messages)?, false);
            break;
        }
        let (prompt, turn) = conversation.turn(messages, index)?;
        row.push(&prompt, train_on == TrainOn::All);
        row.push(&turn, message.trained);
    }
    // The first token has nothing before it that could predict it.
    if let Some(first) = row.trained.first_mut() {
        *first = false;
    }
    Ok(row)
}

/// The tokens from which a model answers a conversation: the same that training saw before an answer.
///
/// # Errors
/// [`Error::Template`] where the template refuses or fails, or writes a turn that is not the continuation of its prompt.
pub fn chat_prompt(messages: &[Message], template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    let mut conversation = Conversation::new(template, tokenizer);
    let into_error = |error| match error {
        EncodeError::Row(problem) => Error::Template(problem.message),
        EncodeError::Fatal(error) => error,
    };
    for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == Role::Assistant) {
        let (prompt, turn) = conversation.turn(messages, index).map_err(into_error)?;
        tokens.extend(prompt);
        tokens.extend(turn);
    }
    tokens.extend(conversation.prompt(messages).map_err(into_error)?.0);
    Ok(tokens)
}

/// A conversation that is rendered turn by turn.
struct Conversation<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    /// The text of all messages so far.
    rendered: String,
    /// How much of it is in tokens already: all but white space at its end.
    encoded: usize,
}

impl<'a> Conversation<'a> {
    fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer) -> Self {
        Self { template, tokenizer, rendered: String::new(), encoded: 0 }
    }

    /// The tokens since the last turn up to where the assistant answers these messages, and the text of all of it.
    fn prompt(&self, messages: &[Message]) -> Result<(Vec<u32>, String), EncodeError> {
        let prompt = self.render(messages, true)?;
        let mut tokens = self.tokenizer.encode(&prompt[self.encoded..], true)?;
        if self.encoded == 0 && self.tokenizer.adds_bos() {
            // A template that writes BOS itself has written it already.
            let bos = self.tokenizer.bos().filter(|&bos| tokens.first() != Some(&bos));
            tokens.splice(0..0, bos);
        }
        Ok((tokens, prompt))
    }

    /// The tokens since the last turn up to the end of the conversation.
    fn rest(&self, messages: &[Message]) -> Result<Vec<u32>, EncodeError> {
        let full = self.render(messages, false)?;
        Ok(self.tokenizer.encode(full[self.encoded..].trim_end(), true)?)
    }

    /// The text of messages of which some are rendered already.
    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, EncodeError> {
        let text = self.template.try_render(messages, add_generation_prompt)?;
        if text.starts_with(&self.rendered) {
            return Ok(text);
        }
        let message =
            "what it writes for a message is changed by those after it, so the tokens of each turn cannot be told";
        Err(Error::Template(message.into()).into())
    }

    /// The tokens of the prompt before the assistant's message `index`, and those of the message, its end token included.
    fn turn(&mut self, messages: &[Message], index: usize) -> Result<(Vec<u32>, Vec<u32>), EncodeError> {
        let (prompt_tokens, prompt) = self.prompt(&messages[..index])?;
        let full = self.template.try_render(&messages[..=index], false)?;
        let Some(turn) = full.strip_prefix(&prompt) else {
            let message =
                "the assistant's turn does not begin with the generation prompt, so its tokens cannot be told";
            return Err(Error::Template(message.into()).into());
        };
        let turn = turn.trim_end();
        let tokens = self.tokenizer.encode_after(prompt_tokens.last().copied(), turn, true)?;
        if !tokens.last().is_some_and(|last| self.tokenizer.stop_tokens().contains(last)) {
            let stops: Vec<&str> =
                self.tokenizer.stop_tokens().iter().filter_map(|&id| self.tokenizer.token_text(id)).collect();
            let message = format!(
                "the assistant's turn does not end in a token that stops generation ({}), so the model would learn never to stop",
                stops.join(", ")
            );
            return Err(Error::Template(message).into());
        }
        self.encoded = prompt.len() + turn.len();
        self.rendered = full;
        Ok((prompt_tokens, tokens))
    }
}
