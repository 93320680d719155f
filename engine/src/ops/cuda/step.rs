//! One micro-batch on a GPU: the whole model forward and backward, the same lines as `model::block` and `model::llama`.
//!
//! What differs from the CPU is where values lie: buffers are made once for the largest micro-batch and cut anew for each, and matrices
//! that become operands of one product lie beside each other ([x | u], [dy | du], the weights of a group and their LoRAs; see `sizes`).
//! The gradient of gate and up overwrites them, and SwiGLU's output and its gradient share a buffer.

use std::rc::Rc;

use super::attention::Inputs;
use super::backward::Backward;
use super::buffers::{Batch, Buffers, Head, Parts, Saved};
use super::cross_entropy::{gather_rows, scatter_rows};
use super::gemm::Product;
use super::sizes::{Group, Sizes};
use super::weights::{DeviceModel, fill_lora, outputs_of};
use super::{Buffer, Dtype, Gpu, Mat, dequantize, dropout, lora, rms_norm, rope, swiglu};
use crate::Result;
use crate::adapter::LoraLayout;
use crate::ops::dropout::Dropout;
use crate::spec::Target;

/// Everything that a pass over a micro-batch reads.
pub(crate) struct Pass<'a> {
    pub(crate) gpu: &'a Rc<Gpu>,
    pub(crate) model: &'a DeviceModel,
    pub(crate) sizes: &'a Sizes,
    pub(crate) layout: &'a LoraLayout,
    /// f32, the LoRA's flat buffer.
    pub(crate) parameters: &'a Buffer,
    pub(crate) dtype: Dtype,
    pub(crate) buffers: &'a Buffers,
    pub(crate) batch: Batch,
    pub(crate) dropout: Option<Dropout>,
}

/// Where gradients go, and what they are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Gradient<'a> {
    /// f32, the layout of the parameters; added to.
    pub(crate) flat: &'a Buffer,
    pub(crate) scale: f32,
    /// Blocks that keep their activations, counted from the last one.
    pub(crate) kept_layers: usize,
}

impl Pass<'_> {
    /// Adds the micro-batch's loss to the sums, and its gradient to `gradient`.
    pub(crate) fn forward_backward(&self, gradient: Gradient<'_>) -> Result<()> {
        let layers = self.model.blocks.len();
        let first_kept = layers - gradient.kept_layers.min(layers);
        let parts = self.buffers.parts(self.batch.tokens);
        self.embed(parts.x(0))?;
        for layer in 0..layers {
            let slot = if layer < first_kept { parts.recomputed() } else { parts.saved(layer - first_kept) };
            self.block_forward(&parts, layer, &slot, Some(parts.x(layer + 1)))?;
        }
        let last = parts.x(layers);
        self.head(&parts, last, Some(gradient.scale))?;
        for layer in (0..layers).rev() {
            let is_kept = layer >= first_kept;
            let slot = if is_kept { parts.saved(layer - first_kept) } else { parts.recomputed() };
            if !is_kept {
                self.block_forward(&parts, layer, &slot, None)?;
            }
            let resident = self.model.blocks[layer].resident.borrow();
            let (slot, gradient) = (&slot, gradient.flat);
            Backward { pass: self, parts: &parts, layer, slot, gradient, resident: &resident }.run(is_kept)?;
        }
        Ok(())
    }

    /// Adds the micro-batch's loss to the sums.
    pub(crate) fn forward(&self) -> Result<()> {
        let layers = self.model.blocks.len();
        let parts = self.buffers.parts(self.batch.tokens);
        self.embed(parts.x(0))?;
        for layer in 0..layers {
            // No activation is kept: any slot does.
            self.block_forward(&parts, layer, &parts.any_slot(), Some(parts.x(layer + 1)))?;
        }
        self.head(&parts, parts.x(layers), None)
    }

    fn embed(&self, x: Mat<'_>) -> Result<()> {
        dequantize::embed(self.gpu, &self.model.embed_tokens, self.buffers.token_ids(), x)
    }

    fn rms_eps(&self) -> f32 {
        self.model.config.rms_norm_eps
    }

    /// W' of a group, in the buffer that all share or resident.
    pub(super) fn weight<'a>(
        &'a self,
        parts: &Parts<'a>,
        layer: usize,
        group: Group,
        resident: &'a [Option<Buffer>; 4],
    ) -> Result<Mat<'a>> {
        let sizes = self.sizes.group(group);
        let place = |buffer: &'a Buffer| buffer.mat(0, (sizes.rows(), sizes.stride), sizes.stride, self.dtype);
        match &resident[group as usize] {
            // Filled when the LoRA last changed.
            Some(buffer) => Ok(place(buffer)),
            None => {
                let out = parts.weight(sizes, self.dtype);
                self.model.fill(self.gpu, (layer, group), self.sizes, (self.layout, self.parameters), out)?;
                Ok(out)
            }
        }
    }

    /// Dropout of a projection's LoRA input.
    pub(super) fn dropout_of(&self, layer: usize, target: Target) -> Option<Dropout> {
        let place = (layer * Target::ALL.len() + target.index()) as u64;
        self.dropout.map(|dropout| dropout.at(place))
    }

    /// u = A x into x's extension, and into `kept`.
    fn extend(
        &self,
        parts: &Parts<'_>,
        layer: usize,
        group: Group,
        x: Mat<'_>,
        weight: Mat<'_>,
        kept: Option<Mat<'_>>,
    ) -> Result<()> {
        let sizes = self.sizes.group(group);
        if sizes.extension == 0 {
            return Ok(());
        }
        let (inputs, extension) = (x.columns(0, sizes.inputs), x.columns(sizes.inputs, sizes.extension));
        let a = weight.rows(sizes.outputs, sizes.extension).columns(0, sizes.inputs);
        if self.dropout.is_none() {
            return lora::u(self.gpu, parts.partials(), inputs, a, extension, kept);
        }
        for (place, target, ..) in outputs_of(group, self.sizes) {
            let (first, rank) = (place * self.sizes.padded_rank, self.sizes.padded_rank);
            let dropped = self.dropped(parts, layer, target, inputs)?;
            let kept = kept.map(|kept| kept.columns(first, rank));
            let (a, extension) = (a.rows(first, rank), extension.columns(first, rank));
            lora::u(self.gpu, parts.partials(), dropped, a, extension, kept)?;
        }
        Ok(())
    }

    /// D(x) of a projection, in a buffer that all share.
    pub(super) fn dropped<'a>(&self, parts: &Parts<'a>, layer: usize, target: Target, x: Mat<'a>) -> Result<Mat<'a>> {
        let Some(dropout) = self.dropout_of(layer, target) else { return Ok(x) };
        let out = parts.dropped(x.columns);
        dropout::apply(self.gpu, out, x, &dropout)?;
        Ok(out)
    }

    /// Forward of a block into `y`; without it, what backward needs and no more.
    fn block_forward(&self, parts: &Parts<'_>, layer: usize, slot: &Saved<'_>, y: Option<Mat<'_>>) -> Result<()> {
        let (gpu, shape, block) = (self.gpu, &self.sizes.shape, &self.model.blocks[layer]);
        let resident = block.resident.borrow();
        let (x, n) = (parts.x(layer), parts.norm());

        rms_norm::forward(
            gpu,
            n.columns(0, shape.hidden),
            slot.rstd_1,
            x,
            vector(&block.input_layernorm),
            self.rms_eps(),
        )?;
        let weight = self.weight(parts, layer, Group::Qkv, &resident)?;
        self.extend(parts, layer, Group::Qkv, n, weight, slot.u_qkv)?;
        self.project("gemm qkv", Group::Qkv, slot.qkv, n, weight, None)?;
        let table = self.buffers.rope_table(self.batch.tokens);
        rope::forward(gpu, self.turned(slot.qkv), table, shape.head_dim, shape.rope_layout)?;
        let o = slot.o.columns(0, self.sizes.queries());
        self.buffers.attention.forward(self.split(slot.qkv), o, slot.lse)?;

        let weight = self.weight(parts, layer, Group::O, &resident)?;
        self.extend(parts, layer, Group::O, slot.o, weight, None)?;
        self.project("gemm o", Group::O, slot.m, slot.o, weight, Some(x))?;
        rms_norm::forward(
            gpu,
            n.columns(0, shape.hidden),
            slot.rstd_2,
            slot.m,
            vector(&block.post_attention_layernorm),
            self.rms_eps(),
        )?;
        let weight = self.weight(parts, layer, Group::GateUp, &resident)?;
        self.extend(parts, layer, Group::GateUp, n, weight, slot.u_gate_up)?;
        let gate_up = slot.gate_up.columns(0, 2 * shape.intermediate);
        self.project("gemm gate_up", Group::GateUp, gate_up, n, weight, None)?;

        let has_lora = self.sizes.group(Group::Down).extension > 0;
        if y.is_none() && !has_lora {
            return Ok(());
        }
        let h = parts.h();
        swiglu::forward(gpu, h.columns(0, shape.intermediate), gate_up)?;
        let weight = self.weight(parts, layer, Group::Down, &resident)?;
        self.extend(parts, layer, Group::Down, h, weight, slot.u_down)?;
        match y {
            Some(y) => self.project("gemm down", Group::Down, y, h, weight, Some(slot.m)),
            None => Ok(()),
        }
    }

    /// y = [x | u] W'ᵀ, and what is added.
    fn project(
        &self,
        label: &'static str,
        group: Group,
        y: Mat<'_>,
        x: Mat<'_>,
        weight: Mat<'_>,
        add: Option<Mat<'_>>,
    ) -> Result<()> {
        let sizes = self.sizes.group(group);
        let depth = sizes.inputs + sizes.extension;
        let product = Product::nt(x.columns(0, depth), weight.rows(0, sizes.outputs).columns(0, depth));
        self.gpu.gemm(label, y, add.map_or(product, |add| product.plus(add)))
    }

    /// q, k and v.
    pub(super) fn split<'a>(&self, qkv: Mat<'a>) -> Inputs<'a> {
        let (queries, keys) = (self.sizes.queries(), self.sizes.keys());
        let (k, v) = (qkv.columns(queries, keys), qkv.columns(queries + keys, keys));
        Inputs { q: qkv.columns(0, queries), k, v }
    }

    /// q and k.
    pub(super) fn turned<'a>(&self, qkv: Mat<'a>) -> Mat<'a> {
        qkv.columns(0, self.sizes.queries() + self.sizes.keys())
    }

    /// Loss of the labelled tokens; with a scale, the residual stream's gradient before the final norm.
    fn head(&self, parts: &Parts<'_>, x: Mat<'_>, scale: Option<f32>) -> Result<()> {
        let (gpu, hidden) = (self.gpu, self.sizes.shape.hidden);
        let (n, dn) = (parts.norm().columns(0, hidden), parts.dn());
        let norm = vector(&self.model.norm);
        rms_norm::forward(gpu, n, parts.final_rstd(), x, norm, self.rms_eps())?;
        let head = parts.head();
        let weight = match self.model.lm_head().as_mat(self.dtype) {
            Some(weight) => weight,
            None => {
                let weight = head.weight();
                dequantize::dequantize(gpu, self.model.lm_head(), weight)?;
                weight
            }
        };
        if scale.is_some() {
            dn.fill_zero(gpu)?;
        }
        let rows_at_once = Head::rows_at_once(self.sizes.shape.vocabulary);
        for first in (0..self.batch.labelled).step_by(rows_at_once) {
            let count = rows_at_once.min(self.batch.labelled - first);
            let (index, labels) = (self.buffers.index(first), self.buffers.labels(first));
            let (rows, logits) = (head.rows(count), head.logits(count));
            gather_rows(gpu, rows, n, index)?;
            gpu.gemm("gemm lm_head", logits, Product::nt(rows, weight))?;
            let Some(scale) = scale else {
                self.buffers.losses.forward(gpu, logits, labels)?;
                continue;
            };
            let dlogits = head.dlogits(count);
            self.buffers.losses.forward_backward(gpu, dlogits, logits, labels, scale)?;
            gpu.gemm("gemm lm_head back", rows, Product::nn(dlogits, weight))?;
            scatter_rows(gpu, dn, rows, index)?;
        }
        if scale.is_some() {
            let dresidual = parts.dresidual().columns(0, hidden);
            dresidual.fill_zero(gpu)?;
            let from = rms_norm::Backward { dy: dn, x, weight: norm, rstd: parts.final_rstd() };
            rms_norm::backward_add(gpu, dresidual, None, from)?;
        }
        Ok(())
    }
}

/// A norm's weight.
pub(super) fn vector(weight: &Buffer) -> Mat<'_> {
    weight.row(Dtype::F32)
}

/// Writes the LoRAs' parts of every W' that stays dequantized: after the LoRA has changed.
pub(crate) fn refresh_resident(
    gpu: &Gpu,
    model: &DeviceModel,
    sizes: &Sizes,
    (layout, parameters): (&LoraLayout, &Buffer),
    dtype: Dtype,
) -> Result<()> {
    for (layer, block) in model.blocks.iter().enumerate() {
        for (group, buffer) in Group::ALL.into_iter().zip(block.resident.borrow().iter()) {
            if let Some(buffer) = buffer {
                let of = sizes.group(group);
                let out = buffer.mat(0, (of.rows(), of.stride), of.stride, dtype);
                fill_lora(gpu, (layer, group), sizes, (layout, parameters), out)?;
            }
        }
    }
    Ok(())
}
