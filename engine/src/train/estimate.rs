//! What a run will need, before it starts: steps, tokens, memory at its peak, bytes on disk, and time from a measured rate.
//!
//! Memory is counted, not guessed: what the process holds now, the base model (its pages are touched in every pass), parameters,
//! gradient and moments of the LoRA, and for the largest micro-batch what blocks keep for backward and what exists only for a
//! moment, whichever moment is the worst. T tokens, C hidden, I intermediate, Q and K widths of queries and keys, R rank, all f32.

use std::sync::Arc;

use super::micro_batch;
use super::moments::Moments;
use crate::adapter::{LoraLayout, LoraParams};
use crate::data::{Dataset, Loader, MicroBatch, Row};
use crate::device::{Device, cuda_device};
use crate::model::{Llama, MicroStep, Shape};
use crate::ops::cross_entropy;
use crate::ops::cuda::{self, Setup, Trainer};
use crate::ops::dropout::Dropout;
use crate::ops::host;
use crate::spec::{GradientCheckpointing, LoraSpec, TrainSpec};
use crate::{Error, Result};

/// Bytes of a value.
const F32: u64 = 4;

/// What a run will need.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Estimate {
    /// Steps of the whole run.
    pub total_steps: u32,
    /// Tokens that go through the model in training, prompts and padding included.
    pub tokens: u64,
    /// Tokens that go through it in evaluations.
    pub evaluated_tokens: u64,
    /// Tokens of the largest micro-batch.
    pub largest_micro_batch: u64,
    /// Blocks that keep their activations.
    pub kept_layers: u64,
    /// Blocks of the model.
    pub layers: u64,
    /// Values that are trained.
    pub trainable_parameters: u64,
    /// Wall time of the steps and evaluations in seconds, where a rate was given.
    pub seconds: Option<f64>,
    /// Most memory that the process will hold, in bytes, the base model's file included.
    pub peak_host_bytes: u64,
    /// Most memory of the GPU that the run will hold, in bytes; `None`: it runs on the CPU.
    pub peak_device_bytes: Option<u64>,
    /// Memory that the GPU has.
    pub device_total_bytes: Option<u64>,
    /// Bytes of one checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes of the PEFT adapter.
    pub adapter_bytes: u64,
}

/// What of the host's memory is in use or free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// Bytes that this process holds and that stand in no file.
    pub anonymous_bytes: u64,
    /// Bytes of files, this program's for one, that it has in memory.
    pub file_bytes: u64,
    /// Bytes that could be had without swapping.
    pub available_bytes: u64,
    /// Bytes that there are at all.
    pub total_bytes: u64,
}

impl HostMemory {
    /// As the kernel tells it now: the machine's memory, or what the control group leaves of it.
    ///
    /// # Errors
    /// A `/proc` that cannot be read.
    pub fn now() -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(Error::io(path));
        let (status, memory) = (read("/proc/self/status")?, read("/proc/meminfo")?);
        let group = |name: &str| {
            let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
            text.trim().parse::<u64>().ok()
        };
        // What the group read of files counts as its memory, and is given back when it needs more.
        let cached = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
        let cached = cached.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
        let held = group("memory.current").map(|current| current.saturating_sub(cached.unwrap_or(0)));
        let most = group("memory.max");
        let of_group = most.zip(held).map(|(max, held)| max.saturating_sub(held));
        let total_bytes = kilobytes(&memory, "MemTotal:").min(most.unwrap_or(u64::MAX));
        let available_bytes = kilobytes(&memory, "MemAvailable:").min(of_group.unwrap_or(u64::MAX));
        let (anonymous_bytes, file_bytes) = (kilobytes(&status, "RssAnon:"), kilobytes(&status, "RssFile:"));
        Ok(Self { anonymous_bytes, file_bytes, available_bytes, total_bytes })
    }
}

/// The value of a line like `RssAnon:   1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Memory of a GPU that is left to its driver.
/// More than a run leaves free on the card itself (`SPARE_BYTES` of ops/cuda/trainer.rs): the driver's own part is not known here.
const OF_THE_DRIVER: u64 = 1 << 30;

/// Bytes of a GPU's memory that a run may have, and all that it has; `None` for the CPU.
///
/// # Errors
/// A GPU that is not there.
pub(super) fn gpu_bytes(device: Device) -> Result<Option<(u64, u64)>> {
    let Device::Cuda(ordinal) = device else { return Ok(None) };
    let gpu = cuda_device(ordinal).map_err(Error::Device)?;
    Ok(Some((gpu.total_bytes.saturating_sub(OF_THE_DRIVER), gpu.total_bytes)))
}

/// What a run needs of a GPU: blocks that keep their activations, and the peak of its memory.
fn on_gpu(
    spec: &TrainSpec,
    model: &Llama,
    layout: &Arc<LoraLayout>,
    (tokens, usable, device): (u64, u64, Device),
) -> Result<(usize, u64)> {
    let compute = super::state::compute(spec.training.compute, device)?;
    let setup = Setup { tokens: tokens as usize, ..Setup::of(spec, layout, compute, None) };
    let asked = spec.training.gradient_checkpointing.kept_layers(model.config().shape.layers);
    let kept_layers = asked.or_else(|| cuda::kept_layers_within(model, &setup, usable)).unwrap_or(0);
    let least = cuda::peak_bytes(model, &setup, kept_layers);
    Ok((kept_layers, least + cuda::resident_bytes_within(model, &setup, kept_layers, usable.saturating_sub(least))))
}

/// Computes what a run will need on that device; `tokens_per_second` is a rate of training, [`measure_rate`]'s for one.
///
/// # Errors
/// Memory figures that cannot be read.
pub fn estimate(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    validation: Option<&Dataset>,
    tokens_per_second: Option<f64>,
    device: Device,
) -> Result<Estimate> {
    let host = HostMemory::now()?;
    let (shape, work) = (&model.config().shape, Work::of(spec, dataset, validation)?);
    let layout = LoraLayout::new(&spec.lora, shape);
    let need = Need::of(spec, shape, &work, &layout);
    let of_gpu = match gpu_bytes(device)? {
        None => None,
        Some((usable, total)) => {
            let tokens = work.largest_micro_batch;
            Some((on_gpu(spec, model, &layout, (tokens, usable, device))?, total))
        }
    };
    let kept_layers = match of_gpu {
        None => need.kept_layers(budget(host, model.file_bytes())),
        Some(((kept_layers, _), _)) => kept_layers as u64,
    };
    let state = need.state(Moments::size_bytes(spec.training.optimizer, &layout));
    let held = host.anonymous_bytes + host.file_bytes + model.file_bytes();
    let saved = need.parameters * F32;
    let best = if spec.training.early_stopping.is_some() { saved } else { 0 };
    // Forward is a third of a trained token's work.
    let seconds = tokens_per_second.map(|rate| (work.tokens as f64 + work.evaluated_tokens as f64 / 3.0) / rate);
    Ok(Estimate {
        total_steps: work.total_steps,
        tokens: work.tokens,
        evaluated_tokens: work.evaluated_tokens,
        largest_micro_batch: work.largest_micro_batch,
        kept_layers,
        layers: shape.layers as u64,
        trainable_parameters: need.parameters,
        seconds,
        // What a GPU computes on lies there: the host has the model's file, and a checkpoint's values.
        peak_host_bytes: held + state + if of_gpu.is_some() { 0 } else { need.activations(kept_layers) },
        peak_device_bytes: of_gpu.map(|((_, peak), _)| peak),
        device_total_bytes: of_gpu.map(|(_, total)| total),
        checkpoint_bytes: saved + best + Moments::size_bytes(spec.training.optimizer, &layout),
        adapter_bytes: saved,
    })
}

/// Tokens a second of this run's first micro-batch on that device, measured on its second pass.
///
/// # Errors
/// What training would say.
pub fn measure_rate(spec: &TrainSpec, model: &Llama, dataset: &Dataset, device: Device) -> Result<f64> {
    let mut loader = Loader::new(dataset.rows.len(), spec);
    let rows = loader.step(0).swap_remove(0);
    let batch = micro_batch(dataset, &rows, spec.training.packing)?;
    let layout = LoraLayout::new(&spec.lora, &model.config().shape);
    let (lora, gradient) = (LoraParams::zeros(layout.clone())?, LoraParams::zeros(layout.clone())?);
    lora.initialise(spec.seed)?;
    let dropout = Dropout::new(spec.lora.dropout, &[spec.seed]);
    let compute = super::state::compute(spec.training.compute, device)?;
    if let Device::Cuda(ordinal) = device {
        let mut setup = Setup::of(spec, &layout, compute, None);
        setup.tokens = batch.tokens.len();
        setup.kept_layers = spec.training.gradient_checkpointing.kept_layers(model.config().shape.layers);
        let mut trainer = Trainer::new(ordinal, model, &setup)?;
        trainer.write_parameters(&host(lora.flat())?)?;
        let step = MicroStep { scale: 1.0, kept_layers: trainer.kept_layers(), dropout, compute };
        return rate(&batch, || {
            trainer.forward_backward(&batch, step)?;
            trainer.take_loss().map(|_| ())
        });
    }
    let kept_layers = kept_layers(spec, model, dataset, None)?;
    let step = MicroStep { scale: 1.0, kept_layers, dropout, compute };
    rate(&batch, || model.forward_backward(&batch, &lora, &gradient, step).map(|_| ()))
}

/// Tokens a second of the second of two passes.
fn rate(batch: &MicroBatch, mut pass: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut rate = 0.0;
    for _ in 0..2 {
        let began = std::time::Instant::now();
        pass()?;
        rate = batch.tokens.len() as f64 / began.elapsed().as_secs_f64().max(1e-9);
    }
    Ok(rate)
}

/// Blocks that keep their activations in a run that has not decided it yet: as many as fit the budget, of memory that is free
/// now where none is given.
pub(super) fn kept_layers(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    memory_budget_bytes: Option<u64>,
) -> Result<usize> {
    let shape = &model.config().shape;
    match spec.training.gradient_checkpointing {
        GradientCheckpointing::None => return Ok(shape.layers),
        GradientCheckpointing::Full => return Ok(0),
        GradientCheckpointing::Auto => {}
    }
    let budget = match memory_budget_bytes {
        None => budget(HostMemory::now()?, model.file_bytes()),
        Some(bytes) => bytes,
    };
    let layout = LoraLayout::new(&spec.lora, shape);
    let need = Need::of(spec, shape, &Work::of(spec, dataset, None)?, &layout);
    Ok(need.kept_layers(budget) as usize)
}

/// Tokens of the largest micro-batch of a run, evaluations included.
pub(super) fn largest_micro_batch(spec: &TrainSpec, dataset: &Dataset, validation: Option<&Dataset>) -> Result<usize> {
    Ok(Work::of(spec, dataset, validation)?.largest_micro_batch as usize)
}

/// What activations may take: nine tenths of the free memory, less the base model, which is read through the page cache.
fn budget(host: HostMemory, model_bytes: u64) -> u64 {
    (host.available_bytes / 10 * 9).saturating_sub(model_bytes)
}

/// How much a run computes.
pub(super) struct Work {
    total_steps: u32,
    tokens: u64,
    evaluated_tokens: u64,
    largest_micro_batch: u64,
    /// Most tokens with a loss in a micro-batch: only they have logits.
    most_trained: u64,
}

impl Work {
    fn of(spec: &TrainSpec, dataset: &Dataset, validation: Option<&Dataset>) -> Result<Self> {
        Ok(Self::of_rows(spec, &lengths_of(dataset)?, validation.map(lengths_of).transpose()?.as_deref()))
    }

    pub(super) fn largest_micro_batch(&self) -> u64 {
        self.largest_micro_batch
    }

    pub(super) fn of_rows(spec: &TrainSpec, lengths: &[Length], validation: Option<&[Length]>) -> Self {
        let mut loader = Loader::new(lengths.len(), spec);
        let (total_steps, epoch) = (loader.total_steps(), loader.steps_per_epoch().max(1));
        let (mut tokens, mut largest_micro_batch, mut most_trained) = (0, 0, 0);
        for step in 0..total_steps {
            for rows in loader.step(step) {
                let size = size(lengths, &rows, spec.training.packing);
                tokens += size;
                largest_micro_batch = largest_micro_batch.max(size);
                most_trained = most_trained.max(trained(lengths, &rows));
            }
        }
        let mut once = 0;
        if let Some(lengths) = validation {
            let rows: Vec<usize> = (0..lengths.len()).collect();
            for rows in rows.chunks(spec.training.micro_batch_size.max(1) as usize) {
                let size = size(lengths, rows, spec.training.packing);
                once += size;
                largest_micro_batch = largest_micro_batch.max(size);
                most_trained = most_trained.max(trained(lengths, rows));
            }
        }
        let evaluations = u64::from(total_steps.div_ceil(spec.training.eval_steps.unwrap_or(epoch)));
        Self { total_steps, tokens, evaluated_tokens: once * evaluations, largest_micro_batch, most_trained }
    }
}

/// Tokens of a row, and how many of them have a loss.
#[derive(Debug, Clone, Copy)]
pub(super) struct Length {
    pub(super) tokens: u64,
    pub(super) trained: u64,
}

impl Length {
    /// Of a row that is cut after so many tokens. Which of its tokens have a loss is not known any more: the most that can be.
    pub(super) fn cut_at(self, max_seq_length: u64) -> Self {
        Self { tokens: self.tokens.min(max_seq_length), trained: self.trained.min(max_seq_length) }
    }
}

pub(super) fn lengths_of(dataset: &Dataset) -> Result<Vec<Length>> {
    let length = |row: Row| Length {
        tokens: row.tokens.len() as u64,
        trained: row.trained.iter().filter(|&&trained| trained).count() as u64,
    };
    dataset.rows.iter().map(|row| Ok(length(row?))).collect()
}

/// Tokens with a loss in a micro-batch of those rows.
fn trained(lengths: &[Length], rows: &[usize]) -> u64 {
    rows.iter().map(|&row| lengths[row].trained).sum()
}

/// Tokens of a micro-batch of those rows.
fn size(lengths: &[Length], rows: &[usize], packing: bool) -> u64 {
    let lengths = rows.iter().map(|&row| lengths[row].tokens);
    if packing { lengths.sum() } else { lengths.max().unwrap_or(0) * rows.len() as u64 }
}

/// A run's memory.
pub(super) struct Need<'a> {
    spec: &'a TrainSpec,
    shape: &'a Shape,
    /// Of the largest micro-batch.
    tokens: u64,
    /// Most tokens with a loss in a micro-batch.
    trained: u64,
    parameters: u64,
}

impl<'a> Need<'a> {
    pub(super) fn of(spec: &'a TrainSpec, shape: &'a Shape, work: &Work, layout: &LoraLayout) -> Self {
        let (tokens, trained) = (work.largest_micro_batch, work.most_trained);
        Self { spec, shape, tokens, trained, parameters: layout.len() as u64 }
    }

    /// Parameters, gradient, moments, and the best parameters where early stopping keeps them.
    pub(super) fn state(&self, moment_bytes: u64) -> u64 {
        let copies = if self.spec.training.early_stopping.is_some() { 3 } else { 2 };
        copies * F32 * self.parameters + moment_bytes
    }

    /// Bytes that one block keeps for backward: x and m (C), q and the attention's output (Q), k and v (K), gate and up (I), A x of each
    /// projection (R), and its sums.
    fn kept_by_block(&self) -> u64 {
        let Widths { hidden, intermediate, queries, keys } = self.widths();
        let LoraSpec { r, target_modules, .. } = &self.spec.lora;
        let lora = u64::from(*r) * target_modules.len() as u64;
        let sums = self.shape.heads as u64 + 2;
        self.tokens * F32 * (2 * (hidden + queries + keys + intermediate) + lora + sums)
    }

    /// Bytes that exist for a moment in a block's backward: the gradients of all its parts, two norms' outputs, one packed operand.
    fn moment_of_backward(&self) -> u64 {
        let Widths { hidden, intermediate, queries, keys } = self.widths();
        self.tokens * F32 * (6 * hidden + 5 * intermediate + 2 * queries + 2 * keys)
    }

    /// Bytes that exist for a moment at the output projection: logits of a chunk of tokens with a loss, a band of its weight, hidden states.
    fn moment_of_head(&self) -> u64 {
        let vocabulary = self.shape.vocabulary as u64;
        let logits = (self.trained * vocabulary * F32).min(cross_entropy::LOGITS_BYTES as u64);
        logits + cross_entropy::BAND_BYTES as u64 + 6 * F32 * self.tokens * self.widths().hidden
    }

    /// Most bytes of activations at once, with so many blocks that keep them.
    pub(super) fn activations(&self, kept_layers: u64) -> u64 {
        let inputs = (self.shape.layers as u64).saturating_sub(kept_layers) * F32 * self.tokens * self.widths().hidden;
        let at_head = kept_layers * self.kept_by_block() + self.moment_of_head();
        let at_last_block = kept_layers.max(1) * self.kept_by_block() + self.moment_of_backward();
        inputs + at_head.max(at_last_block)
    }

    /// Blocks that keep their activations: the specification's word, or for `auto` as many as a budget of so many bytes allows.
    pub(super) fn kept_layers(&self, budget_bytes: u64) -> u64 {
        let layers = self.shape.layers as u64;
        match self.spec.training.gradient_checkpointing {
            GradientCheckpointing::None => layers,
            GradientCheckpointing::Full => 0,
            GradientCheckpointing::Auto => {
                let state = self.state(2 * F32 * self.parameters);
                let fits = |kept: &u64| state + self.activations(*kept) <= budget_bytes;
                (0..=layers).rev().find(fits).unwrap_or(0)
            }
        }
    }

    fn widths(&self) -> Widths {
        let width = |heads: usize| (heads * self.shape.head_dim) as u64;
        Widths {
            hidden: self.shape.hidden as u64,
            intermediate: self.shape.intermediate as u64,
            queries: width(self.shape.heads),
            keys: width(self.shape.kv_heads),
        }
    }
}

struct Widths {
    hidden: u64,
    intermediate: u64,
    queries: u64,
    keys: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::TrainSpec;

    fn kept(checkpointing: GradientCheckpointing, budget_bytes: u64) -> u64 {
        let mut spec = TrainSpec::default();
        spec.training.gradient_checkpointing = checkpointing;
        let shape = Shape { layers: 8, ..Shape::tiny() };
        let need = Need { spec: &spec, shape: &shape, tokens: 512, trained: 512, parameters: 1000 };
        need.kept_layers(budget_bytes)
    }

    #[test]
    fn auto_keeps_as_many_layers_as_fit() {
        use GradientCheckpointing::{Auto, Full, None};
        assert_eq!((kept(None, 0), kept(Full, u64::MAX), kept(Auto, u64::MAX), kept(Auto, 0)), (8, 0, 8, 0));
        let spec = TrainSpec::default();
        let shape = Shape { layers: 8, ..Shape::tiny() };
        let need = Need { spec: &spec, shape: &shape, tokens: 512, trained: 512, parameters: 1000 };
        let sizes: Vec<u64> = (0..=8).map(|kept| need.state(8000) + need.activations(kept)).collect();
        assert!(sizes.is_sorted(), "{sizes:?}");
        for (layers, size) in sizes.iter().enumerate().skip(1) {
            assert_eq!((kept(Auto, *size), kept(Auto, size - 1)), (layers as u64, layers as u64 - 1));
        }
    }

    #[test]
    fn the_hosts_memory_can_be_read() {
        let memory = HostMemory::now().unwrap();
        assert!(memory.anonymous_bytes > 100_000 && memory.file_bytes > 100_000, "{memory:?}");
        assert!(memory.available_bytes > 1 << 20, "{memory:?}");
        assert_eq!(kilobytes("VmHWM:\t 5 kB\nRssAnon:\t    1234 kB\n", "RssAnon:"), 1234 * 1024);
        assert_eq!(kilobytes("", "RssAnon:"), 0);
    }
}
