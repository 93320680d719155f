//! The training loop: synchronous, no channels; every step, and every moment at which a checkpoint is due, is an event.

mod checkpoint;
mod schedule;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use checkpoint::Checkpoint;
pub use schedule::learning_rate;

use crate::adapter::{LoraLayout, LoraParams};
use crate::data::{Dataset, Loader, MicroBatch};
use crate::model::Llama;
use crate::ops::adamw::{self, Update};
use crate::ops::cross_entropy::Loss;
use crate::ops::host;
use crate::spec::{GradientCheckpointing, TrainSpec};
use crate::{Error, Result};

/// Where a run begins, and how often it is saved.
#[derive(Debug, Default)]
pub struct Start {
    /// State to go on from.
    pub resume: Option<Checkpoint>,
    /// PEFT folder whose values the LoRA starts with; unused with `resume`.
    pub init_from: Option<PathBuf>,
    /// Longest time without a checkpoint; `None`: only the listed ones.
    pub checkpoint_interval: Option<Duration>,
}

/// What happens during a run.
#[derive(Debug)]
pub enum TrainEvent<'a> {
    /// Before the first step.
    Started {
        /// Steps of the whole run.
        total_steps: u32,
        /// Steps that were done before.
        resumed_from: u32,
        /// Values that are trained.
        trainable_parameters: usize,
    },
    /// After each step.
    Step(StepMetrics),
    /// A checkpoint is due: the receiver saves it.
    Checkpoint {
        /// The state.
        checkpoint: &'a Checkpoint,
        /// Whether users see it (end of an epoch, every `save_steps`, the last step) or it only serves resuming.
        listed: bool,
    },
}

/// One step's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// The step, counted from 1.
    pub step: u32,
    /// Steps of the whole run.
    pub total_steps: u32,
    /// Passes over the data set so far.
    pub epoch: f64,
    /// Mean loss of the step's trained tokens, in nats.
    pub loss: f64,
    /// Share of them whose most likely token was the right one.
    pub token_accuracy: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens with a loss in this step.
    pub step_tokens: u64,
    /// Tokens with a loss since the run began.
    pub trained_tokens: u64,
    /// Wall time of the step in milliseconds.
    pub step_ms: u64,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Whether all steps were done; if not, the receiver broke off.
    pub completed: bool,
    /// Steps done.
    pub step: u32,
    /// Tokens with a loss since the run began.
    pub trained_tokens: u64,
    /// The trained LoRA.
    pub lora: LoraParams,
}

/// Trains a LoRA; `Break` from an event stops at that step's end, with a checkpoint.
///
/// # Errors
/// A specification or checkpoint that does not fit model and data, or a loss that is no number.
pub fn train(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    start: Start,
    on_event: &mut dyn FnMut(TrainEvent<'_>) -> ControlFlow<()>,
) -> Result<Outcome> {
    let mut loader = Loader::new(dataset.rows.len(), spec);
    let total_steps = loader.total_steps();
    let run = checkpoint::run_digest(spec, model, dataset)?;
    let interval = start.checkpoint_interval;
    let mut state = State::new(spec, model, start, &run)?;
    let started =
        TrainEvent::Started { total_steps, resumed_from: state.step, trainable_parameters: state.lora.layout().len() };
    let mut flow = on_event(started);
    let mut saved_at = Instant::now();
    if flow.is_break() {
        let checkpoint = state.checkpoint(&run)?;
        let _ = on_event(TrainEvent::Checkpoint { checkpoint: &checkpoint, listed: false });
    }
    while state.step < total_steps && flow.is_continue() {
        let metrics = state.train_step(spec, model, dataset, &mut loader)?;
        flow = on_event(TrainEvent::Step(metrics));
        let every = spec.training.save_steps.unwrap_or(loader.steps_per_epoch());
        let listed = state.step.is_multiple_of(every) || state.step == total_steps;
        if listed || flow.is_break() || interval.is_some_and(|interval| saved_at.elapsed() >= interval) {
            let checkpoint = state.checkpoint(&run)?;
            let after = on_event(TrainEvent::Checkpoint { checkpoint: &checkpoint, listed });
            flow = if after.is_break() { after } else { flow };
            saved_at = Instant::now();
        }
    }
    let completed = state.step == total_steps;
    Ok(Outcome { completed, step: state.step, trained_tokens: state.trained_tokens, lora: state.lora })
}

/// What changes from step to step.
struct State {
    step: u32,
    trained_tokens: u64,
    /// (3, N): parameters, first moments, second moments; `lora` is a view of the first row.
    values: Tensor,
    lora: LoraParams,
    gradient: LoraParams,
}

impl State {
    fn new(spec: &TrainSpec, model: &Llama, start: Start, run: &str) -> Result<Self> {
        let layout = LoraLayout::new(&spec.lora, &model.config().shape);
        let len = layout.len();
        let gradient = LoraParams::zeros(layout.clone())?;
        if let Some(checkpoint) = start.resume {
            if checkpoint.header.run != run || checkpoint.state.dims() != [3, len] {
                let message = "it belongs to a run with another specification, model or data set";
                return Err(Error::Checkpoint(message.to_owned()));
            }
            let lora = LoraParams::new(layout, checkpoint.state.get(0)?)?;
            let header = checkpoint.header;
            let (step, trained_tokens) = (header.step, header.trained_tokens);
            return Ok(Self { step, trained_tokens, values: checkpoint.state, lora, gradient });
        }
        let values = Tensor::zeros((3, len), DType::F32, &Device::Cpu)?;
        let lora = LoraParams::new(layout, values.get(0)?)?;
        match start.init_from {
            Some(folder) => lora.load_peft(&folder)?,
            None => lora.initialise(spec.seed)?,
        }
        Ok(Self { step: 0, trained_tokens: 0, values, lora, gradient })
    }

    /// One optimizer step: all micro-batches of the batch, the clipped gradient, AdamW.
    fn train_step(
        &mut self,
        spec: &TrainSpec,
        model: &Llama,
        dataset: &Dataset,
        loader: &mut Loader,
    ) -> Result<StepMetrics> {
        let began = Instant::now();
        let (index, step) = (self.step, self.step + 1);
        let batches: Vec<MicroBatch> = loader.step(index).iter().map(|rows| micro_batch(dataset, rows)).collect();
        // Known before the first micro-batch: the loss is a mean over the whole batch, not a mean of means.
        let step_tokens: usize = batches.iter().map(MicroBatch::trained_tokens).sum();
        let scale = 1.0 / step_tokens.max(1) as f32;
        let recompute = spec.training.gradient_checkpointing == GradientCheckpointing::Full;
        self.gradient.clear()?;
        let mut loss = Loss::default();
        for batch in &batches {
            loss += model.forward_backward(batch, &self.lora, &self.gradient, scale, recompute)?;
        }
        let mean = loss.sum / loss.tokens.max(1) as f64;
        let grad_norm = adamw::norm(self.gradient.flat())?;
        if !mean.is_finite() || !grad_norm.is_finite() {
            let message = format!("loss {mean}, gradient norm {grad_norm}; a lower learning_rate may help");
            return Err(Error::Training { step, message });
        }
        let learning_rate = schedule::learning_rate(&spec.training, index, loader.total_steps());
        let clip_factor = adamw::clip_factor(grad_norm, spec.training.max_grad_norm);
        let update = Update { step, learning_rate, weight_decay: spec.training.weight_decay, clip_factor };
        adamw::step(&self.values, self.gradient.flat(), update)?;
        (self.step, self.trained_tokens) = (step, self.trained_tokens + loss.tokens as u64);
        Ok(StepMetrics {
            step,
            total_steps: loader.total_steps(),
            epoch: f64::from(step) / f64::from(loader.steps_per_epoch()),
            loss: mean,
            token_accuracy: loss.correct as f64 / loss.tokens.max(1) as f64,
            learning_rate,
            grad_norm,
            step_tokens: loss.tokens as u64,
            trained_tokens: self.trained_tokens,
            step_ms: began.elapsed().as_millis() as u64,
        })
    }

    /// The state as it is now. One with a value that is no number is never handed out: what is saved can go on.
    fn checkpoint(&self, run: &str) -> Result<Checkpoint> {
        if host(&self.values)?.par_chunks(1 << 16).any(|values| values.iter().any(|value| !value.is_finite())) {
            let message = "a parameter is no longer a number; a lower learning_rate may help".to_owned();
            return Err(Error::Training { step: self.step, message });
        }
        let header = checkpoint::header(self.step, self.trained_tokens, run);
        Ok(Checkpoint { header, state: self.values.clone() })
    }
}

fn micro_batch(dataset: &Dataset, rows: &[usize]) -> MicroBatch {
    MicroBatch::pack(rows.iter().map(|&row| &dataset.rows[row]))
}
