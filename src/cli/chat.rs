//! `lorad chat`: one stream from a base model, with or without an adapter.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lorad_engine::adapter::{LoraLayout, LoraParams, peft_spec};
use lorad_engine::data::{self, ChatTemplate, Message, Role};
use lorad_engine::generate::{FinishReason, GenerateSpec, generate};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::spec::Template;
use lorad_engine::tokenizer::Tokenizer;

use super::ModelArgs;
use crate::memory::Bound;

/// Talks to a model, with or without an adapter, by the training's own templates and forward pass.
///
/// With --prompt it answers once; without, it reads a turn a line from standard input and remembers the conversation.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// PEFT folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Prompt text, as in training: auto (the model's own chat template), alpaca, a Jinja text, or @FILE that holds one
    #[arg(long, value_parser = super::dataset::template, default_value = "auto")]
    template: Template,
    /// What to say
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Share of probability to draw from
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 3407)]
    seed: u64,
}

/// Reads a PEFT folder for that model.
pub(super) fn load_adapter(folder: &Path, model: &Llama) -> anyhow::Result<LoraParams> {
    let spec = peft_spec(folder)?;
    let lora = LoraParams::zeros(LoraLayout::new(&spec, &model.config().shape))?;
    lora.load_peft(folder)?;
    Ok(lora)
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, a conversation longer than the model's context.
pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let (_, path) = args.model.resolve()?;
    let file = GgufFile::open(&path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let model = Llama::load(&file)?;
    let lora = args.adapter.as_deref().map(|folder| load_adapter(folder, &model)).transpose()?;
    let bound = Bound::begin();
    let template = ChatTemplate::for_model(&args.template, &tokenizer)?;
    drop(bound);
    let spec =
        GenerateSpec { max_tokens: args.max_tokens, temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let mut messages: Vec<Message> = args.system.iter().map(|system| Message::new(Role::System, system)).collect();
    let answer = |messages: &[Message]| -> anyhow::Result<String> {
        let bound = Bound::begin();
        let prompt = data::chat_prompt(messages, &template, &tokenizer)?;
        drop(bound);
        let mut print = |text: &str| match print_now(text) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        let answer = generate(&model, &tokenizer, lora.as_ref(), &prompt, &spec, &mut print)?;
        if answer.finish_reason != FinishReason::Broken {
            print_now("\n").context("cannot write the answer")?;
        }
        Ok(answer.text)
    };
    if let Some(prompt) = &args.prompt {
        messages.push(Message::new(Role::User, prompt));
        answer(&messages)?;
        return Ok(());
    }
    let prompt_sign = if std::io::stdin().is_terminal() { "> " } else { "" };
    print_now(prompt_sign)?;
    for line in std::io::stdin().lock().lines() {
        messages.push(Message::new(Role::User, line.context("cannot read standard input")?));
        let text = answer(&messages)?;
        messages.push(Message::new(Role::Assistant, text));
        print_now(prompt_sign)?;
    }
    Ok(())
}

fn print_now(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
