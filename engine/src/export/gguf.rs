//! The merged GGUF file: the base's tensors in their order, LoRA added, in the types asked for; read back before it is
//! published.
//!
//! As llama.cpp's own conversion has it: every tensor with two or more dimensions gets the target type (F16 where its rows are
//! no multiple of the type's block), vectors stay F32. Metadata is the base's, but for what says how the file is stored.

use std::ops::ControlFlow;
use std::path::Path;

use super::merge::MergedTensor;
use super::{Deltas, ExportReport, Merge, Progress, Quantization};
use crate::gguf::{DEFAULT_ALIGNMENT, GgufFile, TensorInfo, TensorSpec, Value, Writer, same_bytes};
use crate::model::weights::Weight;
use crate::quant::BlockType;
use crate::spec::Target;
use crate::{Error, Result};

/// ggml's version of the block formats, unchanged since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// Writes base and LoRA as one GGUF file. Never more of it is in memory than a band of one tensor.
///
/// The file grows under a temporary name. Before it gets its own, it is opened as any other model, and every tensor is
/// computed again from base and LoRA and compared to the last bit. `on_progress` is called at least once a tensor; `Break`
/// stops the export, which leaves nothing behind and gives `None`.
///
/// # Errors
/// [`Error::Model`] where the base has a type that cannot be dequantized; [`Error::Adapter`] where the LoRA does not fit it,
/// touches none of its tensors, or makes a value that the target type cannot hold; [`Error::ReadBack`] where the file that was
/// written is not what should have been; [`Error::Io`].
pub fn merged_gguf(
    merge: &Merge<'_>,
    delta: Deltas<'_, '_>,
    target: &Path,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<ExportReport>> {
    let metadata = metadata(merge);
    let specs: Vec<TensorSpec> =
        merge.base.tensors().iter().map(|tensor| spec_of(tensor, merge.quantization)).collect();
    let mut progress = Progress { done: 0, total: 2 * specs.len() };

    let mut merged_tensors = 0;
    let mut writer = Writer::create(target, &metadata, &specs)?;
    for (tensor, spec) in merge.base.tensors().iter().zip(&specs) {
        let merged = merged_tensor(merge, delta, tensor, spec.dtype)?;
        merged_tensors += usize::from(merged.has_delta());
        for rows in merged.bands() {
            if on_progress(progress).is_break() {
                return Ok(None);
            }
            writer.write(&tensor.name, &merged.stored(rows)?)?;
        }
        progress.done += 1;
    }
    if merged_tensors == 0 {
        return Err(Error::Adapter("it has a LoRA for none of the base's tensors".to_owned()));
    }

    let sealed = writer.seal()?;
    let written = GgufFile::open(sealed.path()).map_err(|error| Error::ReadBack(error.to_string()))?;
    check_header(&written, &metadata, &specs)?;
    for (tensor, spec) in merge.base.tensors().iter().zip(&specs) {
        if check_tensor(&written, &merged_tensor(merge, delta, tensor, spec.dtype)?, spec, &mut || {
            on_progress(progress)
        })?
        .is_break()
        {
            return Ok(None);
        }
        progress.done += 1;
    }
    let size_bytes = written.mapped().bytes().len() as u64;
    sealed.publish()?;
    // The file is there now: a wish to stop comes too late.
    let _ = on_progress(progress);
    let fell_back = |spec: &&TensorSpec| spec.shape.len() > 1 && spec.dtype != merge.quantization.dtype();
    Ok(Some(ExportReport {
        quantization: merge.quantization,
        tensors: specs.len(),
        merged_tensors,
        fallback_tensors: specs.iter().filter(fell_back).map(|spec| spec.name.clone()).collect(),
        size_bytes,
    }))
}

fn spec_of(tensor: &TensorInfo, quantization: Quantization) -> TensorSpec {
    let dtype = quantization.dtype();
    let dtype = match tensor.shape.len() {
        1 => BlockType::F32,
        _ if tensor.columns().is_multiple_of(dtype.block_values()) => dtype,
        _ => BlockType::F16,
    };
    TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), dtype }
}

fn merged_tensor<'a>(
    merge: &Merge<'_>,
    delta: Deltas<'_, 'a>,
    tensor: &TensorInfo,
    dtype: BlockType,
) -> Result<MergedTensor<'a>> {
    let delta = match projection(&tensor.name) {
        Some((layer, target)) if merge.lora.target_modules.contains(&target) => delta(layer, target),
        _ => None,
    };
    let weight = Weight::from_tensor(merge.base, tensor)?;
    MergedTensor::new(&tensor.name, weight, delta, (merge.lora.r as usize, merge.lora.scale() as f32), dtype)
}

/// The layer and projection whose weight has that name.
pub(super) fn projection(name: &str) -> Option<(usize, Target)> {
    let (layer, part) = name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let target = match part {
        "attn_q" => Target::QProj,
        "attn_k" => Target::KProj,
        "attn_v" => Target::VProj,
        "attn_output" => Target::OProj,
        "ffn_gate" => Target::GateProj,
        "ffn_up" => Target::UpProj,
        "ffn_down" => Target::DownProj,
        _ => return None,
    };
    Some((layer.parse().ok()?, target))
}

/// The base's metadata in its order, with the name and the facts of storage set anew. What only told of the base's own
/// quantization or of its parts is left out.
fn metadata(merge: &Merge<'_>) -> Vec<(String, Value)> {
    let mut storage = vec![
        ("general.file_type", Value::U32(merge.quantization.file_type())),
        ("general.quantization_version", Value::U32(QUANTIZATION_VERSION)),
    ];
    let base_name = match merge.base.value("general.name") {
        Some(Value::String(name)) => Some(name.clone()),
        _ => None,
    };
    if let Some(suffix) = merge.name_suffix {
        let name = base_name.map_or_else(Vec::new, |name| [name, b" ".to_vec()].concat());
        storage.push(("general.name", Value::String([&name, suffix.as_bytes()].concat())));
    }
    if merge.base.value("general.alignment").is_some() {
        storage.push(("general.alignment", Value::U32(DEFAULT_ALIGNMENT as u32)));
    }
    let stale = |key: &str| key.starts_with("quantize.") || key.starts_with("split.");
    let mut metadata: Vec<(String, Value)> =
        merge.base.metadata().iter().filter(|(key, _)| !stale(key)).cloned().collect();
    for (key, value) in storage {
        match metadata.iter_mut().find(|(existing, _)| existing == key) {
            Some((_, existing)) => *existing = value,
            None => metadata.push((key.to_owned(), value)),
        }
    }
    metadata
}

fn check_header(written: &GgufFile, metadata: &[(String, Value)], specs: &[TensorSpec]) -> Result<()> {
    let same_pair = |(a, b): (&(String, Value), &(String, Value))| a.0 == b.0 && same_bytes(&a.1, &b.1);
    if written.metadata().len() != metadata.len() || !written.metadata().iter().zip(metadata).all(same_pair) {
        return Err(Error::ReadBack("the metadata differs from what was written".to_owned()));
    }
    let same_tensor = |(tensor, spec): (&TensorInfo, &TensorSpec)| {
        tensor.name == spec.name && tensor.shape == spec.shape && tensor.stored.dtype() == Some(spec.dtype)
    };
    if written.tensors().len() != specs.len() || !written.tensors().iter().zip(specs).all(same_tensor) {
        return Err(Error::ReadBack("the list of tensors differs from what was written".to_owned()));
    }
    Ok(())
}

/// Computes a tensor again and compares every byte with what stands in the file.
fn check_tensor(
    written: &GgufFile,
    merged: &MergedTensor<'_>,
    spec: &TensorSpec,
    on_band: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    let tensor = written.require_tensor(&spec.name)?;
    let stored = written.data(tensor)?;
    let row_bytes = spec.dtype.row_bytes(tensor.columns());
    for rows in merged.bands() {
        if on_band().is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let found = stored.get(rows.start * row_bytes..rows.end * row_bytes);
        if found != Some(&merged.stored(rows.clone())?[..]) {
            let name = &spec.name;
            return Err(Error::ReadBack(format!(
                "tensor `{name}` differs between rows {} and {}",
                rows.start, rows.end
            )));
        }
    }
    Ok(ControlFlow::Continue(()))
}
