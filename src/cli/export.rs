//! `lorad export`: an adapter and its base in every form that other programs take.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lorad_engine::data::ChatTemplate;
use lorad_engine::export::{ExportKind, Exported, ModelCard, Progress, Quantization, Tuned, Wanted};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::spec::Template;
use lorad_engine::tokenizer::Tokenizer;

use super::{ModelArgs, chat, stop_on_ctrl_c};
use crate::hub::Reference;
use crate::types::artifact::{self, ArtifactType};

/// Exports a base model with an adapter, lorad's or any LoRA that PEFT saved.
///
/// Each file is read back and compared with base and adapter before it gets its name; the comparison is printed as JSON, a line
/// an export, and goes to standard error in words. Written into --output: adapter/ (for PEFT, with a README.md), model-TYPE.gguf
/// (merged), lora.gguf (for llama-cli --lora), merged/ (16-bit safetensors for transformers), ollama-TYPE/ (a GGUF file and a
/// Modelfile for ollama create). What is there already is not touched: the command then ends with an error before it begins.
/// Ctrl-C leaves nothing half.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// PEFT folder: adapter_config.json and adapter_model.safetensors
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// What to make: adapter, gguf, gguf_lora, merged, ollama (may be given more than once) [default: gguf]
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<ArtifactType>,
    /// How the GGUF files of gguf and ollama store their matrices (may be given more than once) [default: q4_k_m]
    #[arg(long, value_name = "NAME", value_parser = quantization)]
    quantization: Vec<Quantization>,
    /// Folder for what is made
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// What the tuned model is called, after its base's name [default: the name of the adapter's folder]
    #[arg(long)]
    name: Option<String>,
    /// Prompt text that the adapter was trained with, which merged models then carry as their chat template: auto (the model's
    /// own), alpaca, a Jinja text, or @FILE that holds one
    #[arg(long, value_parser = super::dataset::template, default_value = "auto")]
    template: Template,
    /// Put the GGUF files of type gguf where LM Studio looks for them below --output: PUBLISHER/MODEL/MODEL-TYPE.gguf
    #[arg(long, value_name = "PUBLISHER/MODEL", value_parser = lmstudio)]
    lmstudio: Option<LmStudio>,
}

/// A model's place in LM Studio's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LmStudio {
    publisher: String,
    model: String,
}

fn lmstudio(text: &str) -> Result<LmStudio, String> {
    let plain = |part: &str| {
        let characters = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        !part.is_empty() && characters && !part.starts_with('.')
    };
    match text.split_once('/') {
        Some((publisher, model)) if plain(publisher) && plain(model) => {
            Ok(LmStudio { publisher: publisher.to_owned(), model: model.to_owned() })
        }
        _ => Err("must be PUBLISHER/MODEL, both of letters, digits, `-`, `_` and `.`".to_owned()),
    }
}

/// Reads a quantization's name.
pub(super) fn quantization(name: &str) -> Result<Quantization, String> {
    let names = Quantization::ALL.map(Quantization::name).join(", ");
    Quantization::from_name(name).ok_or_else(|| format!("expected one of {names}"))
}

impl ExportArgs {
    /// Every export and its place, each once.
    fn wanted(&self) -> anyhow::Result<Vec<Wanted>> {
        let types = if self.types.is_empty() { &[ArtifactType::Gguf][..] } else { &self.types };
        let default = quantization(artifact::Quantization::DEFAULT.as_str()).map_err(anyhow::Error::msg)?;
        let quantizations = if self.quantization.is_empty() { &[default][..] } else { &self.quantization };
        if let (Some(quantization), false) =
            (self.quantization.first(), types.iter().any(|kind| kind.takes_quantization()))
        {
            bail!(
                "--quantization {} is for the types gguf and ollama, none of which is asked for",
                quantization.name()
            );
        }
        if self.lmstudio.is_some() && !types.contains(&ArtifactType::Gguf) {
            bail!("--lmstudio is for the type gguf, which is not asked for");
        }
        let mut wanted: Vec<Wanted> = Vec::new();
        for kind in types.iter().flat_map(|&kind| kinds(kind, quantizations)) {
            if !wanted.iter().any(|other| other.kind == kind) {
                wanted.push(Wanted { kind, path: self.place(kind) });
            }
        }
        Ok(wanted)
    }

    fn place(&self, kind: ExportKind) -> PathBuf {
        match (kind, &self.lmstudio) {
            (ExportKind::Adapter, _) => self.output.join("adapter"),
            (ExportKind::GgufLora, _) => self.output.join("lora.gguf"),
            (ExportKind::Merged, _) => self.output.join("merged"),
            (ExportKind::Ollama(quantization), _) => self.output.join(format!("ollama-{}", quantization.name())),
            (ExportKind::Gguf(quantization), None) => self.output.join(format!("model-{}.gguf", quantization.name())),
            (ExportKind::Gguf(quantization), Some(LmStudio { publisher, model })) => {
                self.output.join(publisher).join(model).join(format!("{model}-{}.gguf", quantization.name()))
            }
        }
    }

    fn name(&self) -> String {
        let of_folder = || {
            let folder = self.adapter.canonicalize().ok()?;
            Some(folder.file_name()?.to_string_lossy().into_owned())
        };
        self.name.clone().or_else(of_folder).unwrap_or_else(|| "tuned".to_owned())
    }
}

fn kinds(kind: ArtifactType, quantizations: &[Quantization]) -> Vec<ExportKind> {
    match kind {
        ArtifactType::Adapter => vec![ExportKind::Adapter],
        ArtifactType::GgufLora => vec![ExportKind::GgufLora],
        ArtifactType::Merged => vec![ExportKind::Merged],
        ArtifactType::Gguf => quantizations.iter().map(|&quantization| ExportKind::Gguf(quantization)).collect(),
        ArtifactType::Ollama => quantizations.iter().map(|&quantization| ExportKind::Ollama(quantization)).collect(),
    }
}

/// The base as a model hub names it, or the name of its file: where that lies on this machine is nobody's business.
pub(super) fn hub_name(base: &str) -> String {
    let repository = Reference::parse(base).ok().and_then(|reference| reference.repository_id());
    let file_name = || Path::new(base).file_name().map(|name| name.to_string_lossy().into_owned());
    repository.or_else(file_name).unwrap_or_else(|| base.to_owned())
}

/// Runs the command.
///
/// # Errors
/// A base or an adapter that cannot be used, a file that is there already or does not compute what it must, a full disk, Ctrl-C.
pub fn run(args: &ExportArgs) -> anyhow::Result<()> {
    let wanted = args.wanted()?;
    let (base_name, path) = args.model.resolve()?;
    let base = GgufFile::open(&path)?;
    let tokenizer = Tokenizer::from_gguf(&base)?;
    let model = Llama::load(&base)?;
    let lora = chat::load_adapter(&args.adapter, &model)
        .with_context(|| format!("cannot export {}", args.adapter.display()))?;
    let template = ChatTemplate::for_export(&args.template, &tokenizer).context("--template cannot be used")?;
    let (name, base_model) = (args.name(), hub_name(&base_name));
    let card = ModelCard { name: &name, base_model: &base_model, lora: lora.layout().spec(), training: None };
    let tuned = Tuned {
        base: &base,
        model: &model,
        tokenizer: &tokenizer,
        template: template.as_ref(),
        lora: &lora,
        name_suffix: &name,
        card: &card,
    };
    let stop = stop_on_ctrl_c("stopping; Ctrl-C again stops at once")?;
    let made = export(&tuned, &wanted, &stop)?;
    let Some(made) = made else { bail!("stopped: nothing was left in {}", args.output.display()) };
    print(&made)
}

/// Makes the exports with a progress bar; `None` where Ctrl-C came first.
pub(super) fn export(tuned: &Tuned<'_>, wanted: &[Wanted], stop: &AtomicBool) -> anyhow::Result<Option<Vec<Exported>>> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {elapsed}")?);
    let mut on_progress = |kind: ExportKind, progress: Progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(kind.to_string());
        match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let made = tuned.export(wanted, &mut on_progress)?;
    bar.finish_and_clear();
    Ok(made)
}

fn print(made: &[Exported]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    for exported in made {
        eprintln!("{}: {}", exported.path.display(), exported.parity);
        writeln!(stdout, "{}", serde_json::to_string(exported)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_lm_studio_is_two_plain_names() {
        let right = LmStudio { publisher: "me".into(), model: "my-model.v1".into() };
        assert_eq!(lmstudio("me/my-model.v1"), Ok(right));
        for wrong in ["me", "me/", "/model", "../model", "me/..", "me/a/b", "me/a b"] {
            assert!(lmstudio(wrong).is_err(), "{wrong}");
        }
    }
}
