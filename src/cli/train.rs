//! `lorad train`: the server's training without a server.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lorad_engine::adapter::peft_spec;
use lorad_engine::data::{self, ChatTemplate, Dataset};
use lorad_engine::export::{
    ExportKind, Merge, ModelCard, Quantization, TrainingFacts, Tuned, Wanted, merged_gguf_bytes,
};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::spec::{
    ComputeType, EarlyStopping, GradientCheckpointing, LoraOptions, LrScheduler, Optimizer, TrainOptions, TrainSpec,
    TrainingOptions,
};
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train::{self, Checkpoint, Estimate, Evaluation, Outcome, Start, StepMetrics, TrainEvent};

use super::dataset::{DatasetArgs, about, describe, list_bad_rows, untrained_texts, write_untrained};
use super::devices::WantedDevice;
use super::{ModelArgs, export, named, stop_on_ctrl_c};
use crate::memory::Bound;
use crate::types::device::Device;

const CHECKPOINT_FILE: &str = "checkpoint.safetensors";
const METRICS_FILE: &str = "metrics.csv";
const METRICS_HEADER: &str = "step,epoch,train_loss,train_mean_token_accuracy,learning_rate,grad_norm,trained_tokens,valid_loss,valid_mean_token_accuracy,step_ms";
/// Longest time without a checkpoint.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);

/// Trains a LoRA on this machine, without a server.
///
/// Writes a PEFT adapter (adapter_config.json, adapter_model.safetensors, README.md), metrics.csv and checkpoint.safetensors into --out.
/// Ctrl-C stops at the end of the step with a checkpoint; the same command with --resume goes on from it.
#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Data set: JSON array or JSONL
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Data set to evaluate at the end of each epoch, or every --eval-steps, and at the end
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// Folder for what is made
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Say what the run would need (steps, time, memory, disk, the files of --gguf too), measured on two passes of one micro-batch, and stop
    #[arg(long, conflicts_with = "resume")]
    estimate: bool,
    /// Go on from the checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// What to train on, as `lorad devices` lists it: auto (the first GPU, the CPU where there is none), cpu, cuda:0
    #[arg(long, default_value = "auto")]
    device: WantedDevice,
    /// PEFT folder whose values the LoRA starts with; what is not said about the LoRA is taken from it
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Also write the merged model, as `lorad export` does, as model-q4_k_m.gguf for one: f32, f16, bf16, q8_0, q6_k, q5_k_m,
    /// q5_k_s, q5_0, q4_k_m, q4_k_s, q4_0, q3_k_m, q2_k (may be given several times)
    #[arg(long, value_name = "TYPE", value_parser = export::quantization)]
    gguf: Vec<Quantization>,
    /// Seed of LoRA initialisation and shuffling [default: 3407]
    #[arg(long)]
    seed: Option<u64>,
    /// Passes over the data set, unless --max-steps is given [default: 3]
    #[arg(long)]
    n_epochs: Option<u32>,
    #[command(flatten)]
    lora: LoraArgs,
    #[command(flatten)]
    training: TrainingArgs,
    #[command(flatten)]
    dataset: DatasetArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "LoRA")]
struct LoraArgs {
    /// Rank [default: 16]
    #[arg(long)]
    r: Option<u32>,
    /// Numerator of the scale alpha/r [default: 16]
    #[arg(long)]
    alpha: Option<f64>,
    /// Share of the LoRA's input that is dropped in training, in [0, 1) [default: 0]
    #[arg(long, allow_negative_numbers = true)]
    dropout: Option<f64>,
    /// Scale alpha/√r
    #[arg(long)]
    use_rslora: bool,
    /// Projections that get a LoRA, separated by commas [default: all seven]
    #[arg(long, value_delimiter = ',')]
    target_modules: Option<Vec<String>>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Training", allow_negative_numbers = true)]
struct TrainingArgs {
    /// Optimizer steps, instead of epochs
    #[arg(long)]
    max_steps: Option<u32>,
    /// Rows computed at once [default: 2]
    #[arg(long)]
    micro_batch_size: Option<u32>,
    /// Micro-batches a step [default: 4]
    #[arg(long)]
    gradient_accumulation_steps: Option<u32>,
    /// Peak learning rate [default: 2e-4]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Steps in which the learning rate rises from 0 [default: 5]
    #[arg(long)]
    warmup_steps: Option<u32>,
    /// Schedule after warm-up: linear, cosine, constant [default: linear]
    #[arg(long, value_parser = named::<LrScheduler>)]
    lr_scheduler: Option<LrScheduler>,
    /// Decoupled weight decay [default: 0.01]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Optimizer: adamw, adamw_8bit (less memory) [default: adamw]
    #[arg(long, value_parser = named::<Optimizer>)]
    optimizer: Option<Optimizer>,
    /// Largest global norm of the gradient [default: 1]
    #[arg(long)]
    max_grad_norm: Option<f64>,
    /// Tokens a row may have [default: 2048, or the model's context length]
    #[arg(long)]
    max_seq_length: Option<u32>,
    /// Whether rows are drawn in a new order every epoch [default: true]
    #[arg(long)]
    shuffle: Option<bool>,
    /// Whether the rows of a micro-batch lie end to end instead of being padded [default: true]
    #[arg(long)]
    packing: Option<bool>,
    /// Which activations are kept for the backward pass: auto, none (keep all), full (recompute) [default: auto]
    #[arg(long, value_parser = named::<GradientCheckpointing>)]
    gradient_checkpointing: Option<GradientCheckpointing>,
    /// Type of the operands of products: auto (bf16 where the processor is fast in it, else f32), f32, bf16 [default: auto]
    #[arg(long, value_parser = named::<ComputeType>)]
    compute: Option<ComputeType>,
    /// Steps between evaluations of --validation [default: one at the end of each epoch]
    #[arg(long)]
    eval_steps: Option<u32>,
    /// Steps between checkpoints, beside those of every minute [default: one at the end of each epoch]
    #[arg(long)]
    save_steps: Option<u32>,
    /// End after so many evaluations in a row without a better loss; the result is the best one's adapter [default: off]
    #[arg(long, value_name = "EVALUATIONS")]
    early_stopping_patience: Option<u32>,
    /// How much lower a loss must be to count as better; turns early stopping on, with patience 3 [default: 0]
    #[arg(long, value_name = "NATS")]
    early_stopping_min_delta: Option<f64>,
}

impl TrainingArgs {
    fn early_stopping(&self) -> Option<EarlyStopping> {
        let (patience, min_delta) = (self.early_stopping_patience, self.early_stopping_min_delta);
        if patience.is_none() && min_delta.is_none() {
            return None;
        }
        let off = EarlyStopping::default();
        let (patience, min_delta) = (patience.unwrap_or(off.patience), min_delta.unwrap_or(off.min_delta));
        Some(EarlyStopping { patience, min_delta })
    }
}

impl TrainArgs {
    fn options(&self) -> anyhow::Result<TrainOptions> {
        let (training, dataset) = (&self.training, &self.dataset);
        let mut options = TrainOptions {
            seed: self.seed,
            n_epochs: self.n_epochs,
            lora: LoraOptions {
                r: self.lora.r,
                alpha: self.lora.alpha,
                dropout: self.lora.dropout,
                use_rslora: self.lora.use_rslora.then_some(true),
                target_modules: self.lora.target_modules.clone(),
            },
            training: TrainingOptions {
                max_steps: training.max_steps,
                micro_batch_size: training.micro_batch_size,
                gradient_accumulation_steps: training.gradient_accumulation_steps,
                learning_rate: training.learning_rate,
                warmup_steps: training.warmup_steps,
                lr_scheduler: training.lr_scheduler,
                weight_decay: training.weight_decay,
                optimizer: training.optimizer,
                max_grad_norm: training.max_grad_norm,
                max_seq_length: training.max_seq_length,
                shuffle: training.shuffle,
                packing: training.packing,
                gradient_checkpointing: training.gradient_checkpointing,
                compute: training.compute,
                eval_steps: training.eval_steps,
                save_steps: training.save_steps,
                early_stopping: training.early_stopping(),
            },
            dataset: dataset.options(),
            ..TrainOptions::default()
        };
        if let Some(folder) = &self.init_from {
            options.lora.inherit(&peft_spec(folder)?)?;
        }
        Ok(options)
    }
}

/// Runs the command.
///
/// # Errors
/// Anything that keeps the adapter from being made, said so that the user knows what to change.
pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    lorad_engine::allocator::keep_freed_memory();
    let device = args.device.find()?;
    let spec = TrainSpec::resolve(&args.options()?)?;
    let (name, path) = args.model.resolve()?;
    let wanted = merged_files(args)?;
    let work = Work::prepare(args, spec, name, &path, device)?;
    if args.estimate {
        return tell_estimate(&work, &work.title(args), &args.gguf);
    }
    let stop = stop_on_ctrl_c("stopping at the end of this step; Ctrl-C again stops at once")?;
    let outcome = work.train(args, &stop)?;
    if !outcome.completed {
        let step = outcome.step;
        bail!("stopped after step {step}; the same command with --resume goes on from there");
    }
    if let Some(best) = outcome.best {
        let stopped =
            if outcome.stopped_early { format!("stopped early after step {}; ", outcome.step) } else { String::new() };
        eprintln!("{stopped}the best validation loss, {:.4}, is that of step {}", best.loss, best.step);
    }
    work.publish(args, &outcome, &wanted, &stop)
}

/// What is trained, on what.
struct Work {
    spec: TrainSpec,
    /// What the user calls the model.
    name: String,
    file: GgufFile,
    tokenizer: Tokenizer,
    model: Llama,
    dataset: Dataset,
    validation: Option<Dataset>,
    device: Device,
}

impl Work {
    /// Reads the model and the data sets, and tells what they hold.
    fn prepare(args: &TrainArgs, spec: TrainSpec, name: String, path: &Path, device: Device) -> anyhow::Result<Self> {
        let file = GgufFile::open(path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let model = Llama::load(&file)?;
        std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
        let read = |path: &Path, what: &str| {
            let dataset = data::prepare(path, &spec, &tokenizer, model.config().context_length, &args.out, &mut || ())
                .inspect_err(list_bad_rows)
                .map_err(about(what, path))?;
            describe(&dataset.report);
            anyhow::Ok(dataset)
        };
        let bound = Bound::begin();
        let dataset = read(&args.data, "cannot train on")?;
        write_untrained(&mut std::io::stderr(), &untrained_texts(&file, &tokenizer, &dataset.report)?)?;
        let validation = args.validation.as_ref().map(|path| read(path, "cannot evaluate")).transpose()?;
        drop(bound);
        Ok(Self { spec, name, file, tokenizer, model, dataset, validation, device })
    }

    /// What the result is called: its folder's name.
    fn title(&self, args: &TrainArgs) -> String {
        args.out.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn train(&self, args: &TrainArgs, stop: &AtomicBool) -> anyhow::Result<Outcome> {
        let start = Start {
            resume: resume_point(args)?,
            init_from: args.init_from.clone(),
            validation: self.validation.as_ref(),
            memory_budget_bytes: None,
            checkpoint_interval: Some(CHECKPOINT_INTERVAL),
            device: self.device,
        };
        eprintln!("training on {}", self.device);
        let mut display = Display::new(&args.out, start.resume.as_ref().map_or(0, Checkpoint::step))?;
        let mut on_event = |event: TrainEvent<'_>| display.handle(&event, stop);
        let outcome = train::train(&self.spec, &self.model, &self.dataset, start, &mut on_event);
        let outcome = outcome.map_err(|error| self.with_advice(error))?;
        display.finish()?;
        Ok(outcome)
    }

    /// Where a GPU had too little memory, adds the settings that fit.
    fn with_advice(&self, error: lorad_engine::Error) -> anyhow::Error {
        let (lorad_engine::Error::DeviceMemory { .. }, Device::Cuda(ordinal)) = (&error, self.device) else {
            return error.into();
        };
        match train::fit_now(&self.spec, &self.model, &self.dataset, self.validation.as_ref(), ordinal) {
            Ok(fit) if !fit.fits => anyhow!("{error}: {fit}"),
            _ => error.into(),
        }
    }

    /// Writes the adapter, and the merged models that are asked for.
    fn publish(&self, args: &TrainArgs, outcome: &Outcome, wanted: &[Wanted], stop: &AtomicBool) -> anyhow::Result<()> {
        let training = TrainingFacts {
            spec: &self.spec,
            report: &self.dataset.report,
            steps: outcome.step,
            trained_tokens: outcome.trained_tokens,
            train_loss: last_loss(&args.out.join(METRICS_FILE))?,
            best: outcome.best,
        };
        let (title, base_model) = (self.title(args), export::hub_name(&self.name));
        let lora = outcome.lora.layout().spec();
        let card = ModelCard { name: &title, base_model: &base_model, lora, training: Some(training) };
        card.save_adapter(&outcome.lora, &args.out)?;
        eprintln!("adapter: {}", args.out.display());
        if wanted.is_empty() {
            return Ok(());
        }
        let template = ChatTemplate::for_export(&self.spec.dataset.template, &self.tokenizer)?;
        let tuned = Tuned {
            base: &self.file,
            model: &self.model,
            tokenizer: &self.tokenizer,
            template: template.as_ref(),
            lora: &outcome.lora,
            name_suffix: &title,
            card: &card,
        };
        let Some(made) = export::export(&tuned, wanted, stop)? else {
            bail!("stopped before the merged model was whole; the same command with --resume goes on from there");
        };
        made.iter().for_each(|made| eprintln!("merged model: {}: {}", made.path.display(), made.parity));
        Ok(())
    }
}

/// The merged files that are asked for, each once. One that is there already is told before the training.
fn merged_files(args: &TrainArgs) -> anyhow::Result<Vec<Wanted>> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for &quantization in &args.gguf {
        let kind = ExportKind::Gguf(quantization);
        let path = args.out.join(format!("model-{}.gguf", quantization.name()));
        if path.exists() {
            bail!("{} is there already: remove it, or leave out --gguf {}", path.display(), quantization.name());
        }
        if !wanted.iter().any(|other| other.kind == kind) {
            wanted.push(Wanted { kind, path });
        }
    }
    Ok(wanted)
}

/// Prints what a run and its merged files would need, a name and a value a line.
fn tell_estimate(work: &Work, title: &str, quantizations: &[Quantization]) -> anyhow::Result<()> {
    let Work { spec, file, tokenizer, model, dataset, device, .. } = work;
    let (validation, device) = (work.validation.as_ref(), *device);
    let template = ChatTemplate::for_export(&spec.dataset.template, tokenizer)?;
    let chat_template = template.as_ref().and_then(ChatTemplate::replacement);
    let merge = Merge { base: file, lora: Some(&spec.lora), name_suffix: Some(title), chat_template };
    // Memory is looked at before the passes that measure the rate take theirs.
    let before = train::estimate(spec, model, dataset, validation, None, device)?;
    let rate = match train::measure_rate(spec, model, dataset, device) {
        Err(error @ lorad_engine::Error::DeviceMemory { .. }) => {
            eprintln!("no rate was measured: {error}");
            None
        }
        rate => Some(rate?),
    };
    let timed = train::estimate(spec, model, dataset, validation, rate, device)?;
    let estimate = Estimate { seconds: timed.seconds, ..before };
    let mut out = std::io::stdout().lock();
    let fields = serde_json::to_value(&estimate)?;
    // What is null there is not of this device.
    for (name, value) in fields.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        writeln!(out, "{name} {value}")?;
    }
    if let Some(rate) = rate {
        writeln!(out, "tokens_per_second {rate:.1}")?;
    }
    for &quantization in quantizations {
        writeln!(out, "gguf_{}_bytes {}", quantization.name(), merged_gguf_bytes(&merge, quantization)?)?;
    }
    Ok(())
}

fn resume_point(args: &TrainArgs) -> anyhow::Result<Option<Checkpoint>> {
    let path = args.out.join(CHECKPOINT_FILE);
    match (args.resume, path.exists()) {
        (true, _) => Ok(Some(Checkpoint::load(&path)?)),
        (false, true) => bail!("{} is there already: add --resume to go on from it, or remove it", path.display()),
        (false, false) => Ok(None),
    }
}

/// The progress bar, metrics.csv and the checkpoint file.
struct Display {
    bar: ProgressBar,
    metrics: std::fs::File,
    checkpoint_path: PathBuf,
    error: Option<anyhow::Error>,
    quiet: bool,
}

impl Display {
    fn new(out: &Path, resumed_from: u32) -> anyhow::Result<Self> {
        let path = out.join(METRICS_FILE);
        let kept = kept_metrics(&path, resumed_from)?;
        std::fs::write(&path, kept).with_context(|| format!("cannot write {}", path.display()))?;
        let metrics = OpenOptions::new().append(true).open(&path)?;
        let quiet = !std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {elapsed} left {eta}")?);
        Ok(Self { bar, metrics, checkpoint_path: out.join(CHECKPOINT_FILE), error: None, quiet })
    }

    fn handle(&mut self, event: &TrainEvent<'_>, stop: &AtomicBool) -> ControlFlow<()> {
        let done = match event {
            TrainEvent::Started { total_steps, resumed_from, trainable_parameters } => {
                eprintln!("{trainable_parameters} trained parameters, {total_steps} steps, {resumed_from} done");
                self.bar.set_length(u64::from(*total_steps));
                self.bar.set_position(u64::from(*resumed_from));
                self.bar.reset_eta();
                Ok(())
            }
            TrainEvent::Evaluating { rows, total_rows, .. } => {
                self.bar.set_message(format!("evaluating row {rows} of {total_rows}"));
                Ok(())
            }
            TrainEvent::Step(metrics) => self.step(metrics),
            TrainEvent::Checkpoint { checkpoint, .. } => checkpoint.save(&self.checkpoint_path).map_err(Into::into),
        };
        if let Err(error) = done {
            self.error = Some(error);
        }
        if self.error.is_some() || stop.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn step(&mut self, m: &StepMetrics) -> anyhow::Result<()> {
        let speed = m.step_tokens as f64 * 1000.0 / m.step_ms.max(1) as f64;
        let mut message = format!("loss {:.4} accuracy {:.3} {speed:.0} trained tokens/s", m.loss, m.token_accuracy);
        let mut valid = ",".to_owned();
        if let Some(Evaluation { loss, token_accuracy }) = m.evaluation {
            write!(message, " validation loss {loss:.4} accuracy {token_accuracy:.3}")?;
            valid = format!("{loss:.6},{token_accuracy:.6}");
        }
        if self.quiet {
            eprintln!("step {}/{} {message}", m.step, m.total_steps);
        }
        self.bar.set_message(message);
        self.bar.set_position(u64::from(m.step));
        writeln!(
            self.metrics,
            "{},{:.4},{:.6},{:.6},{:e},{:.6},{},{valid},{}",
            m.step, m.epoch, m.loss, m.token_accuracy, m.learning_rate, m.grad_norm, m.trained_tokens, m.step_ms
        )
        .context("cannot write metrics.csv")
    }

    fn finish(self) -> anyhow::Result<()> {
        self.bar.finish();
        self.error.map_or(Ok(()), Err)
    }
}

/// The lines of an earlier run's metrics.csv that a run going on from `resumed_from` will not write again.
fn kept_metrics(path: &Path, resumed_from: u32) -> anyhow::Result<String> {
    let mut kept = format!("{METRICS_HEADER}\n");
    if resumed_from > 0 && path.exists() {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let step = |line: &str| line.split(',').next().and_then(|step| step.parse::<u32>().ok());
        for line in text.lines().filter(|line| step(line).is_some_and(|step| step <= resumed_from)) {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    Ok(kept)
}

/// The loss of the last step in metrics.csv, which an interrupted run has from its earlier parts.
fn last_loss(path: &Path) -> anyhow::Result<Option<f64>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().last().and_then(|line| line.split(',').nth(2)?.parse().ok()))
}
