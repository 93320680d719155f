//! The training loop: synchronous, no channels; every step, and every moment at which a checkpoint is due, is an event.

mod checkpoint;
mod estimate;
mod evaluation;
mod fit;
mod moments;
mod schedule;
mod state;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use checkpoint::Checkpoint;
pub use estimate::{Estimate, HostMemory, estimate, measure_rate};
pub use evaluation::{Best, Evaluation};
pub use fit::{Change, Fit, fit, fit_now, left_of};
pub use schedule::learning_rate;

use crate::Result;
use crate::adapter::LoraParams;
use crate::data::{Dataset, Loader, MicroBatch, Row};
use crate::device::Device;
use crate::model::Llama;
use crate::spec::TrainSpec;
use state::State;

/// Where a run begins, what it is judged by, and how often it is saved.
#[derive(Debug, Default)]
pub struct Start<'a> {
    /// State to go on from.
    pub resume: Option<Checkpoint>,
    /// PEFT folder whose values the LoRA starts with; unused with `resume`.
    pub init_from: Option<PathBuf>,
    /// Data set that is evaluated every `eval_steps`, or at the end of each epoch, and at the run's end.
    pub validation: Option<&'a Dataset>,
    /// On the CPU, bytes that the LoRA's state and activations may take with `gradient_checkpointing: auto`; `None`: nine tenths of what is
    /// free. Decided when a run begins and when it is resumed.
    pub memory_budget_bytes: Option<u64>,
    /// Longest time without a checkpoint; `None`: only the listed ones.
    pub checkpoint_interval: Option<Duration>,
    /// What it runs on.
    pub device: Device,
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
    /// A part of an evaluation is done. It is not broken off: `Break` stops after its step.
    Evaluating {
        /// The step after which it is made.
        step: u32,
        /// Rows of the validation data set that are done.
        rows: usize,
        /// All its rows.
        total_rows: usize,
    },
    /// After each step, and its evaluation where there is one.
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
    /// Wall time of the step in milliseconds, without the evaluation's.
    pub step_ms: u64,
    /// What the validation data set came to after this step, where it was evaluated.
    pub evaluation: Option<Evaluation>,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Whether the run came to its end: all steps, or an early stop; if not, the receiver broke off.
    pub completed: bool,
    /// Whether early stopping ended it before the last step.
    pub stopped_early: bool,
    /// Steps done.
    pub step: u32,
    /// The evaluation whose LoRA is the result of a completed run with early stopping.
    pub best: Option<Best>,
    /// Tokens with a loss since the run began.
    pub trained_tokens: u64,
    /// The trained LoRA; of a completed run with early stopping, that of the best evaluation.
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
    start: Start<'_>,
    on_event: &mut dyn FnMut(TrainEvent<'_>) -> ControlFlow<()>,
) -> Result<Outcome> {
    let (interval, validation) = (start.checkpoint_interval, start.validation);
    evaluation::check(spec, validation)?;
    let mut loader = Loader::new(dataset.rows.len(), spec);
    let total_steps = loader.total_steps();
    let run = checkpoint::run_digest(spec, model, dataset, validation)?;
    let mut state = State::new(spec, model, dataset, start, &run)?;
    let trainable_parameters = state.trainable_parameters();
    let mut flow = on_event(TrainEvent::Started { total_steps, resumed_from: state.step(), trainable_parameters });
    let mut saved_at = Instant::now();
    if flow.is_break() {
        let _ = on_event(TrainEvent::Checkpoint { checkpoint: state.checkpoint()?, listed: false });
    }
    let has_ended = |state: &State| state.step() == total_steps || state.has_stopped_early(spec);
    let (eval_steps, save_steps) = (spec.training.eval_steps, spec.training.save_steps);
    let is_due = |step: u32, every: Option<u32>, epoch: u32| step.is_multiple_of(every.unwrap_or(epoch));
    while !has_ended(&state) && flow.is_continue() {
        let mut metrics = state.train_step(spec, model, dataset, &mut loader)?;
        let (step, epoch) = (metrics.step, loader.steps_per_epoch());
        let mut stop = ControlFlow::Continue(());
        if let Some(validation) = validation.filter(|_| is_due(step, eval_steps, epoch) || step == total_steps) {
            let (evaluation, said) = evaluation::evaluate(spec, model, validation, (&mut state, step), on_event)?;
            state.judge(spec, &evaluation)?;
            (metrics.evaluation, stop) = (Some(evaluation), said);
        }
        flow = first_break(stop, on_event(TrainEvent::Step(metrics)));
        let listed = is_due(step, save_steps, epoch) || has_ended(&state);
        if listed || flow.is_break() || interval.is_some_and(|interval| saved_at.elapsed() >= interval) {
            let checkpoint = state.checkpoint()?;
            flow = first_break(flow, on_event(TrainEvent::Checkpoint { checkpoint, listed }));
            saved_at = Instant::now();
        }
    }
    let (step, trained_tokens, completed) = (state.step(), state.trained_tokens(), has_ended(&state));
    let (stopped_early, best) = (completed && step < total_steps, state.best().filter(|_| completed));
    let lora = state.into_result(completed)?;
    Ok(Outcome { completed, stopped_early, step, best, trained_tokens, lora })
}

fn first_break(one: ControlFlow<()>, other: ControlFlow<()>) -> ControlFlow<()> {
    if one.is_break() { one } else { other }
}

fn micro_batch(dataset: &Dataset, rows: &[usize], packing: bool) -> Result<MicroBatch> {
    let rows: Vec<Row> = rows.iter().map(|&row| dataset.rows.row(row)).collect::<Result<_>>()?;
    Ok(if packing { MicroBatch::pack(&rows) } else { MicroBatch::pad(&rows) })
}
