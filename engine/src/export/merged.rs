//! The merged model as a folder that transformers loads: 16-bit safetensors, config, tokenizer.
//!
//! Rows of q_proj and k_proj stand in Hugging Face's order there (halves of a head), in a `llama` GGUF file in pairs. A tied
//! output projection is not written. Never more than one tensor is in memory.

use std::ops::ControlFlow;
use std::path::Path;

use super::gguf::projection;
use super::hf_config::Configs;
use super::merge::MergedTensor;
use super::parity::{BF16_BOUND, F16_BOUND};
use super::safetensors::{Float, MAX_SHARD_BYTES, ShardWriter, Shards, TensorPlan, write_json};
use super::tokenizer_json::TokenizerFiles;
use super::{Delta, Progress};
use crate::adapter::LoraParams;
use crate::data::ChatTemplate;
use crate::gguf::{GgufFile, TensorInfo, TensorSpec, Writer};
use crate::model::weights::Weight;
use crate::model::{Config, Shape};
use crate::ops::host;
use crate::quant::BlockType;
use crate::spec::Target;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// RoPE factors are told in config.json.
const ROPE_FACTORS: &str = "rope_freqs.weight";

impl Float {
    fn dtype(self) -> BlockType {
        match self {
            Self::F16 => BlockType::F16,
            Self::Bf16 => BlockType::BF16,
        }
    }
}

/// Writes the folder's files; `false` where `on_progress` broke it off. Every file is read back from the disk and compared with
/// what was written.
///
/// # Errors
/// [`Error::Model`] or [`Error::Tokenizer`] where the base cannot be told in Hugging Face's words; [`Error::Adapter`] where the
/// LoRA makes a value that 16 bits cannot hold; [`Error::ReadBack`]; [`Error::Io`].
pub(super) fn write_merged(
    base: &GgufFile,
    lora: &LoraParams,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    folder: &Path,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<bool> {
    let context_length = Config::from_gguf(base)?.context_length;
    let files = TokenizerFiles::new(base, tokenizer, template, context_length)?;
    for (name, value) in [
        ("tokenizer.json", &files.tokenizer),
        ("tokenizer_config.json", &files.config),
        ("special_tokens_map.json", &files.special_tokens),
    ] {
        write_json(&folder.join(name), value)?;
    }
    write_shards(base, lora, tokenizer, folder, MAX_SHARD_BYTES, on_progress)
}

/// Writes weights and configuration.
fn write_shards(
    base: &GgufFile,
    lora: &LoraParams,
    tokenizer: &Tokenizer,
    folder: &Path,
    max_shard_bytes: u64,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<bool> {
    let config = Config::from_gguf(base)?;
    let float = float_of(base);
    let configs = Configs::new(base, &config, tokenizer, float)?;
    write_json(&folder.join("config.json"), &configs.config)?;
    write_json(&folder.join("generation_config.json"), &configs.generation_config)?;
    let tensors: Vec<&TensorInfo> = base.tensors().iter().filter(|tensor| tensor.name != ROPE_FACTORS).collect();
    let plan = |tensor: &&TensorInfo| Ok(TensorPlan { name: hf_name(&tensor.name)?, shape: tensor.shape.clone() });
    let plans = tensors.iter().map(plan).collect::<Result<Vec<_>>>()?;
    let mut writer = ShardWriter::create(folder, &plans, float, max_shard_bytes)?;
    for (done, tensor) in tensors.iter().enumerate() {
        let merged = merged_tensor(base, lora, tensor)?;
        let heads = heads(&config.shape, &tensor.name);
        let mut whole = Vec::new();
        for rows in merged.bands() {
            if on_progress(Progress { done, total: tensors.len() }).is_break() {
                return Ok(false);
            }
            let stored = merged.stored(rows, &[float.dtype()])?.concat();
            match heads {
                None => writer.write(&stored)?,
                Some(_) => whole.extend(stored),
            }
        }
        if let Some(heads) = heads {
            writer.write(&reorder(&whole, heads, tensor.rows() / heads, Order::HalfSplit))?;
        }
    }
    writer.verify()?;
    Ok(true)
}

/// Writes what lies in a merged folder as a GGUF file, rows in GGUF's order again, so that the model can be run from it.
pub(super) fn read_merged(base: &GgufFile, folder: &Path, target: &Path) -> Result<()> {
    let (shape, dtype) = (Config::from_gguf(base)?.shape, float_of(base).dtype());
    let shards = Shards::open(folder)?;
    let spec = |tensor: &TensorInfo| match tensor.name.as_str() {
        ROPE_FACTORS => {
            Ok(TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype: tensor.dtype()? })
        }
        _ => Ok(TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype }),
    };
    let specs = base.tensors().iter().map(spec).collect::<Result<Vec<_>>>()?;
    let expected = specs.iter().filter(|spec| spec.name != ROPE_FACTORS).count();
    if shards.len() != expected {
        return Err(Error::ReadBack(format!("the folder has {} tensors, must have {expected}", shards.len())));
    }
    let skipped = |key: &str| key == "general.alignment" || key.starts_with("split.");
    let metadata: Vec<_> = base.metadata().iter().filter(|(key, _)| !skipped(key)).cloned().collect();
    let mut writer = Writer::create(target, &metadata, &specs)?;
    for tensor in base.tensors() {
        if tensor.name == ROPE_FACTORS {
            writer.write(&tensor.name, base.data(tensor)?)?;
            continue;
        }
        let data = shards.data(&hf_name(&tensor.name)?, &tensor.shape)?;
        match heads(&shape, &tensor.name) {
            None => writer.write(&tensor.name, data)?,
            Some(heads) => {
                writer.write(&tensor.name, &reorder(data, heads, tensor.rows() / heads, Order::Interleaved))?;
            }
        }
    }
    writer.finish()
}

/// Whether the base can be told in Hugging Face's words.
pub(super) fn check_merged(base: &GgufFile, tokenizer: &Tokenizer) -> Result<()> {
    let config = Config::from_gguf(base)?;
    Configs::new(base, &config, tokenizer, float_of(base))?;
    TokenizerFiles::new(base, tokenizer, None, config.context_length)?;
    let mut tensors = base.tensors().iter().filter(|tensor| tensor.name != ROPE_FACTORS);
    tensors.try_for_each(|tensor| hf_name(&tensor.name).map(drop))
}

/// How far the merged model may be from the trained one.
pub(super) fn bound_of_merged(base: &GgufFile) -> f64 {
    match float_of(base) {
        Float::F16 => F16_BOUND,
        Float::Bf16 => BF16_BOUND,
    }
}

/// f16 where the base's matrices are, else bf16.
fn float_of(base: &GgufFile) -> Float {
    let query = base.tensor("blk.0.attn_q.weight").and_then(|tensor| tensor.dtype().ok());
    if query == Some(BlockType::F16) { Float::F16 } else { Float::Bf16 }
}

fn merged_tensor<'a>(base: &GgufFile, lora: &'a LoraParams, tensor: &TensorInfo) -> Result<MergedTensor<'a>> {
    let pair = projection(&tensor.name).and_then(|(layer, target)| lora.pair(layer, target));
    let copy = |matrix| Ok::<_, Error>(host(matrix)?.to_vec().into());
    let delta = pair.map(|pair| Ok::<_, Error>(Delta { lora_a: copy(&pair.lora_a)?, lora_b: copy(&pair.lora_b)? }));
    let rank = lora.layout().spec().r as usize;
    MergedTensor::new(&tensor.name, Weight::from_tensor(base, tensor)?, delta.transpose()?, (rank, lora.scale()))
}

fn hf_name(name: &str) -> Result<String> {
    let outside = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = outside {
        return Ok(name.to_owned());
    }
    if let Some((layer, target)) = projection(name) {
        let part = match target {
            Target::QProj | Target::KProj | Target::VProj | Target::OProj => "self_attn",
            Target::GateProj | Target::UpProj | Target::DownProj => "mlp",
        };
        return Ok(format!("model.layers.{layer}.{part}.{}.weight", target.name()));
    }
    let norm = name.strip_prefix("blk.").and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'));
    match norm {
        Some((layer, "attn_norm")) => Ok(format!("model.layers.{layer}.input_layernorm.weight")),
        Some((layer, "ffn_norm")) => Ok(format!("model.layers.{layer}.post_attention_layernorm.weight")),
        _ => Err(Error::Model(format!("tensor `{name}` has no name in Hugging Face's Llama"))),
    }
}

/// The heads of a tensor whose rows stand in another order there.
fn heads(shape: &Shape, name: &str) -> Option<usize> {
    match projection(name)?.1 {
        Target::QProj => Some(shape.heads),
        Target::KProj => Some(shape.kv_heads),
        Target::VProj | Target::OProj | Target::GateProj | Target::UpProj | Target::DownProj => None,
    }
}

#[derive(Clone, Copy)]
enum Order {
    HalfSplit,
    Interleaved,
}

/// Rows of equal length in the order asked for: row i of the first half of a head is the first of pair i, row i of the second
/// half its second.
fn reorder(rows: &[u8], heads: usize, head_dim: usize, order: Order) -> Vec<u8> {
    let row_bytes = rows.len() / (heads * head_dim);
    let pairs = head_dim / 2;
    let mut out = Vec::with_capacity(rows.len());
    for head in 0..heads {
        for row in 0..head_dim {
            let from = match order {
                Order::HalfSplit => 2 * (row % pairs) + row / pairs,
                Order::Interleaved => row / 2 + row % 2 * pairs,
            };
            let start = (head * head_dim + from) * row_bytes;
            out.extend_from_slice(&rows[start..start + row_bytes]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Llama;
    use crate::testing::{TinyModel, random_lora};

    fn logits(model: &Llama, lora: Option<&LoraParams>) -> Vec<f32> {
        let logits = model.logits(&[1, 80, 13, 200, 7], lora).unwrap();
        logits.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_folder_computes_what_base_and_lora_do() {
        for (tied, dtype, float, max_bytes) in
            [(true, BlockType::Q8_0, "bfloat16", MAX_SHARD_BYTES), (false, BlockType::F16, "float16", 40_000)]
        {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("tiny.gguf");
            TinyModel { tied, dtypes: vec![dtype], ..TinyModel::default() }.write(&path).unwrap();
            let base = GgufFile::open(&path).unwrap();
            let (model, tokenizer) = (Llama::load(&base).unwrap(), Tokenizer::from_gguf(&base).unwrap());
            let lora = random_lora(&model.config().shape, 4).unwrap();
            let out = tempfile::tempdir().unwrap();
            let mut on_progress = |_| ControlFlow::Continue(());
            assert!(write_shards(&base, &lora, &tokenizer, out.path(), max_bytes, &mut on_progress).unwrap());

            let config = std::fs::read_to_string(out.path().join("config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            assert_eq!((&config["torch_dtype"], &config["tie_word_embeddings"]), (&float.into(), &tied.into()));
            assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&1e-5.into(), &10_000.0.into()));
            let shards = Shards::open(out.path()).unwrap();
            assert!(shards.data("lm_head.weight", &[model.config().shape.vocabulary, 64]).is_ok() != tied);
            assert_eq!(max_bytes < MAX_SHARD_BYTES, out.path().join("model.safetensors.index.json").exists());

            let again = folder.path().join("again.gguf");
            read_merged(&base, out.path(), &again).unwrap();
            let merged = Llama::load(&GgufFile::open(&again).unwrap()).unwrap();
            let (expected, found, plain) = (logits(&model, Some(&lora)), logits(&merged, None), logits(&model, None));
            let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let (off, moved) = (apart(&expected, &found), apart(&expected, &plain));
            assert!(off < 0.03 * moved, "{off} off where the LoRA moves {moved}");
        }
    }

    #[test]
    fn rope_factors_of_no_known_formula_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        TinyModel { rope_freqs: true, ..TinyModel::default() }.write(&path).unwrap();
        let base = GgufFile::open(&path).unwrap();
        let (model, tokenizer) = (Llama::load(&base).unwrap(), Tokenizer::from_gguf(&base).unwrap());
        let lora = random_lora(&model.config().shape, 4).unwrap();
        let error = write_merged(&base, &lora, &tokenizer, None, folder.path(), &mut |_| ControlFlow::Continue(()));
        let says = "`rope_freqs.weight` does not follow Llama 3's formula";
        assert!(error.unwrap_err().to_string().contains(says));
        assert!(check_merged(&base, &tokenizer).unwrap_err().to_string().contains(says), "told before a training");
    }

    #[test]
    fn reordering_back_gives_the_same_rows() {
        let rows: Vec<u8> = (0..48).collect();
        let there = reorder(&rows, 3, 8, Order::HalfSplit);
        assert_eq!(there[..16], [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]);
        assert_eq!(reorder(&there, 3, 8, Order::Interleaved), rows);
    }
}
