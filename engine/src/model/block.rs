//! One block: attention and MLP on the residual stream, forward and backward adjacent.
//!
//! Forward: n₁ = norm(x); q, k, v = projections of n₁, q and k turned by RoPE; m = x + o_proj(attention(q, k, v));
//! n₂ = norm(m); y = m + down_proj(silu(gate_proj n₂) · up_proj n₂).
//! Backward is the same lines reversed on one tensor, the gradient of the residual stream, which each part adds to.
//! What is kept is the least that backward needs; norm outputs and SwiGLU are computed again.

use std::cell::RefCell;

use candle_core::Tensor;

use crate::Result;
use crate::adapter::LoraParams;
use crate::gguf::GgufFile;
use crate::model::config::{Config, Shape};
use crate::model::linear::{self, Lora, LoraBackward, Projection, ProjectionBackward, Scratch};
use crate::model::weights::{self, Weight};
use crate::ops::dropout::Dropout;
use crate::ops::matmul::Compute;
use crate::ops::rope::RopeTable;
use crate::ops::{add, attention, rms_norm, swiglu, tensor};
use crate::spec::Target;

/// A block's frozen weights.
#[derive(Debug)]
pub(crate) struct Block {
    layer: usize,
    input_layernorm: Tensor,
    post_attention_layernorm: Tensor,
    projections: [Weight; 7],
}

/// A block's frozen weights, borrowed.
#[derive(Debug)]
pub struct BlockParts<'a> {
    /// (C).
    pub input_layernorm: &'a Tensor,
    /// (C).
    pub post_attention_layernorm: &'a Tensor,
    /// In the order of [`Target::ALL`], (out, in) each.
    pub projections: [&'a Weight; 7],
}

/// What every block of one pass shares.
pub(crate) struct Pass<'a> {
    pub(crate) config: &'a Config,
    pub(crate) rope: &'a RopeTable,
    pub(crate) lora: Option<&'a LoraParams>,
    /// What of every LoRA's input is dropped; each projection has a mask of its own.
    pub(crate) dropout: Option<Dropout>,
    pub(crate) scratch: &'a RefCell<Scratch>,
    pub(crate) compute: Compute,
}

/// What backward needs of a block's forward.
pub(crate) struct Saved {
    x: Tensor,
    rstd_1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    m: Tensor,
    rstd_2: Tensor,
    gate: Tensor,
    up: Tensor,
    /// A x of each projection with a LoRA.
    u: [Option<Tensor>; 7],
}

/// Keys and values of the tokens so far, of one block.
#[derive(Debug)]
pub(crate) struct BlockCache {
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
}

impl Block {
    /// Reads block `layer` of a GGUF file.
    pub(crate) fn from_gguf(file: &GgufFile, layer: usize, shape: &Shape) -> Result<Self> {
        let norm = |name: &str| {
            let values = weights::vector(file, &format!("blk.{layer}.{name}.weight"), shape.hidden)?;
            tensor(values, shape.hidden)
        };
        let projection = |target| Weight::from_gguf(file, &gguf_name(layer, target), shape.projection(target));
        let [q, k, v, o, gate, up, down] = Target::ALL.map(projection);
        Ok(Self {
            layer,
            input_layernorm: norm("attn_norm")?,
            post_attention_layernorm: norm("ffn_norm")?,
            projections: [q?, k?, v?, o?, gate?, up?, down?],
        })
    }

    pub(crate) fn parts(&self) -> BlockParts<'_> {
        BlockParts {
            input_layernorm: &self.input_layernorm,
            post_attention_layernorm: &self.post_attention_layernorm,
            projections: self.projections.each_ref(),
        }
    }

    /// y from x (T, C), and what backward needs.
    pub(crate) fn forward(&self, x: Tensor, cu_seqlens: &[usize], pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
        let mut u = [const { None }; 7];
        let (n1, rstd_1) = rms_norm::forward(&x, &self.input_layernorm, pass.config.rms_norm_eps)?;
        let (q, k, v) = self.qkv(&n1, pass, &mut u)?;
        let (o, lse) = attention::forward(&q, &k, &v, cu_seqlens)?;
        let m = x.copy()?;
        self.project(&o.flatten_from(1)?, [(Target::OProj, &m)], true, pass, &mut u)?;
        let (n2, rstd_2) = rms_norm::forward(&m, &self.post_attention_layernorm, pass.config.rms_norm_eps)?;
        let (gate, up) = self.gate_up(&n2, pass, &mut u)?;
        let y = m.copy()?;
        self.project(&swiglu::forward(&gate, &up)?, [(Target::DownProj, &y)], true, pass, &mut u)?;
        Ok((y, Saved { x, rstd_1, q, k, v, o, lse, m, rstd_2, gate, up, u }))
    }

    /// Turns the gradient of y into the gradient of x in place and accumulates the LoRA gradients. In the `lowest` block it
    /// stops at the lowest LoRA: the gradient of x is then not complete, and nobody needs it.
    pub(crate) fn backward(
        &self,
        dresidual: &Tensor,
        saved: &Saved,
        cu_seqlens: &[usize],
        pass: &Pass<'_>,
        gradient: &LoraParams,
        lowest: bool,
    ) -> Result<()> {
        let shape = &pass.config.shape;
        let tokens = dresidual.dim(0)?;
        let needs_below =
            |below: &[Target]| !lowest || below.iter().any(|&target| gradient.pair(self.layer, target).is_some());
        let back = |x: &Tensor, of_x: &[(Target, &Tensor)], dx: Option<&Tensor>| {
            let projection = |&(target, dy): &(Target, _)| {
                let lora = self.lora_backward(target, saved, pass, gradient);
                ProjectionBackward { weight: &self.projections[target.index()], lora, dy }
            };
            let projections: Vec<ProjectionBackward<'_>> = of_x.iter().map(projection).collect();
            linear::backward(x, &projections, dx, &mut pass.scratch.borrow_mut(), pass.compute)
        };

        let dh = needs_below(&Target::ALL[..6]).then(|| zeros(tokens, shape.intermediate)).transpose()?;
        let h = swiglu::forward(&saved.gate, &saved.up)?;
        back(&h, &[(Target::DownProj, dresidual)], dh.as_ref())?;
        let Some(dh) = dh else { return Ok(()) };

        let (dgate, dup) = swiglu::backward(&dh, &saved.gate, &saved.up)?;
        let n2 = rms_norm::recompute(&saved.m, &self.post_attention_layernorm, &saved.rstd_2)?;
        let dn2 = needs_below(&Target::ALL[..4]).then(|| zeros(tokens, shape.hidden)).transpose()?;
        back(&n2, &[(Target::GateProj, &dgate), (Target::UpProj, &dup)], dn2.as_ref())?;
        let Some(dn2) = dn2 else { return Ok(()) };
        rms_norm::backward_add(dresidual, &dn2, &saved.m, &self.post_attention_layernorm, &saved.rstd_2)?;

        let width = shape.heads * shape.head_dim;
        let dout = needs_below(&Target::ALL[..3]).then(|| zeros(tokens, width)).transpose()?;
        back(&saved.o.flatten_from(1)?, &[(Target::OProj, dresidual)], dout.as_ref())?;
        let Some(dout) = dout else { return Ok(()) };
        let dout = dout.reshape((tokens, shape.heads, shape.head_dim))?;

        let Saved { q, k, v, o, lse, .. } = saved;
        let (dq, dk, dv) = attention::backward(&dout, attention::Saved { q, k, v, o, lse }, cu_seqlens)?;
        pass.rope.backward(&dq)?;
        pass.rope.backward(&dk)?;
        let n1 = rms_norm::recompute(&saved.x, &self.input_layernorm, &saved.rstd_1)?;
        let dn1 = (!lowest).then(|| zeros(tokens, shape.hidden)).transpose()?;
        let (dq, dk, dv) = (dq.flatten_from(1)?, dk.flatten_from(1)?, dv.flatten_from(1)?);
        back(&n1, &[(Target::QProj, &dq), (Target::KProj, &dk), (Target::VProj, &dv)], dn1.as_ref())?;
        match dn1 {
            None => Ok(()),
            Some(dn1) => rms_norm::backward_add(dresidual, &dn1, &saved.x, &self.input_layernorm, &saved.rstd_1),
        }
    }

    /// y for new tokens that follow those in the cache, whose keys and values are appended at `position`.
    pub(crate) fn decode(&self, x: Tensor, cache: &BlockCache, position: usize, pass: &Pass<'_>) -> Result<Tensor> {
        let mut u = [const { None }; 7];
        let tokens = x.dim(0)?;
        let (n1, _) = rms_norm::forward(&x, &self.input_layernorm, pass.config.rms_norm_eps)?;
        let (q, k, v) = self.qkv(&n1, pass, &mut u)?;
        for (place, new) in [(&cache.k, &k), (&cache.v, &v)] {
            let place = place.narrow(0, position, tokens)?;
            zero(&place)?;
            add::add(&place, new)?;
        }
        let seen = position + tokens;
        let o = attention::forward_cached(&q, &cache.k.narrow(0, 0, seen)?, &cache.v.narrow(0, 0, seen)?)?;
        self.project(&o.flatten_from(1)?, [(Target::OProj, &x)], true, pass, &mut u)?;
        let (n2, _) = rms_norm::forward(&x, &self.post_attention_layernorm, pass.config.rms_norm_eps)?;
        let (gate, up) = self.gate_up(&n2, pass, &mut u)?;
        self.project(&swiglu::forward(&gate, &up)?, [(Target::DownProj, &x)], true, pass, &mut u)?;
        Ok(x)
    }

    fn qkv(&self, n1: &Tensor, pass: &Pass<'_>, u: &mut [Option<Tensor>; 7]) -> Result<(Tensor, Tensor, Tensor)> {
        let shape = &pass.config.shape;
        let tokens = n1.dim(0)?;
        let q = zeros(tokens, shape.heads * shape.head_dim)?;
        let k = zeros(tokens, shape.kv_heads * shape.head_dim)?;
        let v = zeros(tokens, shape.kv_heads * shape.head_dim)?;
        self.project(n1, [(Target::QProj, &q), (Target::KProj, &k), (Target::VProj, &v)], false, pass, u)?;
        let heads = |x: &Tensor, heads| x.reshape((tokens, heads, shape.head_dim));
        let (q, k, v) = (heads(&q, shape.heads)?, heads(&k, shape.kv_heads)?, heads(&v, shape.kv_heads)?);
        pass.rope.forward(&q)?;
        pass.rope.forward(&k)?;
        Ok((q, k, v))
    }

    fn gate_up(&self, n2: &Tensor, pass: &Pass<'_>, u: &mut [Option<Tensor>; 7]) -> Result<(Tensor, Tensor)> {
        let intermediate = pass.config.shape.intermediate;
        let (gate, up) = (zeros(n2.dim(0)?, intermediate)?, zeros(n2.dim(0)?, intermediate)?);
        self.project(n2, [(Target::GateProj, &gate), (Target::UpProj, &up)], false, pass, u)?;
        Ok((gate, up))
    }

    /// The projections of one input, and their u.
    fn project<const N: usize>(
        &self,
        x: &Tensor,
        outs: [(Target, &Tensor); N],
        keep: bool,
        pass: &Pass<'_>,
        u: &mut [Option<Tensor>; 7],
    ) -> Result<()> {
        let projections = outs.map(|(target, out)| {
            (Projection { weight: &self.projections[target.index()], lora: self.lora(target, pass) }, out)
        });
        let us = linear::forward(x, projections, keep, pass.compute)?;
        for ((target, _), of_target) in outs.into_iter().zip(us) {
            u[target.index()] = of_target;
        }
        Ok(())
    }

    fn lora<'a>(&self, target: Target, pass: &Pass<'a>) -> Option<Lora<'a>> {
        let params = pass.lora?;
        let place = (self.layer * Target::ALL.len() + target.index()) as u64;
        let dropout = pass.dropout.map(|dropout| dropout.at(place));
        params.pair(self.layer, target).map(|pair| Lora { pair, scale: params.scale(), dropout })
    }

    fn lora_backward<'a>(
        &self,
        target: Target,
        saved: &'a Saved,
        pass: &Pass<'a>,
        gradient: &'a LoraParams,
    ) -> Option<LoraBackward<'a>> {
        let u = saved.u[target.index()].as_ref()?;
        Some(LoraBackward { lora: self.lora(target, pass)?, gradient: gradient.pair(self.layer, target)?, u })
    }
}

fn zeros(rows: usize, columns: usize) -> Result<Tensor> {
    tensor(crate::ops::zeros(rows * columns), (rows, columns))
}

fn zero(x: &Tensor) -> Result<()> {
    crate::ops::host_mut(x, |values| {
        values.fill(0.0);
        Ok(())
    })
}

/// A projection's tensor name in a `llama` GGUF file.
pub(crate) fn gguf_name(layer: usize, target: Target) -> String {
    let name = match target {
        Target::QProj => "attn_q",
        Target::KProj => "attn_k",
        Target::VProj => "attn_v",
        Target::OProj => "attn_output",
        Target::GateProj => "ffn_gate",
        Target::UpProj => "ffn_up",
        Target::DownProj => "ffn_down",
    };
    format!("blk.{layer}.{name}.weight")
}

/// All tensors of a block in a `llama` GGUF file.
pub(crate) fn tensor_names(layer: usize) -> impl Iterator<Item = String> {
    let norms = ["attn_norm", "ffn_norm"].map(|name| format!("blk.{layer}.{name}.weight"));
    norms.into_iter().chain(Target::ALL.map(|target| gguf_name(layer, target)))
}
