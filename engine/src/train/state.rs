//! What changes from step to step: the live checkpoint, the LoRA that views it, and the gradient.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};

use super::checkpoint::{Checkpoint, Header};
use super::evaluation::{Best, Evaluation};
use super::moments::{Moments, are_finite};
use super::{Start, StepMetrics, estimate, micro_batch, schedule};
use crate::adapter::{LoraLayout, LoraParams};
use crate::data::{Dataset, Loader, MicroBatch};
use crate::device::Device;
use crate::model::{Llama, MicroStep};
use crate::ops::adamw::{self, Update};
use crate::ops::cross_entropy::Loss;
use crate::ops::cuda::{HostMoments, Setup, Trainer};
use crate::ops::dropout::Dropout;
use crate::ops::matmul::Compute;
use crate::ops::{host, host_mut};
use crate::spec::{ComputeType, GradientCheckpointing, SpecError, TrainSpec};
use crate::{Error, Result};

/// A run between two steps.
pub(super) struct State {
    /// What is saved; `lora` is a view of its parameters. Where a GPU trains, parameters and moments are those of the last time that
    /// they were read.
    checkpoint: Checkpoint,
    lora: LoraParams,
    on: On,
}

/// Where a run computes.
enum On {
    /// The gradient.
    Cpu(LoraParams),
    Gpu(Box<Trainer>),
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

/// What `auto` means on this device.
pub(super) fn compute(wanted: ComputeType, device: Device) -> Result<Compute> {
    match (wanted, Compute::bf16()) {
        (ComputeType::F32, _) => Ok(Compute::F32),
        (ComputeType::Auto | ComputeType::Bf16, _) if device != Device::Cpu => Ok(Compute::Bf16),
        (ComputeType::Auto, _) => Ok(Compute::fastest()),
        (ComputeType::Bf16, Some(bf16)) => Ok(bf16),
        (ComputeType::Bf16, None) => {
            let field = "training.compute";
            let message = format!("{field} must be auto or f32 on a processor without AVX512-BF16, got `bf16`");
            Err(Error::Spec(SpecError { field, message }))
        }
    }
}

impl State {
    pub(super) fn new(
        spec: &TrainSpec,
        model: &Llama,
        dataset: &Dataset,
        mut start: Start<'_>,
        run: &str,
    ) -> Result<Self> {
        let layout = LoraLayout::new(&spec.lora, &model.config().shape);
        if let Some(mut checkpoint) = start.resume.take() {
            if checkpoint.header.run != run || !checkpoint.fits(&layout) {
                let message = "it belongs to a run with another specification, model or data set";
                return Err(Error::Checkpoint(message.to_owned()));
            }
            let has_bf16 = start.device != Device::Cpu || Compute::bf16().is_some();
            if checkpoint.header.compute == Compute::Bf16 && !has_bf16 {
                let message = "its run computes in bf16, which this processor has no instructions for";
                return Err(Error::Checkpoint(message.to_owned()));
            }
            let Header { kept_layers, compute, .. } = checkpoint.header;
            // It changes no bit of the result: `auto` keeps what there is room for now.
            let is_auto = spec.training.gradient_checkpointing == GradientCheckpointing::Auto;
            let wanted = match (is_auto, start.device) {
                (false, _) => Some(kept_layers),
                (true, Device::Cuda(_)) => None,
                (true, Device::Cpu) => Some(estimate::kept_layers(spec, model, dataset, start.memory_budget_bytes)?),
            };
            let on = On::new(spec, model, &layout, (dataset, &start), (wanted, compute))?;
            checkpoint.header.kept_layers = on.kept_layers().or(wanted).unwrap_or(kept_layers);
            let lora = LoraParams::new(layout, checkpoint.parameters.clone())?;
            let mut state = Self { checkpoint, lora, on };
            state.write_to_gpu()?;
            return Ok(state);
        }
        let compute = compute(spec.training.compute, start.device)?;
        let wanted = match start.device {
            Device::Cpu => Some(estimate::kept_layers(spec, model, dataset, start.memory_budget_bytes)?),
            Device::Cuda(_) => spec.training.gradient_checkpointing.kept_layers(model.config().shape.layers),
        };
        let on = On::new(spec, model, &layout, (dataset, &start), (wanted, compute))?;
        let kept_layers = on.kept_layers().or(wanted).unwrap_or(0);
        let parameters = Tensor::zeros(layout.len(), DType::F32, &candle_core::Device::Cpu)?;
        let moments = Moments::zeros(spec.training.optimizer, &layout)?;
        let lora = LoraParams::new(layout, parameters.clone())?;
        match start.init_from {
            Some(folder) => lora.load_peft(&folder).map_err(cannot_begin)?,
            None => lora.initialise(spec.seed)?,
        }
        let header = Header::new(run, kept_layers, spec.training.optimizer, compute);
        let mut state = Self { checkpoint: Checkpoint { header, parameters, moments, best: None }, lora, on };
        state.write_to_gpu()?;
        Ok(state)
    }

    /// Values that are trained.
    pub(super) fn trainable_parameters(&self) -> usize {
        self.lora.layout().len()
    }

    /// Steps done.
    pub(super) fn step(&self) -> u32 {
        self.checkpoint.header.step
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
        let micro_step = |number: u64| {
            let dropout = Dropout::new(spec.lora.dropout, &[spec.seed, index.into(), number]);
            MicroStep { scale, kept_layers, dropout, compute }
        };
        let (loss, grad_norm) = self.on.forward_backward(model, &self.lora, &batches, &micro_step)?;
        let mean = loss.sum / loss.tokens.max(1) as f64;
        if !mean.is_finite() || !grad_norm.is_finite() {
            let message = format!("loss {mean}, gradient norm {grad_norm}; a lower learning_rate may help");
            return Err(Error::Training { step, message });
        }
        let learning_rate = schedule::learning_rate(&spec.training, index, loader.total_steps());
        let clip_factor = adamw::clip_factor(grad_norm, spec.training.max_grad_norm);
        let update = Update { step, learning_rate, weight_decay: spec.training.weight_decay, clip_factor };
        match &mut self.on {
            On::Cpu(gradient) => self.checkpoint.moments.step(&self.lora, gradient.flat(), update)?,
            On::Gpu(trainer) => trainer.step(update)?,
        }
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
            self.read_parameters_from_gpu()?;
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

    /// The LoRA as it is; of a completed run that of the best evaluation, where there is one.
    pub(super) fn into_result(self, completed: bool) -> Result<LoraParams> {
        self.read_parameters_from_gpu()?;
        match self.checkpoint.best.filter(|_| completed) {
            Some(best) => LoraParams::new(self.lora.layout().clone(), best),
            None => Ok(self.lora),
        }
    }

    /// The state as it is now. One with a value that is no number is never handed out: what is saved can go on.
    pub(super) fn checkpoint(&mut self) -> Result<&Checkpoint> {
        self.read_from_gpu()?;
        let checkpoint = &self.checkpoint;
        if !are_finite(&host(&checkpoint.parameters)?) || !checkpoint.moments.are_finite()? {
            let message = "a parameter is no longer a number; a lower learning_rate may help".to_owned();
            return Err(Error::Training { step: self.step(), message });
        }
        Ok(checkpoint)
    }

    /// The loss of a micro-batch.
    pub(super) fn evaluate(&mut self, model: &Llama, batch: &MicroBatch) -> Result<Loss> {
        match &mut self.on {
            On::Cpu(_) => model.evaluate(batch, &self.lora, self.checkpoint.header.compute),
            On::Gpu(trainer) => {
                trainer.evaluate(batch)?;
                trainer.take_loss()
            }
        }
    }

    fn read_parameters_from_gpu(&self) -> Result<()> {
        let On::Gpu(trainer) = &self.on else { return Ok(()) };
        host_mut(&self.checkpoint.parameters, |values| trainer.read_parameters(values))
    }

    /// Reads parameters and moments from where they are trained.
    fn read_from_gpu(&mut self) -> Result<()> {
        self.read_parameters_from_gpu()?;
        let On::Gpu(trainer) = &self.on else { return Ok(()) };
        match &mut self.checkpoint.moments {
            Moments::F32(values) => host_mut(values, |values| trainer.read_moments(HostMoments::F32(values))),
            Moments::EightBit(moments) => trainer.read_moments(HostMoments::EightBit(moments)),
        }
    }

    /// Takes parameters and moments to where they are trained.
    fn write_to_gpu(&mut self) -> Result<()> {
        let On::Gpu(trainer) = &mut self.on else { return Ok(()) };
        trainer.write_parameters(&host(&self.checkpoint.parameters)?)?;
        match &mut self.checkpoint.moments {
            Moments::F32(values) => host_mut(values, |values| trainer.write_moments(&HostMoments::F32(values))),
            Moments::EightBit(moments) => trainer.write_moments(&HostMoments::EightBit(moments)),
        }
    }
}

impl On {
    fn new(
        spec: &TrainSpec,
        model: &Llama,
        layout: &Arc<LoraLayout>,
        (dataset, start): (&Dataset, &Start<'_>),
        (kept_layers, compute): (Option<usize>, Compute),
    ) -> Result<Self> {
        let Device::Cuda(ordinal) = start.device else { return Ok(Self::Cpu(LoraParams::zeros(layout.clone())?)) };
        let mut setup = Setup::of(spec, layout, compute, None);
        setup.tokens = estimate::largest_micro_batch(spec, dataset, start.validation)?;
        setup.kept_layers = kept_layers;
        Ok(Self::Gpu(Box::new(Trainer::new(ordinal, model, &setup)?)))
    }

    /// Blocks that keep their activations, where a GPU decided it.
    fn kept_layers(&self) -> Option<usize> {
        match self {
            Self::Cpu(_) => None,
            Self::Gpu(trainer) => Some(trainer.kept_layers()),
        }
    }

    /// The loss of a step's micro-batches, and the global norm of their gradient.
    fn forward_backward(
        &mut self,
        model: &Llama,
        lora: &LoraParams,
        batches: &[MicroBatch],
        micro_step: &dyn Fn(u64) -> MicroStep,
    ) -> Result<(Loss, f64)> {
        let numbered = (0..).map(micro_step).zip(batches);
        match self {
            Self::Cpu(gradient) => {
                gradient.clear()?;
                let mut loss = Loss::default();
                for (step, batch) in numbered {
                    loss += model.forward_backward(batch, lora, gradient, step)?;
                }
                Ok((loss, adamw::norm(gradient.flat())?))
            }
            Self::Gpu(trainer) => {
                trainer.clear_gradient()?;
                for (step, batch) in numbered {
                    trainer.forward_backward(batch, step)?;
                }
                Ok((trainer.take_loss()?, trainer.gradient_norm()?))
            }
        }
    }
}
