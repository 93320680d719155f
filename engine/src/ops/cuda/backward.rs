//! The backward of one block on a GPU: its four groups of projections, from the last to the first, and what lies between them.

use super::attention::{self, Gradients, Inputs};
use super::buffers::{Parts, Saved};
use super::gemm::Product;
use super::sizes::Group;
use super::step::{Pass, vector};
use super::weights::outputs_of;
use super::{Buffer, Dtype, Mat, dropout, lora, rms_norm, rope, swiglu};
use crate::Result;
use crate::spec::Target;

/// The backward of one block.
pub(super) struct Backward<'a, 'b> {
    pub(super) pass: &'a Pass<'b>,
    pub(super) parts: &'a Parts<'a>,
    pub(super) layer: usize,
    /// What forward kept.
    pub(super) slot: &'a Saved<'a>,
    /// f32, added to.
    pub(super) gradient: &'a Buffer,
    /// W' of each group that stays dequantized.
    pub(super) resident: &'a [Option<Buffer>; 4],
}

impl<'a> Backward<'a, '_> {
    /// Turns the residual stream's gradient after the block into the one before it, in place, and adds the LoRA's gradients.
    /// In the lowest block it stops at the lowest LoRA. With `fill_down`, W' of down_proj is not in its buffer yet.
    pub(super) fn run(&self, fill_down: bool) -> Result<()> {
        if self.down(fill_down)? && self.gate_up()? && self.o()? {
            self.qkv()?;
        }
        Ok(())
    }

    /// Whether something before these projections has a LoRA.
    fn needs(&self, below: &[Target]) -> bool {
        self.layer > 0 || below.iter().any(|&target| self.pass.layout.offsets(self.layer, target).is_some())
    }

    fn weight(&self, group: Group) -> Result<Mat<'a>> {
        self.pass.weight(self.parts, self.layer, group, self.resident)
    }

    /// down_proj and SwiGLU: leaves the gradient of gate and up in their place. Whether backward goes on.
    fn down(&self, fill_down: bool) -> Result<bool> {
        let (pass, parts, slot) = (self.pass, self.parts, self.slot);
        let (gpu, intermediate) = (pass.gpu, pass.sizes.shape.intermediate);
        let (dresidual, inner) = (parts.dresidual(), parts.h().columns(0, intermediate));
        let of = pass.sizes.group(Group::Down);
        let weight = if fill_down || of.extension == 0 || self.resident[Group::Down as usize].is_some() {
            self.weight(Group::Down)?
        } else {
            parts.weight(of, pass.dtype)
        };
        let goes_on = self.needs(&Target::ALL[..6]);
        self.outputs(Group::Down, dresidual, slot.u_down, weight)?;
        let gate_up = slot.gate_up.columns(0, 2 * intermediate);
        if goes_on {
            self.input("gemm down back", Group::Down, inner, dresidual, weight)?;
            swiglu::backward(gpu, gate_up, Some(inner), inner, gate_up)?;
        } else {
            swiglu::forward(gpu, inner, gate_up)?;
        }
        self.inputs(Group::Down, dresidual, inner)?;
        Ok(goes_on)
    }

    /// gate_proj, up_proj and their norm: adds to the residual stream's gradient. Whether backward goes on.
    fn gate_up(&self) -> Result<bool> {
        let (pass, parts, slot) = (self.pass, self.parts, self.slot);
        let hidden = pass.sizes.shape.hidden;
        let weight = self.weight(Group::GateUp)?;
        let goes_on = self.needs(&Target::ALL[..4]);
        self.outputs(Group::GateUp, slot.gate_up, slot.u_gate_up, weight)?;
        let (n2, dn) = (parts.norm().columns(0, hidden), parts.dn());
        let norm = vector(&pass.model.blocks[self.layer].post_attention_layernorm);
        if goes_on {
            self.input("gemm gate_up back", Group::GateUp, dn, slot.gate_up, weight)?;
            let from = rms_norm::Backward { dy: dn, x: slot.m, weight: norm, rstd: slot.rstd_2 };
            rms_norm::backward_add(pass.gpu, parts.dresidual().columns(0, hidden), Some(n2), from)?;
        } else {
            rms_norm::recompute(pass.gpu, n2, slot.m, norm, slot.rstd_2)?;
        }
        self.inputs(Group::GateUp, slot.gate_up, n2)?;
        Ok(goes_on)
    }

    /// o_proj: leaves the gradient of attention's output. Whether backward goes on.
    fn o(&self) -> Result<bool> {
        let (pass, parts, slot) = (self.pass, self.parts, self.slot);
        let queries = pass.sizes.queries();
        let weight = self.weight(Group::O)?;
        let goes_on = self.needs(&Target::ALL[..3]);
        let extension = pass.sizes.group(Group::O).extension;
        let u = (extension > 0).then(|| slot.o.columns(queries, extension));
        self.outputs(Group::O, parts.dresidual(), u, weight)?;
        self.inputs(Group::O, parts.dresidual(), slot.o.columns(0, queries))?;
        if goes_on {
            self.input("gemm o back", Group::O, parts.dout(), parts.dresidual(), weight)?;
        }
        Ok(goes_on)
    }

    /// Attention, RoPE, q_proj, k_proj, v_proj and their norm: adds to the residual stream's gradient, but in the lowest block.
    fn qkv(&self) -> Result<()> {
        let (pass, parts, slot) = (self.pass, self.parts, self.slot);
        let (gpu, shape, dqkv) = (pass.gpu, &pass.sizes.shape, parts.dqkv());
        let o = slot.o.columns(0, pass.sizes.queries());
        let saved = attention::Saved { inputs: pass.split(slot.qkv), o, lse: slot.lse };
        let Inputs { q: dq, k: dk, v: dv } = pass.split(dqkv);
        pass.buffers.attention.backward(parts.dout(), saved, parts.delta(), Gradients { dq, dk, dv })?;
        let table = pass.buffers.rope_table(pass.batch.tokens);
        rope::backward(gpu, pass.turned(dqkv), table, shape.head_dim, shape.rope_layout)?;
        let weight = self.weight(Group::Qkv)?;
        self.outputs(Group::Qkv, dqkv, slot.u_qkv, weight)?;
        let (n1, dn, x) = (parts.norm().columns(0, shape.hidden), parts.dn(), parts.x(self.layer));
        let norm = vector(&pass.model.blocks[self.layer].input_layernorm);
        if self.layer == 0 {
            rms_norm::recompute(gpu, n1, x, norm, slot.rstd_1)?;
        } else {
            self.input("gemm qkv back", Group::Qkv, dn, dqkv, weight)?;
            let from = rms_norm::Backward { dy: dn, x, weight: norm, rstd: slot.rstd_1 };
            rms_norm::backward_add(gpu, parts.dresidual().columns(0, shape.hidden), Some(n1), from)?;
        }
        self.inputs(Group::Qkv, dqkv, n1)
    }

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
