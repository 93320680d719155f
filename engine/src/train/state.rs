//! What changes from step to step: the live checkpoint, the LoRA that views it, and the gradient.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::checkpoint::{Checkpoint, Header};
use super::evaluation::{Best, Evaluation};
use super::moments::{Moments, are_finite};
use super::{Start, StepMetrics, estimate, micro_batch, schedule};
use crate::adapter::{LoraLayout, LoraParams};
use crate::data::{Dataset, Loader, MicroBatch};
use crate::model::{Llama, MicroStep};
use crate::ops::adamw::{self, Update};
use crate::ops::cross_entropy::Loss;
use crate::ops::dropout::Dropout;
use crate::ops::host;
use crate::ops::matmul::Compute;
use crate::spec::{ComputeType, SpecError, TrainSpec};
use crate::{Error, Result};

/// A run between two steps.
pub(super) struct State {
    /// What is saved; `lora` is a view of its parameters.
    checkpoint: Checkpoint,
    pub(super) lora: LoraParams,
    gradient: LoraParams,
}

/// An adapter that does not fit is the fault of whoever named it.
fn cannot_begin(error: Error) -> Error {
    match error {
        Error::Adapter(message) => {
            let field = "lora.init_from";
            Error::Spec(SpecError { field, message: format!("{field} names an adapter that does not fit: {message}") })
        }
        error => error,
    }
}

/// What `auto` means on this processor.
pub(super) fn compute(wanted: ComputeType) -> Result<Compute> {
    match (wanted, Compute::bf16()) {
        (ComputeType::Auto, _) => Ok(Compute::fastest()),
        (ComputeType::F32, _) => Ok(Compute::F32),
        (ComputeType::Bf16, Some(bf16)) => Ok(bf16),
        (ComputeType::Bf16, None) => {
            let field = "training.compute";
            let message = format!("{field} must be auto or f32 on a processor without AVX512-BF16, got `bf16`");
            Err(Error::Spec(SpecError { field, message }))
        }
    }
}

impl State {
    pub(super) fn new(spec: &TrainSpec, model: &Llama, dataset: &Dataset, start: Start<'_>, run: &str) -> Result<Self> {
        let layout = LoraLayout::new(&spec.lora, &model.config().shape);
        let gradient = LoraParams::zeros(layout.clone())?;
        if let Some(checkpoint) = start.resume {
            if checkpoint.header.run != run || !checkpoint.fits(&layout) {
                let message = "it belongs to a run with another specification, model or data set";
                return Err(Error::Checkpoint(message.to_owned()));
            }
            if checkpoint.header.compute == Compute::Bf16 && Compute::bf16().is_none() {
                let message = "its run computes in bf16, which this processor has no instructions for";
                return Err(Error::Checkpoint(message.to_owned()));
            }
            let lora = LoraParams::new(layout, checkpoint.parameters.clone())?;
            return Ok(Self { checkpoint, lora, gradient });
        }
        let kept_layers = estimate::kept_layers(spec, model, dataset, start.memory_budget_bytes)?;
        let parameters = Tensor::zeros(layout.len(), DType::F32, &Device::Cpu)?;
        let moments = Moments::zeros(spec.training.optimizer, &layout)?;
        let lora = LoraParams::new(layout, parameters.clone())?;
        match start.init_from {
            Some(folder) => lora.load_peft(&folder).map_err(cannot_begin)?,
            None => lora.initialise(spec.seed)?,
        }
        let header = Header::new(run, kept_layers, spec.training.optimizer, compute(spec.training.compute)?);
        Ok(Self { checkpoint: Checkpoint { header, parameters, moments, best: None }, lora, gradient })
    }

    /// Steps done.
    pub(super) fn step(&self) -> u32 {
        self.checkpoint.header.step
    }

    /// Type of the operands of products.
    pub(super) fn compute(&self) -> Compute {
        self.checkpoint.header.compute
    }

    /// Tokens that had a loss so far.
    pub(super) fn trained_tokens(&self) -> u64 {
        self.checkpoint.header.trained_tokens
    }

    /// The best evaluation so far, where early stopping looks for it.
    pub(super) fn best(&self) -> Option<Best> {
        self.checkpoint.header.best
    }

    /// One optimizer step: all micro-batches of the batch, the clipped gradient, AdamW.
    pub(super) fn train_step(
        &mut self,
        spec: &TrainSpec,
        model: &Llama,
        dataset: &Dataset,
        loader: &mut Loader,
    ) -> Result<StepMetrics> {
        let began = Instant::now();
        let (index, step) = (self.step(), self.step() + 1);
        let rows = loader.step(index);
        let batches: Vec<MicroBatch> =
            rows.iter().map(|rows| micro_batch(dataset, rows, spec.training.packing)).collect::<Result<_>>()?;
        // Known before the first micro-batch: the loss is a mean over the whole batch, not a mean of means.
        let step_tokens: usize = batches.iter().map(MicroBatch::trained_tokens).sum();
        let scale = 1.0 / step_tokens.max(1) as f32;
        let Header { kept_layers, compute, .. } = self.checkpoint.header;
        self.gradient.clear()?;
        let mut loss = Loss::default();
        for (number, batch) in (0..).zip(&batches) {
            let dropout = Dropout::new(spec.lora.dropout, &[spec.seed, index.into(), number]);
            let micro_step = MicroStep { scale, kept_layers, dropout, compute };
            loss += model.forward_backward(batch, &self.lora, &self.gradient, micro_step)?;
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
        self.checkpoint.moments.step(&self.lora, self.gradient.flat(), update)?;
        let header = &mut self.checkpoint.header;
        (header.step, header.trained_tokens) = (step, header.trained_tokens + loss.tokens as u64);
        Ok(StepMetrics {
            step,
            total_steps: loader.total_steps(),
            epoch: f64::from(step) / f64::from(loader.steps_per_epoch()),
            loss: mean,
            token_accuracy: loss.correct as f64 / loss.tokens.max(1) as f64,
            learning_rate,
            grad_norm,
            step_tokens: loss.tokens as u64,
            trained_tokens: header.trained_tokens,
            step_ms: began.elapsed().as_millis() as u64,
            evaluation: None,
        })
    }

    /// Takes note of an evaluation; where early stopping wants the best, keeps the parameters of a better one.
    pub(super) fn judge(&mut self, spec: &TrainSpec, evaluation: &Evaluation) -> Result<()> {
        let Some(rule) = spec.training.early_stopping else { return Ok(()) };
        let best = Best::after(self.best(), rule, self.step(), evaluation.loss);
        if best.since == 0 {
            self.checkpoint.best = Some(self.checkpoint.parameters.copy()?);
        }
        self.checkpoint.header.best = Some(best);
        Ok(())
    }

    /// Whether the validation loss has not fallen for as long as early stopping bears it.
    pub(super) fn has_stopped_early(&self, spec: &TrainSpec) -> bool {
        let (rule, best) = (spec.training.early_stopping, self.best());
        rule.zip(best).is_some_and(|(rule, best)| best.since >= rule.patience)
    }

    /// The LoRA of the best evaluation, where there is one, or else the LoRA as it is.
    pub(super) fn into_result(self) -> Result<LoraParams> {
        match self.checkpoint.best {
            Some(best) => LoraParams::new(self.lora.layout().clone(), best),
            None => Ok(self.lora),
        }
    }

    /// The state as it is now. One with a value that is no number is never handed out: what is saved can go on.
    pub(super) fn checkpoint(&self) -> Result<&Checkpoint> {
        let checkpoint = &self.checkpoint;
        if !are_finite(&host(&checkpoint.parameters)?) || !checkpoint.moments.are_finite()? {
            let message = "a parameter is no longer a number; a lower learning_rate may help".to_owned();
            return Err(Error::Training { step: self.step(), message });
        }
        Ok(checkpoint)
    }
}
