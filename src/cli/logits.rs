//! `lorad logits`: the logits of given tokens as JSON, for comparing with other engines.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;

use super::{ModelArgs, chat};

/// Prints the logits that follow each of the given tokens, one JSON array a line.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// PEFT folder
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
}

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used, or a token that the model does not have.
pub fn run(args: &LogitsArgs) -> anyhow::Result<()> {
    let (_, path) = args.model.resolve()?;
    let model = Llama::load(&GgufFile::open(&path)?)?;
    let lora = args.adapter.as_deref().map(|folder| chat::load_adapter(folder, &model)).transpose()?;
    let rows = model.logits(&args.tokens, lora.as_ref())?.to_vec2::<f32>()?;
    let mut stdout = std::io::stdout().lock();
    for row in rows {
        writeln!(stdout, "{}", serde_json::to_string(&row)?)?;
    }
    Ok(())
}
