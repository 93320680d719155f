//! `lorad inspect`: reads one question from stdin, looks into a data set, and writes the answer to stdout.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use lorad_engine::adapter::LoraLayout;
use lorad_engine::data::{self, ChatTemplate, MIN_ROWS, Report};
use lorad_engine::export::{self, Merge};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::{Config, Llama, untrained_tokens};
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::artifacts::quantization;
use super::failure::{self, Fault, Ours};
use crate::hub::{self, Hub};
use crate::memory::Bound;
use crate::types::artifact::{ArtifactRequest, ArtifactType, Quantization};
use crate::types::device::Device;
use crate::types::inspection::{Answer, ArtifactBytes, DatasetReports, Estimate, Inspection, Question, Refusal};
use crate::types::worker_protocol::Finish;

/// How much longer the process lives than the server waits for it.
const GRACE: Duration = Duration::from_secs(5);

/// What `lorad inspect` is told on its command line; the question comes on stdin.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Folder for files; the caller removes it afterwards.
    #[arg(long)]
    scratch: PathBuf,
    /// Folder of `local:` base models.
    #[arg(long)]
    models_dir: PathBuf,
    /// Folder of downloaded base models.
    #[arg(long)]
    cache_dir: PathBuf,
}

/// Answers the question on stdin.
///
/// # Errors
/// Anything that is not the question's own fault.
pub fn run(options: Options) -> anyhow::Result<()> {
    let inspection: Inspection = serde_json::from_reader(std::io::stdin().lock()).context("no question on stdin")?;
    end_after(Duration::from_secs(inspection.seconds) + GRACE)?;
    let answer = answer(&inspection, options)?;
    serde_json::to_writer(std::io::stdout().lock(), &answer).context("cannot write the answer")
}

/// Ends this process when nobody waits any more, also if the server that would kill it is gone.
fn end_after(time: Duration) -> anyhow::Result<()> {
    let run = move || {
        std::thread::sleep(time);
        std::process::exit(1);
    };
    std::thread::Builder::new().name("time".to_owned()).spawn(run).context("cannot start a thread")?;
    Ok(())
}

fn answer(inspection: &Inspection, options: Options) -> anyhow::Result<Answer> {
    let Options { scratch, models_dir, cache_dir } = options;
    let hub = Hub::new(hub::Options { models_dir, cache_dir, endpoint: None, offline: hub::offline() });
    let base = match hub.fetch(&inspection.model) {
        Ok(base) => base.path,
        Err(error) => return refusal(failure::of_hub(error)?),
    };
    let ours = Ours { base, base_name: inspection.model.clone(), scratch };
    let found = match &inspection.question {
        Question::Report => report(inspection, &ours.base),
        Question::Preview { rows } => preview(inspection, &ours.base, *rows),
        Question::Estimate { artifacts, memory_bytes, device } => {
            estimate(inspection, &ours, artifacts, (*memory_bytes, *device))
        }
    };
    match found {
        Ok(answer) => Ok(answer),
        Err(fault) => refusal(failure::of_engine(fault, &ours)?),
    }
}

fn refusal(finish: Finish) -> anyhow::Result<Answer> {
    match finish {
        Finish::Failed { code, message, param, .. } => Ok(Answer::Failed(Refusal { code, message, param })),
        Finish::Succeeded { .. } | Finish::Stopped => anyhow::bail!("an error is no success"),
    }
}

/// The engine's figures in the API's words, which are the same.
fn in_our_words<T: DeserializeOwned>(found: &impl Serialize) -> Result<T, lorad_engine::Error> {
    let value = serde_json::to_value(found).and_then(serde_json::from_value);
    value.map_err(|error| lorad_engine::Error::Io { path: PathBuf::from("answer"), source: error.into() })
}

fn report(inspection: &Inspection, base: &Path) -> Result<Answer, Fault> {
    let Inspection { spec, training_file, validation_file, .. } = inspection;
    let base = GgufFile::open(base)?;
    let tokenizer = Tokenizer::from_gguf(&base)?;
    let context_length = Config::from_gguf(&base)?.context_length;
    let _bound = Bound::begin();
    let survey = |path, training| data::survey(path, spec, &tokenizer, context_length, training, &mut || ());
    let (training, hashes) = survey(training_file, None)?;
    let validation = validation_file.as_deref().map(|path| survey(path, Some(&hashes))).transpose();
    let validation = validation.map_err(Fault::OfValidationFile)?.map(|(report, _)| report);
    let untrained = untrained_tokens(&base, &training.control_tokens)?;
    let error = |report: Report, needed| report.verdict(needed).err().map(|error| error.to_string());
    Ok(Answer::Report(Box::new(DatasetReports {
        training: in_our_words(&training)?,
        validation: validation.as_ref().map(in_our_words).transpose()?,
        untrained_tokens: untrained.into_iter().filter_map(|id| Some(tokenizer.token_text(id)?.to_owned())).collect(),
        training_error: error(training, MIN_ROWS),
        validation_error: validation.and_then(|report| error(report, 1)),
    })))
}

fn preview(inspection: &Inspection, base: &Path, rows: usize) -> Result<Answer, Fault> {
    let base = GgufFile::open(base)?;
    let tokenizer = Tokenizer::from_gguf(&base)?;
    let context_length = Config::from_gguf(&base)?.context_length;
    let _bound = Bound::begin();
    let preview = data::preview(&inspection.training_file, &inspection.spec, &tokenizer, context_length, rows)?;
    Ok(Answer::Preview(in_our_words(&preview)?))
}

fn estimate(
    inspection: &Inspection,
    ours: &Ours,
    artifacts: &[ArtifactRequest],
    (memory_bytes, device): (Option<u64>, Device),
) -> Result<Answer, Fault> {
    let Inspection { spec, training_file, validation_file, .. } = inspection;
    let base = GgufFile::open(&ours.base)?;
    let model = Llama::load(&base)?;
    let tokenizer = Tokenizer::from_gguf(&base)?;
    let bound = Bound::begin();
    let read =
        |path: &Path| data::prepare(path, spec, &tokenizer, model.config().context_length, &ours.scratch, &mut || ());
    let dataset = read(training_file)?;
    let validation = validation_file.as_deref().map(read).transpose().map_err(Fault::OfValidationFile)?;
    drop(bound);
    let fit = train::fit(spec, &model, &dataset, validation.as_ref(), memory_bytes, device)?;
    // Memory is looked at before the passes that measure the rate take theirs.
    let needed = train::estimate(spec, &model, &dataset, validation.as_ref(), None, device)?;
    // Who trains on a GPU must not lose its memory to a question.
    let rate = if fit.fits && device == Device::Cpu {
        Some(train::measure_rate(spec, &model, &dataset, device)?)
    } else {
        None
    };
    let seconds = match rate {
        None => None,
        Some(_) => train::estimate(spec, &model, &dataset, validation.as_ref(), rate, device)?.seconds,
    };
    let template = ChatTemplate::for_export(&spec.dataset.template, &tokenizer)?;
    let chat_template = template.as_ref().and_then(ChatTemplate::replacement);
    let merge = Merge { base: &base, lora: Some(&spec.lora), name_suffix: None, chat_template };
    let lora_bytes = LoraLayout::new(&spec.lora, &model.config().shape).len() as u64 * 4;
    let artifacts = artifacts.iter().map(|artifact| artifact_bytes(artifact, &merge, lora_bytes));
    let artifacts = artifacts.collect::<Result<Vec<_>, _>>()?;
    Ok(Answer::Estimate(Estimate {
        total_steps: needed.total_steps.into(),
        tokens: needed.tokens,
        evaluated_tokens: needed.evaluated_tokens,
        largest_micro_batch: needed.largest_micro_batch,
        kept_layers: needed.kept_layers,
        layers: needed.layers,
        trainable_parameters: needed.trainable_parameters,
        tokens_per_second: rate,
        seconds,
        peak_host_bytes: needed.peak_host_bytes,
        device,
        peak_device_bytes: needed.peak_device_bytes,
        device_total_bytes: needed.device_total_bytes,
        least_bytes: fit.least_bytes,
        memory_bytes: fit.memory_bytes,
        fits: fit.fits,
        nearest: in_our_words(&fit.nearest)?,
        checkpoint_bytes: needed.checkpoint_bytes,
        artifacts,
    }))
}

fn artifact_bytes(
    artifact: &ArtifactRequest,
    merge: &Merge<'_>,
    lora_bytes: u64,
) -> Result<ArtifactBytes, lorad_engine::Error> {
    let bytes = match artifact.kind {
        ArtifactType::Adapter | ArtifactType::GgufLora => lora_bytes,
        ArtifactType::Gguf | ArtifactType::Ollama => {
            let quantization = quantization(artifact.quantization.unwrap_or(Quantization::DEFAULT));
            export::merged_gguf_bytes(merge, quantization)?
        }
        ArtifactType::Merged => {
            merge.base.tensors().iter().map(|tensor| (tensor.rows() * tensor.columns() * 2) as u64).sum()
        }
    };
    Ok(ArtifactBytes { kind: artifact.kind, quantization: artifact.quantization, bytes })
}
