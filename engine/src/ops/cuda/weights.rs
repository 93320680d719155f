//! A frozen model on a GPU, in its stored blocks; one group at a time is dequantized into W' (see `sizes`).

use std::cell::RefCell;
use std::rc::Rc;

use super::sizes::{Group, Sizes};
use super::{Buffer, Dtype, Gpu, Mat, Slab, dequantize, lora};
use crate::Result;
use crate::adapter::LoraLayout;
use crate::model::weights::Weight;
use crate::model::{Config, Llama};
use crate::ops::host;
use crate::quant::BlockType;
use crate::spec::Target;

/// Blocks of a matrix on a GPU.
#[derive(Debug)]
pub(crate) enum Stored {
    /// As GGUF has them.
    Blocks { dtype: BlockType, blocks: Buffer },
    /// bitsandbytes' NF4: packed codes, and their factors.
    Nf4 { packed: Buffer, absmax: StoredAbsmax },
}

/// The factors of an NF4 matrix on a GPU, as `quant::Absmax` has them.
#[derive(Debug)]
pub(crate) enum StoredAbsmax {
    /// f32, one a block.
    Single(Buffer),
    /// Quantized themselves: codes, their map, nested factors, what is added.
    Double { codes: Buffer, map: Buffer, nested: Buffer, offset: f32 },
}

/// A frozen matrix on a GPU.
#[derive(Debug)]
pub(crate) struct DeviceWeight {
    pub(crate) stored: Stored,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl DeviceWeight {
    fn upload(slab: &mut Slab, weight: &Weight) -> Result<Self> {
        let blocks = slab.of(weight.stored())?;
        let stored = Stored::Blocks { dtype: weight.dtype(), blocks };
        Ok(Self { stored, rows: weight.rows(), columns: weight.columns() })
    }

    /// The matrix itself, where it is stored in that type.
    pub(crate) fn as_mat(&self, dtype: Dtype) -> Option<Mat<'_>> {
        match (&self.stored, dtype) {
            (Stored::Blocks { dtype: BlockType::F32, blocks }, Dtype::F32)
            | (Stored::Blocks { dtype: BlockType::BF16, blocks }, Dtype::Bf16) => {
                Some(blocks.mat(0, (self.rows, self.columns), self.columns, dtype))
            }
            _ => None,
        }
    }
}

/// A block's frozen weights on a GPU.
#[derive(Debug)]
pub(crate) struct DeviceBlock {
    /// f32, (C).
    pub(crate) input_layernorm: Buffer,
    /// f32, (C).
    pub(crate) post_attention_layernorm: Buffer,
    pub(crate) projections: [DeviceWeight; 7],
    /// W' of each group that is kept dequantized.
    pub(crate) resident: RefCell<[Option<Buffer>; 4]>,
}

/// A frozen model on a GPU.
#[derive(Debug)]
pub(crate) struct DeviceModel {
    pub(crate) config: Config,
    pub(crate) embed_tokens: DeviceWeight,
    pub(crate) blocks: Vec<DeviceBlock>,
    /// f32, (C).
    pub(crate) norm: Buffer,
    /// The output projection; `None` where it is the embedding table.
    pub(crate) lm_head: Option<DeviceWeight>,
    /// f64, (D/2).
    pub(crate) rope_frequencies: Buffer,
}

impl DeviceModel {
    /// Copies a model's stored blocks to a GPU.
    ///
    /// # Errors
    /// [`crate::Error::DeviceMemory`] where they do not fit.
    pub(crate) fn upload(gpu: &Rc<Gpu>, model: &Llama) -> Result<Self> {
        let parts = model.parts();
        let mut slab = Slab::new(gpu, pieces(model))?;
        let mut blocks = Vec::with_capacity(parts.blocks.len());
        for block in &parts.blocks {
            let mut upload = |weight| DeviceWeight::upload(&mut slab, weight);
            let [q, k, v, o, gate, up, down] = block.projections.each_ref();
            let projections =
                [upload(q)?, upload(k)?, upload(v)?, upload(o)?, upload(gate)?, upload(up)?, upload(down)?];
            blocks.push(DeviceBlock {
                input_layernorm: slab.of(&host(block.input_layernorm)?)?,
                post_attention_layernorm: slab.of(&host(block.post_attention_layernorm)?)?,
                projections,
                resident: RefCell::default(),
            });
        }
        Ok(Self {
            blocks,
            embed_tokens: DeviceWeight::upload(&mut slab, parts.embed_tokens)?,
            norm: slab.of(&host(parts.norm)?)?,
            lm_head: parts.lm_head.map(|weight| DeviceWeight::upload(&mut slab, weight)).transpose()?,
            rope_frequencies: slab.of(&model.config().rope_frequencies)?,
            config: model.config().clone(),
        })
    }

    pub(crate) fn lm_head(&self) -> &DeviceWeight {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Writes W' of a group of a layer: its weights, dequantized, and its LoRAs.
    ///
    /// # Errors
    /// What the kernels say.
    pub(crate) fn fill(
        &self,
        gpu: &Gpu,
        (layer, group): (usize, Group),
        sizes: &Sizes,
        (layout, parameters): (&LoraLayout, &Buffer),
        out: Mat<'_>,
    ) -> Result<()> {
        let mut first = 0;
        let place = |&target: &Target| {
            let weight = &self.blocks[layer].projections[target.index()];
            let place = out.rows(first, weight.rows).columns(0, weight.columns);
            first += weight.rows;
            (weight, place)
        };
        let weights: Vec<_> = group.targets().iter().map(place).collect();
        dequantize::dequantize_all(gpu, &weights)?;
        fill_lora(gpu, (layer, group), sizes, (layout, parameters), out)
    }
}

/// Writes the LoRAs' part of W'.
///
/// # Errors
/// What the kernels say.
pub(crate) fn fill_lora(
    gpu: &Gpu,
    (layer, group): (usize, Group),
    sizes: &Sizes,
    (layout, parameters): (&LoraLayout, &Buffer),
    out: Mat<'_>,
) -> Result<()> {
    if sizes.group(group).extension == 0 {
        return Ok(());
    }
    let rank = layout.spec().r as usize;
    let pairs: Vec<lora::Pair> = group
        .targets()
        .iter()
        .map(|&target| {
            let (rows, columns) = sizes.shape.projection(target);
            let offsets = layout.offsets(layer, target);
            let at = |offset: usize, values: usize| {
                assert!(4 * (offset + values) <= parameters.bytes(), "a LoRA matrix lies among the parameters");
                parameters.at(4 * offset)
            };
            let (a, b) = offsets.map_or((0, 0), |(a, b)| (at(a, rank * columns), at(b, rows * rank)));
            lora::Pair { a, b, rows }
        })
        .collect();
    lora::fill(gpu, out, &pairs, sizes.group(group).inputs, (rank, sizes.padded_rank), layout.spec().scale() as f32)
}

/// Bytes of each buffer of a model.
fn pieces(model: &Llama) -> Vec<usize> {
    let (parts, config) = (model.parts(), model.config());
    let weights =
        parts.blocks.iter().flat_map(|block| block.projections).chain([parts.embed_tokens]).chain(parts.lm_head);
    let norms = std::iter::repeat_n(4 * config.shape.hidden, 2 * parts.blocks.len() + 1);
    weights.map(Weight::stored_bytes).chain(norms).chain([8 * config.rope_frequencies.len()]).collect()
}

/// Bytes that a model takes on a GPU.
pub(crate) fn model_bytes(model: &Llama) -> usize {
    pieces(model).into_iter().map(Slab::rounded).sum()
}

/// Target in the order of a group, and where its rows begin.
pub(crate) fn outputs_of(group: Group, sizes: &Sizes) -> impl Iterator<Item = (usize, Target, usize, usize)> + '_ {
    let mut first = 0;
    group.targets().iter().enumerate().map(move |(place, &target)| {
        let rows = sizes.shape.projection(target).0;
        let begin = first;
        first += rows;
        (place, target, begin, rows)
    })
}
