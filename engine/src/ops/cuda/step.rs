//! One micro-batch on a GPU: the whole model forward and backward, the same lines as `model::block` and `model::llama`.
//!
//! What differs from the CPU is where values lie: buffers are made once for the largest micro-batch and cut anew for each, and matrices
//! that become operands of one product lie beside each other ([x | u], [dy | du], the weights of a group and their LoRAs; see `sizes`).
//! The gradient of gate and up overwrites them, and SwiGLU's output and its gradient share a buffer.

use std::rc::Rc;

use super::attention::{self, Gradients, Inputs};
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
            self.block_backward(&parts, layer, &slot, gradient.flat, is_kept)?;
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
    fn weight<'a>(
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
    fn dropout_of(&self, layer: usize, target: Target) -> Option<Dropout> {
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
    fn dropped<'a>(&self, parts: &Parts<'a>, layer: usize, target: Target, x: Mat<'a>) -> Result<Mat<'a>> {
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
    fn split<'a>(&self, qkv: Mat<'a>) -> Inputs<'a> {
        let (queries, keys) = (self.sizes.queries(), self.sizes.keys());
        let (k, v) = (qkv.columns(queries, keys), qkv.columns(queries + keys, keys));
        Inputs { q: qkv.columns(0, queries), k, v }
    }

    /// q and k.
    fn turned<'a>(&self, qkv: Mat<'a>) -> Mat<'a> {
        qkv.columns(0, self.sizes.queries() + self.sizes.keys())
    }

    /// Turns the residual stream's gradient after the block into the one before it, in place, and adds the LoRA's gradients.
    /// In the lowest block it stops at the lowest LoRA. With `fill_down`, W' of down_proj is not in its buffer yet.
    fn block_backward(
        &self,
        parts: &Parts<'_>,
        layer: usize,
        slot: &Saved<'_>,
        gradient: &Buffer,
        fill_down: bool,
    ) -> Result<()> {
        let (gpu, shape, block) = (self.gpu, &self.sizes.shape, &self.model.blocks[layer]);
        let resident = block.resident.borrow();
        let queries = self.sizes.queries();
        let lowest = layer == 0;
        let needs_below =
            |below: &[Target]| !lowest || below.iter().any(|&target| self.layout.offsets(layer, target).is_some());
        let has_lora = self.sizes.group(Group::Down).extension > 0;
        let back = Backward { pass: self, parts, layer, gradient };
        let (dresidual, h, n) = (parts.dresidual(), parts.h(), parts.norm());
        let (dstream, inner) = (dresidual.columns(0, shape.hidden), h.columns(0, shape.intermediate));

        let weight = if fill_down || !has_lora || resident[Group::Down as usize].is_some() {
            self.weight(parts, layer, Group::Down, &resident)?
        } else {
            parts.weight(self.sizes.group(Group::Down), self.dtype)
        };
        let below = needs_below(&Target::ALL[..6]);
        back.outputs(Group::Down, dresidual, slot.u_down, weight)?;
        if below {
            back.input("gemm down back", Group::Down, inner, dresidual, weight)?;
            let gate_up = slot.gate_up.columns(0, 2 * shape.intermediate);
            swiglu::backward(gpu, gate_up, Some(inner), inner, gate_up)?;
        } else {
            swiglu::forward(gpu, inner, slot.gate_up.columns(0, 2 * shape.intermediate))?;
        }
        back.inputs(Group::Down, dresidual, inner)?;
        if !below {
            return Ok(());
        }

        let weight = self.weight(parts, layer, Group::GateUp, &resident)?;
        let below = needs_below(&Target::ALL[..4]);
        back.outputs(Group::GateUp, slot.gate_up, slot.u_gate_up, weight)?;
        let (n2, dn) = (n.columns(0, shape.hidden), parts.dn());
        if below {
            back.input("gemm gate_up back", Group::GateUp, dn, slot.gate_up, weight)?;
            let from = rms_norm::Backward {
                dy: dn,
                x: slot.m,
                weight: vector(&block.post_attention_layernorm),
                rstd: slot.rstd_2,
            };
            rms_norm::backward_add(gpu, dstream, Some(n2), from)?;
        } else {
            rms_norm::recompute(gpu, n2, slot.m, vector(&block.post_attention_layernorm), slot.rstd_2)?;
        }
        back.inputs(Group::GateUp, slot.gate_up, n2)?;
        if !below {
            return Ok(());
        }

        let weight = self.weight(parts, layer, Group::O, &resident)?;
        let below = needs_below(&Target::ALL[..3]);
        let o = slot.o.columns(0, queries);
        let extension = self.sizes.group(Group::O).extension;
        let u_o = (extension > 0).then(|| slot.o.columns(queries, extension));
        back.outputs(Group::O, dresidual, u_o, weight)?;
        back.inputs(Group::O, dresidual, o)?;
        if !below {
            return Ok(());
        }
        let (dout, dqkv) = (parts.dout(), parts.dqkv());
        back.input("gemm o back", Group::O, dout, dresidual, weight)?;

        let saved = attention::Saved { inputs: self.split(slot.qkv), o, lse: slot.lse };
        let Inputs { q: dq, k: dk, v: dv } = self.split(dqkv);
        self.buffers.attention.backward(dout, saved, parts.delta(), Gradients { dq, dk, dv })?;
        let table = self.buffers.rope_table(self.batch.tokens);
        rope::backward(gpu, self.turned(dqkv), table, shape.head_dim, shape.rope_layout)?;
        let weight = self.weight(parts, layer, Group::Qkv, &resident)?;
        back.outputs(Group::Qkv, dqkv, slot.u_qkv, weight)?;
        let (n1, x) = (n.columns(0, shape.hidden), parts.x(layer));
        if lowest {
            rms_norm::recompute(gpu, n1, x, vector(&block.input_layernorm), slot.rstd_1)?;
        } else {
            back.input("gemm qkv back", Group::Qkv, dn, dqkv, weight)?;
            let from = rms_norm::Backward { dy: dn, x, weight: vector(&block.input_layernorm), rstd: slot.rstd_1 };
            rms_norm::backward_add(gpu, dstream, Some(n1), from)?;
        }
        back.inputs(Group::Qkv, dqkv, n1)
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
fn vector(weight: &Buffer) -> Mat<'_> {
    weight.row(Dtype::F32)
}

/// The backward of one layer's projections.
struct Backward<'a, 'b> {
    pass: &'a Pass<'b>,
    parts: &'a Parts<'a>,
    layer: usize,
    gradient: &'a Buffer,
}

impl Backward<'_, '_> {
    /// du = s·Bᵀ dy into dy's extension, and dB += s · dyᵀ u.
    fn outputs(&self, group: Group, dy: Mat<'_>, u: Option<Mat<'_>>, weight: Mat<'_>) -> Result<()> {
        let sizes = self.pass.sizes.group(group);
        let Some(u) = u.filter(|_| sizes.extension > 0) else { return Ok(()) };
        let (gpu, rank) = (self.pass.gpu, self.pass.layout.spec().r as usize);
        let scaled_b = weight.rows(0, sizes.outputs).columns(sizes.inputs, sizes.extension);
        let (dy, du) = (dy.columns(0, sizes.outputs), dy.columns(sizes.outputs, sizes.extension));
        let rows: Vec<usize> = outputs_of(group, self.pass.sizes).map(|(.., rows)| rows).collect();
        let gradients: Vec<_> = outputs_of(group, self.pass.sizes)
            .map(|(_, target, _, rows)| {
                let (_, offset_b) = self.pass.layout.offsets(self.layer, target)?;
                Some(self.gradient.mat(4 * offset_b, (rows, rank), rank, Dtype::F32))
            })
            .collect();
        let outputs = lora::Outputs { dy, columns: &rows, u, scaled_b, scale: self.pass.layout.spec().scale() as f32 };
        lora::backward_outputs(gpu, self.parts.partials(), du, &gradients, &outputs)
    }

    /// dx = [dy | du] W'.
    fn input(&self, label: &'static str, group: Group, dx: Mat<'_>, dy: Mat<'_>, weight: Mat<'_>) -> Result<()> {
        let (pass, sizes) = (self.pass, self.pass.sizes.group(group));
        let depth = if pass.dropout.is_some() { sizes.outputs } else { sizes.rows() };
        let weight_of_x = weight.columns(0, sizes.inputs);
        pass.gpu.gemm(label, dx, Product::nn(dy.columns(0, depth), weight_of_x.rows(0, depth)))?;
        if sizes.extension == 0 {
            return Ok(());
        }
        // D is its own backward: it stands between A and x.
        for (place, target, ..) in outputs_of(group, pass.sizes) {
            if let Some(dropout) = pass.dropout_of(self.layer, target) {
                let rank = pass.sizes.padded_rank;
                let (du, a) = (
                    dy.columns(sizes.outputs + place * rank, rank),
                    weight_of_x.rows(sizes.outputs + place * rank, rank),
                );
                let through = self.parts.dropped(dx.columns);
                pass.gpu.gemm("lora dropout", through, Product::nn(du, a))?;
                dropout::apply_add(pass.gpu, dx, through, &dropout)?;
            }
        }
        Ok(())
    }

    /// dA += duᵀ x.
    fn inputs(&self, group: Group, dy: Mat<'_>, x: Mat<'_>) -> Result<()> {
        let (pass, sizes) = (self.pass, self.pass.sizes.group(group));
        let rank = pass.layout.spec().r as usize;
        if sizes.extension == 0 {
            return Ok(());
        }
        let gradients: Vec<_> = outputs_of(group, pass.sizes)
            .map(|(_, target, ..)| {
                let (offset_a, _) = pass.layout.offsets(self.layer, target)?;
                Some(self.gradient.mat(4 * offset_a, (rank, sizes.inputs), sizes.inputs, Dtype::F32))
            })
            .collect();
        let du = dy.columns(sizes.outputs, sizes.extension);
        if pass.dropout.is_none() {
            return lora::da(pass.gpu, self.parts.partials(), &gradients, (du, x));
        }
        // Each projection has an input of its own.
        for (place, target, ..) in outputs_of(group, pass.sizes) {
            if gradients[place].is_some() {
                let (first, rank) = (place * pass.sizes.padded_rank, pass.sizes.padded_rank);
                let x = pass.dropped(self.parts, self.layer, target, x)?;
                lora::da(pass.gpu, self.parts.partials(), &gradients[place..=place], (du.columns(first, rank), x))?;
            }
        }
        Ok(())
    }
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
