//! A model, a LoRA, its gradient and moments on one GPU: what a training step asks of a device.

use std::rc::Rc;
use std::sync::Arc;

use super::adamw_8bit::DeviceMoments;
use super::buffers::{Buffers, Need};
use super::gemm::WORKSPACE_BYTES;
use super::sizes::{self, Group, Sizes};
use super::step::{Gradient, Pass, refresh_resident};
use super::weights::{DeviceModel, model_bytes};
use super::{Buffer, Dtype, Gpu, Mat, Slab, adamw, attention, lora};
use crate::adapter::LoraLayout;
use crate::data::MicroBatch;
use crate::model::{Llama, MicroStep, Shape};
use crate::ops::adamw::Update;
use crate::ops::adamw_8bit::Moments as EightBitMoments;
use crate::ops::cross_entropy::Loss;
use crate::ops::dropout::Dropout;
use crate::ops::matmul::Compute;
use crate::spec::{GradientCheckpointing, Optimizer, SpecError, TrainSpec};
use crate::{Error, Result};

/// Memory that is left to the driver and to what it rounds up.
const SPARE_BYTES: usize = 256 << 20;

/// Pieces in which the driver hands memory out.
const PIECE_BYTES: usize = 2 << 20;

/// What a run asks for, the model aside.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) layout: Arc<LoraLayout>,
    pub(crate) compute: Compute,
    pub(crate) optimizer: Optimizer,
    /// Tokens of the largest micro-batch.
    pub(crate) tokens: usize,
    pub(crate) has_dropout: bool,
    /// Blocks that keep their activations; `None`: as many as fit.
    pub(crate) kept_layers: Option<usize>,
    /// Whether weights stay dequantized where there is room.
    pub(crate) may_stay_dequantized: bool,
    /// Bytes that all may take; `None`: what is free.
    pub(crate) memory_bytes: Option<u64>,
}

impl Setup {
    /// That of a run by its specification, for micro-batches of no token yet.
    pub(crate) fn of(spec: &TrainSpec, layout: &Arc<LoraLayout>, compute: Compute, memory_bytes: Option<u64>) -> Self {
        Self {
            layout: Arc::clone(layout),
            compute,
            optimizer: spec.training.optimizer,
            tokens: 0,
            has_dropout: spec.lora.dropout > 0.0,
            kept_layers: None,
            may_stay_dequantized: spec.training.gradient_checkpointing == GradientCheckpointing::Auto,
            memory_bytes,
        }
    }

    fn dtype(&self) -> Dtype {
        dtype(self.compute)
    }

    fn need(&self, dequantizes_head: bool, kept_layers: usize) -> Need {
        Need { tokens: self.tokens, kept_layers, dtype: self.dtype(), has_dropout: self.has_dropout, dequantizes_head }
    }

    /// Bytes of parameters, gradient and moments.
    fn state_bytes(&self) -> usize {
        let moments = match self.optimizer {
            Optimizer::AdamW => 8 * self.layout.len(),
            Optimizer::AdamW8bit => DeviceMoments::bytes(&self.layout.tensors()),
        };
        8 * self.layout.len() + moments
    }

    /// Bytes that a run with so many kept layers takes beside the products' workspace, none of whose weights stay dequantized.
    pub(super) fn bytes(&self, sizes: &Sizes, model_bytes: usize, dequantizes_head: bool, kept_layers: usize) -> usize {
        let buffers = Buffers::bytes(sizes, self.need(dequantizes_head, kept_layers));
        model_bytes + self.state_bytes() + buffers + adamw::NORM_BYTES
    }
}

/// Refuses a shape that the kernels have no way for.
///
/// # Errors
/// [`Error::Model`], with the size.
pub(crate) fn check(shape: &Shape) -> Result<()> {
    if shape.head_dim > attention::MAX_HEAD_DIM {
        let most = attention::MAX_HEAD_DIM;
        return Err(Error::Model(format!(
            "a GPU trains models with heads of up to {most} values, got {}",
            shape.head_dim
        )));
    }
    for (name, size) in [("hidden size", shape.hidden), ("intermediate size", shape.intermediate)] {
        if !size.is_multiple_of(sizes::ALIGNED_VALUES) {
            let of = sizes::ALIGNED_VALUES;
            return Err(Error::Model(format!("a GPU trains models whose {name} is a multiple of {of}, got {size}")));
        }
    }
    Ok(())
}

/// Refuses micro-batches of more tokens than the kernels count.
fn check_tokens(sizes: &Sizes, setup: &Setup) -> Result<()> {
    let (most, tokens, rank) = (lora::most_tokens(sizes), setup.tokens, setup.layout.spec().r);
    if tokens <= most {
        return Ok(());
    }
    let field = "training.micro_batch_size";
    let message = format!(
        "{field} must give micro-batches of at most {most} tokens on a GPU at lora.r {rank}, got one of {tokens}"
    );
    Err(Error::Spec(SpecError { field, message }))
}

fn dtype(compute: Compute) -> Dtype {
    match compute {
        Compute::F32 => Dtype::F32,
        Compute::Bf16 => Dtype::Bf16,
    }
}

/// Most bytes of a GPU's memory that a run of that model takes, none of whose weights stay dequantized.
pub(crate) fn peak_bytes(model: &Llama, setup: &Setup, kept_layers: usize) -> u64 {
    let sizes = Sizes::new(&model.config().shape, &setup.layout);
    (WORKSPACE_BYTES + setup.bytes(&sizes, model_bytes(model), dequantizes_head(model, setup.dtype()), kept_layers))
        as u64
}

/// Bytes that a run begun now may take on that GPU, the products' workspace among them.
///
/// # Errors
/// [`Error::Device`] where the GPU is not there, [`Error::DeviceMemory`] where not even the kernels find room.
pub(crate) fn free_bytes(ordinal: usize) -> Result<u64> {
    let gpu = Gpu::new(ordinal)?;
    Ok((gpu.memory()?.0 + gpu.allocated_bytes()).saturating_sub(SPARE_BYTES) as u64)
}

/// Blocks that keep their activations in so many bytes, `None` where not even a run that keeps none fits.
pub(crate) fn kept_layers_within(model: &Llama, setup: &Setup, memory_bytes: u64) -> Option<usize> {
    let fits = |kept: &usize| peak_bytes(model, setup, *kept) <= memory_bytes;
    (0..=model.config().shape.layers).rev().find(fits)
}

/// Bytes of weights that stay dequantized in a run of so many kept layers, with so many bytes left beside it.
pub(crate) fn resident_bytes_within(model: &Llama, setup: &Setup, kept_layers: usize, left: u64) -> u64 {
    let sizes = Sizes::new(&model.config().shape, &setup.layout);
    let layers = model.config().shape.layers;
    if !setup.may_stay_dequantized || kept_layers < layers {
        return 0;
    }
    let layer = layer_bytes(&sizes, setup.dtype());
    let fitting = left / layer.next_multiple_of(PIECE_BYTES).max(1) as u64;
    layer as u64 * fitting.min(layers as u64)
}

/// Bytes of W' of all groups of a layer.
fn layer_bytes(sizes: &Sizes, dtype: Dtype) -> usize {
    Group::ALL.iter().map(|&group| sizes.group(group).values() * dtype.bytes()).sum()
}

fn dequantizes_head(model: &Llama, dtype: Dtype) -> bool {
    use crate::quant::BlockType;
    let parts = model.parts();
    let stored = parts.lm_head.unwrap_or(parts.embed_tokens).dtype();
    !matches!((stored, dtype), (BlockType::F32, Dtype::F32) | (BlockType::BF16, Dtype::Bf16))
}

/// AdamW's moments on a GPU.
#[derive(Debug)]
enum Moments {
    /// f32, (2, N).
    F32(Buffer),
    EightBit(DeviceMoments),
}

/// Moments on the host.
#[derive(Debug)]
pub(crate) enum HostMoments<'a> {
    /// (2, N).
    F32(&'a mut [f32]),
    EightBit(&'a mut EightBitMoments),
}

/// A run's state on a GPU.
#[derive(Debug)]
pub(crate) struct Trainer {
    gpu: Rc<Gpu>,
    model: DeviceModel,
    sizes: Sizes,
    layout: Arc<LoraLayout>,
    dtype: Dtype,
    kept_layers: usize,
    parameters: Buffer,
    gradient: Buffer,
    moments: Moments,
    buffers: Buffers,
    norm_room: Buffer,
    resident_bytes: usize,
    /// Tokens with a loss since it was last taken.
    labelled: usize,
    /// Whether W' that stay dequantized lack the LoRA's last values.
    stale: bool,
}

impl Trainer {
    /// Copies a model to the GPU and makes room for a run. Parameters and moments are zero until they are written.
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU is not there, [`Error::DeviceMemory`] where the run does not fit.
    pub(crate) fn new(ordinal: usize, model: &Llama, setup: &Setup) -> Result<Self> {
        check(&model.config().shape)?;
        let gpu = Gpu::new(ordinal)?;
        let dequantizes_head = dequantizes_head(model, setup.dtype());
        let kept_layers = Self::choose(&gpu, model_bytes(model), &model.config().shape, dequantizes_head, setup)?;
        let model = DeviceModel::upload(&gpu, model)?;
        Self::with_model(gpu, model, setup, kept_layers)
    }

    /// Blocks that keep their activations: those of the setup, or as many as fit beside a model that is not there yet.
    fn choose(gpu: &Gpu, model_bytes: usize, shape: &Shape, dequantizes_head: bool, setup: &Setup) -> Result<usize> {
        let sizes = Sizes::new(shape, &setup.layout);
        check_tokens(&sizes, setup)?;
        let free = gpu.memory()?.0.saturating_sub(SPARE_BYTES);
        let allowed = |bytes: u64| (bytes as usize).saturating_sub(gpu.allocated_bytes());
        let budget = setup.memory_bytes.map_or(free, |bytes| free.min(allowed(bytes)));
        let bytes = |kept: usize| setup.bytes(&sizes, model_bytes, dequantizes_head, kept);
        let found = match setup.kept_layers {
            Some(kept) => Some(kept).filter(|&kept| bytes(kept) <= budget),
            None => (0..=shape.layers).rev().find(|&kept| bytes(kept) <= budget),
        };
        let least = bytes(setup.kept_layers.unwrap_or(0));
        found.ok_or(Error::DeviceMemory { needed_bytes: least as u64, free_bytes: budget as u64 })
    }

    /// As many kept layers as fit beside a model that is on the GPU.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub(crate) fn choose_beside(gpu: &Gpu, model: &DeviceModel, setup: &Setup) -> Result<usize> {
        let dequantizes_head = model.lm_head().as_mat(setup.dtype()).is_none();
        Self::choose(gpu, 0, &model.config.shape, dequantizes_head, setup)
    }

    /// A run of a model that is on the GPU.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub(crate) fn with_model(gpu: Rc<Gpu>, model: DeviceModel, setup: &Setup, kept_layers: usize) -> Result<Self> {
        let sizes = Sizes::new(&model.config.shape, &setup.layout);
        let (dtype, count) = (setup.dtype(), setup.layout.len());
        let dequantizes_head = model.lm_head().as_mat(dtype).is_none();
        let moments = match setup.optimizer {
            Optimizer::AdamW => Moments::F32(Buffer::zeros(&gpu, 8 * count)?),
            Optimizer::AdamW8bit => {
                let tensors = setup.layout.tensors();
                Moments::EightBit(DeviceMoments::new(&gpu, &EightBitMoments::zeros(&tensors), &tensors)?)
            }
        };
        let mut trainer = Self {
            parameters: Buffer::zeros(&gpu, 4 * count)?,
            gradient: Buffer::zeros(&gpu, 4 * count)?,
            moments,
            buffers: Buffers::new(&gpu, &sizes, setup.need(dequantizes_head, kept_layers))?,
            norm_room: Buffer::new(&gpu, adamw::NORM_BYTES)?,
            layout: Arc::clone(&setup.layout),
            gpu,
            model,
            sizes,
            dtype,
            kept_layers,
            resident_bytes: 0,
            labelled: 0,
            stale: true,
        };
        if setup.may_stay_dequantized && kept_layers == trainer.sizes.shape.layers {
            trainer.keep_dequantized(setup.memory_bytes)?;
        }
        Ok(trainer)
    }

    /// Keeps W' of as many groups as there is room for, those of the last layers first. Changes no bit of a result.
    fn keep_dequantized(&mut self, memory_bytes: Option<u64>) -> Result<()> {
        let free = self.gpu.memory()?.0.saturating_sub(SPARE_BYTES);
        let allowed =
            memory_bytes.map_or(usize::MAX, |bytes| (bytes as usize).saturating_sub(self.gpu.allocated_bytes()));
        let mut left = free.min(allowed);
        let layer_bytes = layer_bytes(&self.sizes, self.dtype);
        for layer in (0..self.model.blocks.len()).rev() {
            let bytes = |group| self.sizes.group(group).values() * self.dtype.bytes();
            // The driver rounds each piece of memory up.
            if left < layer_bytes.next_multiple_of(PIECE_BYTES) {
                break;
            }
            // Who else uses the GPU may have taken what was free: this saves time and is no need.
            let mut slab = match Slab::new(&self.gpu, Group::ALL.map(bytes)) {
                Err(Error::DeviceMemory { .. }) => break,
                slab => slab?,
            };
            for group in Group::ALL {
                let (of, buffer) = (self.sizes.group(group), slab.take(bytes(group)));
                let out = buffer.mat(0, (of.rows(), of.stride), of.stride, self.dtype);
                self.model.fill(&self.gpu, (layer, group), &self.sizes, (&self.layout, &self.parameters), out)?;
                self.model.blocks[layer].resident.borrow_mut()[group as usize] = Some(buffer);
            }
            left -= layer_bytes.next_multiple_of(PIECE_BYTES);
            self.resident_bytes += layer_bytes;
        }
        Ok(())
    }

    /// Values that are trained.
    #[cfg(test)]
    pub(crate) fn parameter_count(&self) -> usize {
        self.layout.len()
    }

    /// Blocks that keep their activations.
    pub(crate) fn kept_layers(&self) -> usize {
        self.kept_layers
    }

    /// Bytes that the run holds on the GPU.
    pub(crate) fn allocated_bytes(&self) -> usize {
        self.gpu.allocated_bytes()
    }

    /// Bytes of weights that stay dequantized.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }

    fn vector<'a>(&self, buffer: &'a Buffer) -> Mat<'a> {
        buffer.mat(0, (1, self.layout.len()), self.layout.len(), Dtype::F32)
    }

    /// Sets the LoRA.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn write_parameters(&mut self, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.layout.len(), "parameters of another LoRA");
        self.stale = true;
        self.parameters.write(0, values)
    }

    /// Reads the LoRA.
    ///
    /// # Errors
    /// [`Error::Device`] where something queued before has failed.
    pub(crate) fn read_parameters(&self, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), self.layout.len(), "parameters of another LoRA");
        self.parameters.read(0, values)
    }

    /// Reads the gradient.
    ///
    /// # Errors
    /// As [`Trainer::read_parameters`].
    #[cfg(test)]
    pub(crate) fn read_gradient(&self, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), self.layout.len(), "the gradient of another LoRA");
        self.gradient.read(0, values)
    }

    /// Sets the moments.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn write_moments(&mut self, moments: &HostMoments<'_>) -> Result<()> {
        match (&self.moments, moments) {
            (Moments::F32(buffer), HostMoments::F32(values)) => buffer.write(0, values),
            (Moments::EightBit(place), HostMoments::EightBit(moments)) => place.write(moments, &self.layout.tensors()),
            _ => Err(Error::Checkpoint("its moments are those of another optimizer".to_owned())),
        }
    }

    /// Reads the moments.
    ///
    /// # Errors
    /// As [`Trainer::read_parameters`].
    pub(crate) fn read_moments(&self, moments: HostMoments<'_>) -> Result<()> {
        match (&self.moments, moments) {
            (Moments::F32(buffer), HostMoments::F32(values)) => buffer.read(0, values),
            (Moments::EightBit(place), HostMoments::EightBit(moments)) => {
                *moments = place.read()?;
                Ok(())
            }
            _ => Err(Error::Checkpoint("its moments are those of another optimizer".to_owned())),
        }
    }

    /// Sets the gradient to 0.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn clear_gradient(&mut self) -> Result<()> {
        self.gradient.fill_zero()
    }

    fn pass(
        &mut self,
        batch: &MicroBatch,
        dropout: Option<Dropout>,
        run: impl FnOnce(&Pass<'_>, &Buffer) -> Result<()>,
    ) -> Result<()> {
        if self.stale {
            let lora = (&*self.layout, &self.parameters);
            refresh_resident(&self.gpu, &self.model, &self.sizes, lora, self.dtype)?;
            self.stale = false;
        }
        let batch = self.buffers.load(&self.gpu, &self.model.config, &self.model.rope_frequencies, batch)?;
        let pass = Pass {
            gpu: &self.gpu,
            model: &self.model,
            sizes: &self.sizes,
            layout: &self.layout,
            parameters: &self.parameters,
            dtype: self.dtype,
            buffers: &self.buffers,
            batch,
            dropout,
        };
        self.labelled += batch.labelled;
        run(&pass, &self.gradient)
    }

    /// Queues forward and backward of a micro-batch: its loss is added to what [`Trainer::take_loss`] gives, its gradient to the gradient.
    ///
    /// # Errors
    /// Tokens that do not fit the model, or a GPU that fails.
    pub(crate) fn forward_backward(&mut self, batch: &MicroBatch, step: MicroStep) -> Result<()> {
        let kept_layers = self.kept_layers;
        self.pass(batch, step.dropout, |pass, gradient| {
            pass.forward_backward(Gradient { flat: gradient, scale: step.scale, kept_layers })
        })
    }

    /// Queues forward of a micro-batch: its loss is added to what [`Trainer::take_loss`] gives.
    ///
    /// # Errors
    /// As [`Trainer::forward_backward`].
    pub(crate) fn evaluate(&mut self, batch: &MicroBatch) -> Result<()> {
        self.pass(batch, None, |pass, _| pass.forward())
    }

    /// The losses since it was last asked, once the GPU has come so far.
    ///
    /// # Errors
    /// [`Error::Device`] where something queued before has failed.
    pub(crate) fn take_loss(&mut self) -> Result<Loss> {
        let loss = self.buffers.losses.read(std::mem::take(&mut self.labelled))?;
        self.buffers.losses.clear()?;
        Ok(loss)
    }

    /// Euclidean norm of the gradient.
    ///
    /// # Errors
    /// As [`Trainer::take_loss`].
    pub(crate) fn gradient_norm(&self) -> Result<f64> {
        adamw::norm(&self.gpu, self.vector(&self.gradient), &self.norm_room)
    }

    /// Queues one step of AdamW.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses.
    pub(crate) fn step(&mut self, update: Update) -> Result<()> {
        self.stale = true;
        let count = self.layout.len();
        let (parameters, gradient) = (
            self.parameters.mat(0, (1, count), count, Dtype::F32),
            self.gradient.mat(0, (1, count), count, Dtype::F32),
        );
        match &mut self.moments {
            Moments::F32(moments) => {
                let moments = moments.mat(0, (2, count), count, Dtype::F32);
                adamw::step(&self.gpu, parameters, moments, gradient, update)
            }
            Moments::EightBit(moments) => moments.step(&self.gpu, parameters, gradient, update),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::LoraSpec;

    #[test]
    fn more_tokens_than_the_kernels_count_are_refused_by_their_number() {
        let shape = Shape::tiny();
        let mut spec = TrainSpec::default();
        for (rank, most) in [(16, 1_398_016), (200, 465_920)] {
            spec.lora = LoraSpec { r: rank, ..spec.lora };
            let layout = LoraLayout::new(&spec.lora, &shape);
            let sizes = Sizes::new(&shape, &layout);
            let of = |tokens| Setup { tokens, ..Setup::of(&spec, &layout, Compute::Bf16, None) };
            assert!(check_tokens(&sizes, &of(most)).is_ok());
            let error = check_tokens(&sizes, &of(most + 1)).unwrap_err().to_string();
            let words =
                [format!("at most {most} tokens"), format!("lora.r {rank}"), format!("got one of {}", most + 1)];
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
