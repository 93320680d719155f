//! What a micro-batch needs of a GPU's memory: one buffer, cut for each micro-batch by the same plan that says how large it must be.
//!
//! Kept between forward and backward: each block's input, and of the last `kept_layers` blocks the least that backward needs ([`Saved`]).
//! The other blocks share one slot, filled anew by their backward. What lives for a moment shares a place with what lives for another
//! moment: the blocks' part with the output projection's, SwiGLU's output with the gradient of q, k and v, a norm's gradient with the
//! attention output's.

use std::rc::Rc;

use super::attention::{Attention, Heads};
use super::cross_entropy::{Labels, Losses};
use super::sizes::{Group, GroupSizes, Sizes, aligned};
use super::{Buffer, Dtype, Gpu, Mat, Slab, lora, rope};
use crate::data::{MicroBatch, NO_LABEL};
use crate::model::Config;
use crate::{Error, Result};

/// Every part begins at a multiple of so many bytes.
const ALIGNMENT: usize = 256;
/// Bytes that the logits of one chunk of tokens may take in f32.
const LOGITS_BYTES: usize = 504 << 20;
/// Tokens of a chunk: a multiple of this, for the product's sake.
const CHUNK_STEP: usize = 128;
/// Most tokens of a chunk.
const MOST_ROWS: usize = 4096;

/// A matrix's place in the buffer.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    offset: usize,
    rows: usize,
    columns: usize,
    stride: usize,
}

/// Hands out places one after the other.
#[derive(Debug, Clone, Copy)]
struct Cursor(usize);

impl Cursor {
    fn take(&mut self, (rows, columns): (usize, usize), stride: usize, dtype: Dtype) -> Place {
        let place = Place { offset: self.0, rows, columns, stride };
        self.0 += (rows * stride * dtype.bytes()).next_multiple_of(ALIGNMENT);
        place
    }
}

/// What decides about memory, the model and its LoRA aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tokens of a micro-batch.
    pub(crate) tokens: usize,
    /// Blocks that keep their activations.
    pub(crate) kept_layers: usize,
    pub(crate) dtype: Dtype,
    pub(crate) has_dropout: bool,
    /// Whether the output projection must be dequantized before it is used.
    pub(crate) dequantizes_head: bool,
}

/// Places of a block's activations.
#[derive(Debug, Clone, Copy, Default)]
struct SlotPlaces {
    rstd_1: Place,
    rstd_2: Place,
    qkv: Place,
    o: Place,
    lse: Place,
    m: Place,
    gate_up: Place,
    u: [Place; 3],
}

/// Places of everything, for a number of tokens.
#[derive(Debug, Clone)]
struct Plan {
    inputs: Vec<Place>,
    slots: Vec<SlotPlaces>,
    recomputed: Option<SlotPlaces>,
    norm: Place,
    dn: Place,
    dresidual: Place,
    final_rstd: Place,
    weight: Place,
    h: Place,
    delta: Place,
    dropped: Place,
    partials: Place,
    head: HeadPlaces,
    bytes: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct HeadPlaces {
    weight: Place,
    rows: Place,
    logits: Place,
    dlogits: Place,
}

impl Plan {
    fn new(sizes: &Sizes, need: Need) -> Self {
        let Need { tokens, dtype, .. } = need;
        let shape = &sizes.shape;
        let kept_layers = need.kept_layers.min(shape.layers);
        let mut cursor = Cursor(0);
        let row = (1, tokens);
        let hidden = (tokens, shape.hidden);
        let stride = aligned(shape.hidden);
        let inputs = (0..=shape.layers).map(|_| cursor.take(hidden, stride, dtype)).collect();
        let slots = (0..kept_layers).map(|_| Self::slot(sizes, need, &mut cursor)).collect();
        let norm = cursor.take((tokens, sizes.norm_stride()), sizes.norm_stride(), dtype);
        let widest = aligned(shape.hidden.max(sizes.queries()));
        let dn = cursor.take((tokens, widest), widest, dtype);
        let dresidual = cursor.take((tokens, sizes.residual_stride()), sizes.residual_stride(), dtype);
        let final_rstd = cursor.take(row, tokens, Dtype::F32);

        let mut of_blocks = cursor;
        let largest = Group::ALL.iter().map(|&group| sizes.group(group).values()).max().unwrap_or(0);
        let weight = of_blocks.take((1, largest), largest, dtype);
        let width = |group| {
            let of: GroupSizes = sizes.group(group);
            (of.inputs + of.extension, of.outputs + of.extension)
        };
        let h_width = aligned(width(Group::Down).0.max(width(Group::Qkv).1));
        let h = of_blocks.take((tokens, h_width), h_width, dtype);
        let delta = of_blocks.take((shape.heads, tokens), tokens, Dtype::F32);
        let widest_input = Group::ALL.iter().map(|&group| sizes.group(group).inputs).max().unwrap_or(0);
        let dropped_width = if need.has_dropout { aligned(widest_input) } else { 0 };
        let dropped = of_blocks.take((tokens, dropped_width), dropped_width, dtype);
        let partial_values = lora::partial_values(sizes, tokens);
        let partials = of_blocks.take((1, partial_values), partial_values, Dtype::F32);
        let recomputed = (kept_layers < shape.layers).then(|| Self::slot(sizes, need, &mut of_blocks));

        let mut of_head = cursor;
        let head = HeadPlaces::new(sizes, need, &mut of_head);
        let bytes = of_blocks.0.max(of_head.0);
        Self {
            inputs,
            slots,
            recomputed,
            norm,
            dn,
            dresidual,
            final_rstd,
            weight,
            h,
            delta,
            dropped,
            partials,
            head,
            bytes,
        }
    }

    fn slot(sizes: &Sizes, Need { tokens, dtype, .. }: Need, cursor: &mut Cursor) -> SlotPlaces {
        let shape = &sizes.shape;
        let extension = |group| sizes.group(group).extension;
        let mut take = |columns: usize, dtype| cursor.take((tokens, columns), aligned(columns), dtype);
        let qkv = take(sizes.group(Group::Qkv).outputs, dtype);
        let o = take(sizes.queries() + extension(Group::O), dtype);
        let m = take(shape.hidden, dtype);
        let gate_up = take(2 * shape.intermediate + extension(Group::GateUp), dtype);
        let u = [Group::Qkv, Group::GateUp, Group::Down].map(|group| take(extension(group), dtype));
        let mut row = || cursor.take((1, tokens), tokens, Dtype::F32);
        let (rstd_1, rstd_2) = (row(), row());
        let lse = cursor.take((shape.heads, tokens), tokens, Dtype::F32);
        SlotPlaces { rstd_1, rstd_2, qkv, o, lse, m, gate_up, u }
    }
}

impl HeadPlaces {
    fn new(sizes: &Sizes, need: Need, cursor: &mut Cursor) -> Self {
        let (hidden, vocabulary) = (sizes.shape.hidden, sizes.shape.vocabulary);
        let rows = Head::rows_at_once(vocabulary).min(need.tokens);
        let logits_stride = aligned(vocabulary);
        let weight_rows = if need.dequantizes_head { vocabulary } else { 0 };
        Self {
            weight: cursor.take((weight_rows, hidden), aligned(hidden), need.dtype),
            rows: cursor.take((rows, hidden), aligned(hidden), need.dtype),
            logits: cursor.take((rows, vocabulary), logits_stride, Dtype::F32),
            dlogits: cursor.take((rows, vocabulary), logits_stride, need.dtype),
        }
    }
}

/// Memory of the passes, made once for the largest micro-batch.
#[derive(Debug)]
pub(crate) struct Buffers {
    sizes: Sizes,
    /// Of the largest micro-batch.
    need: Need,
    values: Buffer,
    /// i32, (T) each.
    token_ids: Buffer,
    positions: Buffer,
    index: Buffer,
    labels: Buffer,
    rope_table: Buffer,
    pub(crate) losses: Losses,
    pub(crate) attention: Attention,
}

impl Buffers {
    /// Memory for micro-batches of up to `need.tokens` tokens.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] where it is not free.
    pub(crate) fn new(gpu: &Rc<Gpu>, sizes: &Sizes, need: Need) -> Result<Self> {
        let [values, row, rope_table] = Self::pieces(sizes, need);
        let mut slab = Slab::new(gpu, [values, row, row, row, row, rope_table])?;
        let shape = &sizes.shape;
        let heads = Heads { heads: shape.heads, kv_heads: shape.kv_heads, head_dim: shape.head_dim, dtype: need.dtype };
        Ok(Self {
            values: slab.take(values),
            token_ids: slab.take(row),
            positions: slab.take(row),
            index: slab.take(row),
            labels: slab.take(row),
            rope_table: slab.take(rope_table),
            attention: Attention::new(gpu, heads, need.tokens)?,
            losses: Losses::new(gpu, Head::rows_at_once(sizes.shape.vocabulary))?,
            sizes: sizes.clone(),
            need,
        })
    }

    /// Bytes that [`Buffers::new`] takes.
    pub(crate) fn bytes(sizes: &Sizes, need: Need) -> usize {
        let [values, row, rope_table] = Self::pieces(sizes, need);
        [values, 4 * row, rope_table, Attention::bytes(need.tokens), 8 * Head::rows_at_once(sizes.shape.vocabulary)]
            .iter()
            .sum()
    }

    /// Bytes of the activations, of a number for each token, of the angles.
    fn pieces(sizes: &Sizes, need: Need) -> [usize; 3] {
        let Need { tokens, .. } = need;
        [Plan::new(sizes, need).bytes, 4 * tokens, 4 * tokens * sizes.shape.head_dim]
    }

    /// The parts for a micro-batch of so many tokens.
    pub(crate) fn parts(&self, tokens: usize) -> Parts<'_> {
        assert!(tokens <= self.need.tokens, "{tokens} tokens in buffers for {}", self.need.tokens);
        let plan = Plan::new(&self.sizes, Need { tokens, ..self.need });
        Parts { plan, buffers: self }
    }

    /// Copies a micro-batch to the GPU.
    ///
    /// # Errors
    /// A token that the model does not have, or more of them than there is room for.
    pub(crate) fn load(
        &mut self,
        gpu: &Gpu,
        config: &Config,
        frequencies: &Buffer,
        batch: &MicroBatch,
    ) -> Result<Batch> {
        let tokens = batch.tokens.len();
        if tokens > self.need.tokens {
            return Err(Error::Model(format!(
                "a micro-batch of {tokens} tokens, there is room for {}",
                self.need.tokens
            )));
        }
        let vocabulary = config.shape.vocabulary;
        if let Some(token) = batch.tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Model(format!("token {token} is not in the embedding table of {vocabulary} rows")));
        }
        let index: Vec<i32> = (0..tokens).filter(|&at| batch.labels[at] != NO_LABEL).map(|at| at as i32).collect();
        let labels: Vec<i32> = index.iter().map(|&at| batch.labels[at as usize]).collect();
        if let Some(label) = labels.iter().find(|&&label| label < 0 || label as usize >= vocabulary) {
            return Err(Error::Model(format!("label {label} is not in the vocabulary of {vocabulary}")));
        }
        self.token_ids.write(0, &batch.tokens)?;
        self.positions.write(0, &batch.positions)?;
        self.index.write(0, &index)?;
        self.labels.write(0, &labels)?;
        rope::table(gpu, self.rope_table(tokens), &self.positions, frequencies)?;
        self.attention.set_sequences(&batch.cu_seqlens)?;
        Ok(Batch { tokens, labelled: labels.len() })
    }

    /// f32, (T, D): cosine and sine of each pair's angle, side by side.
    pub(crate) fn rope_table(&self, tokens: usize) -> Mat<'_> {
        let head_dim = self.sizes.shape.head_dim;
        self.rope_table.mat(0, (tokens, head_dim), head_dim, Dtype::F32)
    }

    /// i32, (T).
    pub(crate) fn token_ids(&self) -> &Buffer {
        &self.token_ids
    }

    /// Places of the labelled tokens, from the one of that number on.
    pub(crate) fn index(&self, first: usize) -> Labels<'_> {
        Labels { buffer: &self.index, first }
    }

    /// Their labels.
    pub(crate) fn labels(&self, first: usize) -> Labels<'_> {
        Labels { buffer: &self.labels, first }
    }
}

/// The micro-batch that lies on the GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch {
    pub(crate) tokens: usize,
    /// Tokens that have a label.
    pub(crate) labelled: usize,
}

/// The buffers as one micro-batch uses them.
pub(crate) struct Parts<'a> {
    plan: Plan,
    buffers: &'a Buffers,
}

/// What backward needs of a block's forward.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Saved<'a> {
    /// f32, (1, T).
    pub(crate) rstd_1: Mat<'a>,
    /// f32, (1, T).
    pub(crate) rstd_2: Mat<'a>,
    /// (T, (H + 2 KV) D), after RoPE.
    pub(crate) qkv: Mat<'a>,
    /// (T, H D + E): the attention's output and its u.
    pub(crate) o: Mat<'a>,
    /// f32, (H, T).
    pub(crate) lse: Mat<'a>,
    /// (T, C).
    pub(crate) m: Mat<'a>,
    /// (T, 2 F + E): backward puts their gradient and its du in their place.
    pub(crate) gate_up: Mat<'a>,
    /// (T, E) each.
    pub(crate) u_qkv: Option<Mat<'a>>,
    pub(crate) u_gate_up: Option<Mat<'a>>,
    pub(crate) u_down: Option<Mat<'a>>,
}

impl<'a> Parts<'a> {
    fn at(&self, place: Place, dtype: Dtype) -> Mat<'a> {
        self.buffers.values.mat(place.offset, (place.rows, place.columns), place.stride, dtype)
    }

    fn dtype(&self) -> Dtype {
        self.buffers.need.dtype
    }

    /// The input of a layer; of the layer after the last: the output.
    pub(crate) fn x(&self, layer: usize) -> Mat<'a> {
        self.at(self.plan.inputs[layer], self.dtype())
    }

    fn slot(&self, places: &SlotPlaces) -> Saved<'a> {
        let (at, f32) = (|place| self.at(place, self.dtype()), |place| self.at(place, Dtype::F32));
        let [u_qkv, u_gate_up, u_down] = places.u.map(|place| (place.columns > 0).then(|| at(place)));
        Saved {
            rstd_1: f32(places.rstd_1),
            rstd_2: f32(places.rstd_2),
            qkv: at(places.qkv),
            o: at(places.o),
            lse: f32(places.lse),
            m: at(places.m),
            gate_up: at(places.gate_up),
            u_qkv,
            u_gate_up,
            u_down,
        }
    }

    /// What the kept layer of that number keeps.
    pub(crate) fn saved(&self, kept: usize) -> Saved<'a> {
        self.slot(&self.plan.slots[kept])
    }

    /// The slot of layers that run forward again.
    pub(crate) fn recomputed(&self) -> Saved<'a> {
        self.slot(self.plan.recomputed.as_ref().expect("a layer that keeps nothing has a slot to run again in"))
    }

    /// A slot for a pass without backward.
    pub(crate) fn any_slot(&self) -> Saved<'a> {
        self.slot(self.plan.recomputed.as_ref().or(self.plan.slots.first()).expect("a model has a layer"))
    }

    /// A norm's output, and its u.
    pub(crate) fn norm(&self) -> Mat<'a> {
        self.at(self.plan.norm, self.dtype())
    }

    /// The gradient of a norm's output, (T, C).
    pub(crate) fn dn(&self) -> Mat<'a> {
        self.at(self.plan.dn, self.dtype()).columns(0, self.buffers.sizes.shape.hidden)
    }

    /// The gradient of the attention's output, (T, H D); shares its place with [`Parts::dn`].
    pub(crate) fn dout(&self) -> Mat<'a> {
        self.at(self.plan.dn, self.dtype()).columns(0, self.buffers.sizes.queries())
    }

    /// The gradient of the residual stream, and its du.
    pub(crate) fn dresidual(&self) -> Mat<'a> {
        self.at(self.plan.dresidual, self.dtype())
    }

    /// f32, (1, T).
    pub(crate) fn final_rstd(&self) -> Mat<'a> {
        self.at(self.plan.final_rstd, Dtype::F32)
    }

    /// SwiGLU's output and its u, and its gradient.
    pub(crate) fn h(&self) -> Mat<'a> {
        let of = self.buffers.sizes.group(Group::Down);
        self.at(self.plan.h, self.dtype()).columns(0, of.inputs + of.extension)
    }

    /// The gradient of q, k and v, and its du; shares its place with [`Parts::h`].
    pub(crate) fn dqkv(&self) -> Mat<'a> {
        let of = self.buffers.sizes.group(Group::Qkv);
        self.at(self.plan.h, self.dtype()).columns(0, of.outputs + of.extension)
    }

    /// f32, (H, T).
    pub(crate) fn delta(&self) -> Mat<'a> {
        self.at(self.plan.delta, Dtype::F32)
    }

    /// A LoRA's input after dropout, (T, `columns`).
    pub(crate) fn dropped(&self, columns: usize) -> Mat<'a> {
        self.at(self.plan.dropped, self.dtype()).columns(0, columns)
    }

    /// f32, one row: sums over parts of the tokens.
    pub(crate) fn partials(&self) -> Mat<'a> {
        self.at(self.plan.partials, Dtype::F32)
    }

    /// W' of a group.
    pub(crate) fn weight(&self, of: GroupSizes, dtype: Dtype) -> Mat<'a> {
        self.buffers.values.mat(self.plan.weight.offset, (of.rows(), of.stride), of.stride, dtype)
    }

    /// What the output projection uses; shares its place with what blocks use.
    pub(crate) fn head(&self) -> Head<'a> {
        Head { places: self.plan.head, values: &self.buffers.values, dtype: self.dtype() }
    }
}

/// Buffers of the output projection and the loss.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    places: HeadPlaces,
    values: &'a Buffer,
    dtype: Dtype,
}

impl<'a> Head<'a> {
    /// Tokens whose logits exist at once.
    pub(crate) fn rows_at_once(vocabulary: usize) -> usize {
        let rows = LOGITS_BYTES / (Dtype::F32.bytes() * aligned(vocabulary).max(1));
        (rows / CHUNK_STEP * CHUNK_STEP).clamp(CHUNK_STEP, MOST_ROWS)
    }

    fn at(&self, place: Place, dtype: Dtype) -> Mat<'a> {
        self.values.mat(place.offset, (place.rows, place.columns), place.stride, dtype)
    }

    /// The dequantized output projection, (V, C).
    pub(crate) fn weight(&self) -> Mat<'a> {
        self.at(self.places.weight, self.dtype)
    }

    /// Hidden states of a chunk's tokens, and their gradient.
    pub(crate) fn rows(&self, count: usize) -> Mat<'a> {
        self.at(self.places.rows, self.dtype).rows(0, count)
    }

    /// f32, (count, V).
    pub(crate) fn logits(&self, count: usize) -> Mat<'a> {
        self.at(self.places.logits, Dtype::F32).rows(0, count)
    }

    /// (count, V).
    pub(crate) fn dlogits(&self, count: usize) -> Mat<'a> {
        self.at(self.places.dlogits, self.dtype).rows(0, count)
    }
}
