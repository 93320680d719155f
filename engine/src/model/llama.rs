//! The whole model: embedding, blocks, final norm, output projection; forward and backward, and token-by-token decoding.

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::Tensor;
use sha2::{Digest, Sha256};

use crate::adapter::LoraParams;
use crate::data::MicroBatch;
use crate::files::shorten;
use crate::gguf::GgufFile;
use crate::model::block::{self, Block, BlockCache, BlockParts, Pass, Saved};
use crate::model::config::Config;
use crate::model::linear::Scratch;
use crate::model::weights::{self, MappedFile, Weight};
use crate::ops::cross_entropy::{self, Loss};
use crate::ops::dropout::Dropout;
use crate::ops::matmul::Compute;
use crate::ops::rope::RopeTable;
use crate::ops::{embedding, in_pool, rms_norm, tensor};
use crate::spec::Target;
use crate::{Error, Result};

/// A frozen Llama-family model in its stored blocks.
#[derive(Debug)]
pub struct Llama {
    config: Config,
    embed_tokens: Weight,
    blocks: Vec<Block>,
    norm: Tensor,
    /// The output projection; `None` where it is the embedding table.
    lm_head: Option<Weight>,
    scratch: Mutex<RefCell<Scratch>>,
    file: Arc<MappedFile>,
}

/// Keys and values of the tokens so far.
#[derive(Debug)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
    capacity: usize,
    position: usize,
}

impl KvCache {
    /// Tokens in the cache.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Tokens that it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// A model's frozen weights.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The embedding table, (V, C).
    pub embed_tokens: &'a Weight,
    /// The blocks, first to last.
    pub blocks: Vec<BlockParts<'a>>,
    /// Weight of the final norm, (C).
    pub norm: &'a Tensor,
    /// The output projection, (V, C); `None` where it is the embedding table.
    pub lm_head: Option<&'a Weight>,
}

/// How a micro-batch is trained on.
#[derive(Debug, Clone, Copy)]
pub struct MicroStep {
    /// What the gradient is multiplied with: 1 ÷ trained tokens of the whole step.
    pub scale: f32,
    /// Blocks that keep their activations for backward, counted from the last one; the others keep their input alone and run
    /// forward again. Does not change a bit of the result.
    pub kept_layers: usize,
    /// What of every LoRA's input is dropped.
    pub dropout: Option<Dropout>,
    /// In which type the large products take their operands.
    pub compute: Compute,
}

/// A block's activations between forward and backward.
enum Kept {
    /// All that backward needs.
    Everything(Saved),
    /// The block's input: forward runs again.
    Input(Tensor),
}

impl Llama {
    /// Takes the weights of a GGUF file as they are stored.
    ///
    /// # Errors
    /// Another architecture, or a tensor or key that is missing or does not fit; the message names it.
    pub fn load(file: &GgufFile) -> Result<Self> {
        let config = Config::from_gguf(file)?;
        let shape = &config.shape;
        refuse_unknown_tensors(file, shape.layers)?;
        let table = (shape.vocabulary, shape.hidden);
        let blocks = (0..shape.layers).map(|layer| Block::from_gguf(file, layer, shape)).collect::<Result<_>>()?;
        let lm_head =
            file.tensor("output.weight").map(|_| Weight::from_gguf(file, "output.weight", table)).transpose()?;
        let largest = Target::ALL.map(|target| shape.projection(target)).map(|(rows, columns)| rows * columns);
        Ok(Self {
            embed_tokens: Weight::from_gguf(file, "token_embd.weight", table)?,
            blocks,
            norm: tensor(weights::vector(file, "output_norm.weight", shape.hidden)?, shape.hidden)?,
            lm_head,
            scratch: Mutex::new(RefCell::new(Scratch::new(largest.into_iter().max().unwrap_or(0)))),
            file: Arc::clone(file.mapped()),
            config,
        })
    }

    /// Shape and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of the file that the weights came from, all of which are in memory once it is used.
    pub fn file_bytes(&self) -> u64 {
        self.file.bytes().len() as u64
    }

    /// SHA-256 of the file that the weights came from; reads all of it.
    pub fn file_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.file.bytes()).into()
    }

    /// Its frozen weights.
    pub fn parts(&self) -> Parts<'_> {
        Parts {
            embed_tokens: &self.embed_tokens,
            blocks: self.blocks.iter().map(Block::parts).collect(),
            norm: &self.norm,
            lm_head: self.lm_head.as_ref(),
        }
    }

    fn lm_head(&self) -> &Weight {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    fn scratch(&self) -> MutexGuard<'_, RefCell<Scratch>> {
        // The buffer is overwritten at each use: what a panicking thread left in it does not matter.
        self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn rope(&self, positions: &[u32]) -> RopeTable {
        RopeTable::new(positions, &self.config.rope_frequencies, self.config.shape.rope_layout)
    }

    /// The loss of a micro-batch; adds its gradient, times the step's scale, to `gradient`.
    ///
    /// # Errors
    /// Tokens or shapes that do not fit the model.
    pub fn forward_backward(
        &self,
        batch: &MicroBatch,
        lora: &LoraParams,
        gradient: &LoraParams,
        step: MicroStep,
    ) -> Result<Loss> {
        // Taken before the pool is entered: a thread of the pool that waits for it would keep its holder waiting for the pool.
        let scratch: &mut RefCell<Scratch> = &mut self.scratch();
        in_pool(|| self.forward_backward_here(batch, lora, gradient, step, scratch))
    }

    fn forward_backward_here(
        &self,
        batch: &MicroBatch,
        lora: &LoraParams,
        gradient: &LoraParams,
        step: MicroStep,
        scratch: &mut RefCell<Scratch>,
    ) -> Result<Loss> {
        let rope = self.rope(&batch.positions);
        let pass = Pass {
            config: &self.config,
            rope: &rope,
            lora: Some(lora),
            dropout: step.dropout,
            scratch,
            compute: step.compute,
        };
        let mut x = embedding::forward(&self.embed_tokens, &batch.tokens)?;
        let first_kept = self.blocks.len().saturating_sub(step.kept_layers);
        let mut kept = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(x.clone(), &batch.cu_seqlens, &pass)?;
            kept.push(if layer < first_kept { Kept::Input(x) } else { Kept::Everything(saved) });
            x = y;
        }
        let (n, rstd) = rms_norm::forward(&x, &self.norm, self.config.rms_norm_eps)?;
        let (loss, dn) = cross_entropy::forward_backward(&n, self.lm_head(), &batch.labels, step.scale, step.compute)?;

        let dresidual = tensor(vec![0f32; x.elem_count()], x.dims2()?)?;
        rms_norm::backward_add(&dresidual, &dn, &x, &self.norm, &rstd)?;
        drop((n, dn, x));
        for (layer, block) in self.blocks.iter().enumerate().rev() {
            let saved = match kept.pop().expect("one entry for each block") {
                Kept::Everything(saved) => saved,
                Kept::Input(x) => block.forward(x, &batch.cu_seqlens, &pass)?.1,
            };
            block.backward(&dresidual, &saved, &batch.cu_seqlens, &pass, gradient, layer == 0)?;
        }
        Ok(loss)
    }

    /// The loss of a micro-batch, and nothing for a backward pass: no activation is kept, nothing is dropped.
    ///
    /// # Errors
    /// Tokens or shapes that do not fit the model.
    pub fn evaluate(&self, batch: &MicroBatch, lora: &LoraParams, compute: Compute) -> Result<Loss> {
        let scratch: &mut RefCell<Scratch> = &mut self.scratch();
        in_pool(|| self.evaluate_here(batch, lora, compute, scratch))
    }

    fn evaluate_here(
        &self,
        batch: &MicroBatch,
        lora: &LoraParams,
        compute: Compute,
        scratch: &mut RefCell<Scratch>,
    ) -> Result<Loss> {
        let rope = self.rope(&batch.positions);
        let pass = Pass { config: &self.config, rope: &rope, lora: Some(lora), dropout: None, scratch, compute };
        let mut x = embedding::forward(&self.embed_tokens, &batch.tokens)?;
        for block in &self.blocks {
            x = block.forward(x, &batch.cu_seqlens, &pass)?.0;
        }
        let (n, _) = rms_norm::forward(&x, &self.norm, self.config.rms_norm_eps)?;
        cross_entropy::forward(&n, self.lm_head(), &batch.labels, compute)
    }

    /// Logits (T, V) of every token of one sequence, computed in f32.
    ///
    /// # Errors
    /// A token that the model does not have.
    pub fn logits(&self, tokens: &[u32], lora: Option<&LoraParams>) -> Result<Tensor> {
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let rope = self.rope(&positions);
        let scratch = self.scratch();
        let pass =
            Pass { config: &self.config, rope: &rope, lora, dropout: None, scratch: &scratch, compute: Compute::F32 };
        let mut x = embedding::forward(&self.embed_tokens, tokens)?;
        for block in &self.blocks {
            x = block.forward(x, &[0, tokens.len()], &pass)?.0;
        }
        let (n, _) = rms_norm::forward(&x, &self.norm, self.config.rms_norm_eps)?;
        cross_entropy::logits(&n, self.lm_head(), Compute::F32)
    }

    /// An empty cache for up to that many tokens.
    ///
    /// # Errors
    /// More tokens than the model's context.
    pub fn cache(&self, capacity: usize) -> Result<KvCache> {
        let shape = &self.config.shape;
        if capacity > self.config.context_length {
            let message = format!("{capacity} tokens exceed the model's context length {}", self.config.context_length);
            return Err(Error::Model(message));
        }
        let empty = || {
            tensor(vec![0f32; capacity * shape.kv_heads * shape.head_dim], (capacity, shape.kv_heads, shape.head_dim))
        };
        let blocks = (0..shape.layers).map(|_| Ok(BlockCache { k: empty()?, v: empty()? })).collect::<Result<_>>()?;
        Ok(KvCache { blocks, capacity, position: 0 })
    }

    /// Appends tokens to the cache and returns the logits (V) that follow the last of them.
    ///
    /// # Errors
    /// No token, one that the model does not have, or more than the cache has room for.
    pub fn decode(&self, tokens: &[u32], cache: &mut KvCache, lora: Option<&LoraParams>) -> Result<Tensor> {
        let end = cache.position + tokens.len();
        if tokens.is_empty() || end > cache.capacity {
            let message = format!(
                "{} tokens do not fit a cache with {} of {} taken",
                tokens.len(),
                cache.position,
                cache.capacity
            );
            return Err(Error::Model(message));
        }
        let positions: Vec<u32> = (cache.position as u32..end as u32).collect();
        let rope = self.rope(&positions);
        let scratch = self.scratch();
        let pass =
            Pass { config: &self.config, rope: &rope, lora, dropout: None, scratch: &scratch, compute: Compute::F32 };
        let mut x = embedding::forward(&self.embed_tokens, tokens)?;
        for (block, block_cache) in self.blocks.iter().zip(&cache.blocks) {
            x = block.decode(x, block_cache, cache.position, &pass)?;
        }
        let last = x.narrow(0, tokens.len() - 1, 1)?;
        let (n, _) = rms_norm::forward(&last, &self.norm, self.config.rms_norm_eps)?;
        let logits = cross_entropy::logits(&n, self.lm_head(), Compute::F32)?.squeeze(0)?;
        cache.position = end;
        Ok(logits)
    }
}

/// A tensor that forward does not know (the bias of a projection, for one) would be left out of every result.
fn refuse_unknown_tensors(file: &GgufFile, layers: usize) -> Result<()> {
    const OUTSIDE: [&str; 4] = ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"];
    let names = (0..layers).flat_map(block::tensor_names);
    let known: HashSet<String> = names.chain(OUTSIDE.map(str::to_owned)).collect();
    match file.tensors().iter().find(|tensor| !known.contains(&tensor.name)) {
        None => Ok(()),
        Some(tensor) => {
            let message = format!("its tensor `{}` is of a kind that is not supported", shorten(&tensor.name));
            Err(Error::Model(message))
        }
    }
}
