//! Merged GGUF files: the base's tensors in their order, LoRA added, in one or several mixes of types at once; read back before
//! they are published.
//!
//! All cores compute a band of rows; a thread a file hashes and writes it meanwhile. Then each file is read from disk: header
//! and metadata must be what was asked for, and every tensor's hash that of the bytes which went out. Metadata is the base's,
//! but for what says how the file is stored.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use sha2::{Digest, Sha256};

use super::merge::MergedTensor;
use super::mix::Plan;
use super::{Deltas, ExportReport, Merge, Progress, Quantization};
use crate::gguf::{
    DEFAULT_ALIGNMENT, GgufFile, SealedFile, TensorInfo, TensorSpec, Value, Writer, file_bytes, same_bytes,
};
use crate::model::weights::Weight;
use crate::quant::BlockType;
use crate::spec::Target;
use crate::{Error, Result};

/// ggml's version of the block formats, unchanged since 2023.
const QUANTIZATION_VERSION: u32 = 2;
/// The key of the chat template; those of templates for other uses begin with it too, as does the list of their names.
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
/// Bands that may wait for a file's thread, so that it is neither idle nor far behind.
const WAITING_BANDS: usize = 2;
/// Bytes that are read back at a time.
const READ_BYTES: usize = 1 << 20;

/// Writes base and LoRA as GGUF files, one for each quantization, reading the base once. Never more than a few bands of one
/// tensor are in memory.
///
/// A file grows under a temporary name and gets its own once it has been read back and found to be what was written; all of
/// them do or none. `on_progress` is called at least once a tensor; `Break` stops the export, which leaves nothing behind and
/// gives `None`.
///
/// # Errors
/// [`Error::Model`] where the base has a type that cannot be dequantized; [`Error::Adapter`] where the LoRA does not fit it,
/// touches none of its tensors, or makes a value that the target type cannot hold; [`Error::ReadBack`] where a file that was
/// written is not what should have been; [`Error::Io`].
pub fn merged_gguf(
    merge: &Merge<'_>,
    delta: Deltas<'_, '_>,
    outputs: &[(Quantization, &Path)],
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Vec<ExportReport>>> {
    let outputs = outputs.iter().map(|&(quantization, target)| Output::new(merge, quantization, target));
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    let tensors = merge.base.tensors().len();
    let mut progress = Progress { done: 0, total: (1 + outputs.len()) * tensors };

    let Some((merged_tensors, written)) = write(merge, delta, &outputs, &mut progress, on_progress)? else {
        return Ok(None);
    };
    let mut reports = Vec::with_capacity(outputs.len());
    for (output, written) in outputs.iter().zip(&written) {
        let Some(size_bytes) = read_back(output, written, &mut progress, on_progress)? else { return Ok(None) };
        reports.push(ExportReport {
            quantization: output.quantization,
            tensors,
            merged_tensors,
            fallback_tensors: output.plan.fallbacks.clone(),
            size_bytes,
        });
    }
    written.into_iter().try_for_each(|written| written.file.publish())?;
    // The files are there now: a wish to stop comes too late.
    let _ = on_progress(progress);
    Ok(Some(reports))
}

/// Bytes of the file that [`merged_gguf`] makes.
///
/// # Errors
/// [`Error::Model`] as there.
pub fn merged_gguf_bytes(merge: &Merge<'_>, quantization: Quantization) -> Result<u64> {
    file_bytes(&metadata(merge, quantization), &Plan::new(merge.base, quantization)?.specs)
}

/// A file to be written.
struct Output<'a> {
    quantization: Quantization,
    target: &'a Path,
    metadata: Vec<(String, Value)>,
    plan: Plan,
}

impl<'a> Output<'a> {
    fn new(merge: &Merge<'_>, quantization: Quantization, target: &'a Path) -> Result<Self> {
        let plan = Plan::new(merge.base, quantization)?;
        Ok(Self { quantization, target, metadata: metadata(merge, quantization), plan })
    }
}

/// A complete file under its temporary name.
struct Written {
    file: SealedFile,
    /// Hash of every tensor's bytes, in the file's order.
    hashes: Vec<Hash>,
}

type Hash = sha2::digest::Output<Sha256>;

/// Writes every tensor to every output. How many tensors the LoRA was merged into, and the files; `None` where it was stopped.
fn write(
    merge: &Merge<'_>,
    delta: Deltas<'_, '_>,
    outputs: &[Output<'_>],
    progress: &mut Progress,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<(usize, Vec<Written>)>> {
    thread::scope(|scope| {
        let mut senders = Vec::with_capacity(outputs.len());
        let mut threads = Vec::with_capacity(outputs.len());
        for output in outputs {
            let writer = Writer::create(output.target, &output.metadata, &output.plan.specs)?;
            let (sender, bands) = sync_channel(WAITING_BANDS);
            senders.push(sender);
            threads.push(scope.spawn(move || write_bands(writer, &output.plan.specs, &bands)));
        }
        let made = make_bands(merge, delta, outputs, &senders, progress, on_progress);
        // Without a sender a thread ends with what it has got.
        drop(senders);
        let ended = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        let written = all_or_none(ended)?;
        Ok(made?.zip(written))
    })
}

/// What all threads gave, `None` where one gave nothing. An error comes before that, whichever thread it is of: it is why the
/// others got too little.
fn all_or_none<T>(ended: impl Iterator<Item = Result<Option<T>>>) -> Result<Option<Vec<T>>> {
    Ok(ended.collect::<Result<Vec<_>>>()?.into_iter().collect())
}

/// Rows of a tensor in the type that a file has for it.
struct Band {
    tensor: usize,
    bytes: Arc<Vec<u8>>,
}

/// Computes every band and hands it to every file's thread. How many tensors the LoRA was merged into; `None` where it was
/// stopped, or a thread has ended before its time.
fn make_bands(
    merge: &Merge<'_>,
    delta: Deltas<'_, '_>,
    outputs: &[Output<'_>],
    senders: &[SyncSender<Band>],
    progress: &mut Progress,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<usize>> {
    let mut merged_tensors = 0;
    for (index, tensor) in merge.base.tensors().iter().enumerate() {
        let merged = merged_tensor(merge, delta, tensor)?;
        merged_tensors += usize::from(merged.has_delta());
        let mut dtypes: Vec<BlockType> = Vec::new();
        let which: Vec<usize> =
            outputs.iter().map(|output| place(&mut dtypes, output.plan.specs[index].dtype)).collect();
        for rows in merged.bands() {
            if on_progress(*progress).is_break() {
                return Ok(None);
            }
            let stored: Vec<_> = merged.stored(rows, &dtypes)?.into_iter().map(Arc::new).collect();
            for (sender, &which) in senders.iter().zip(&which) {
                if sender.send(Band { tensor: index, bytes: Arc::clone(&stored[which]) }).is_err() {
                    return Ok(None);
                }
            }
        }
        progress.done += 1;
    }
    if merged_tensors == 0 && merge.lora.is_some() {
        return Err(Error::Adapter("it has a LoRA for none of the base's tensors".to_owned()));
    }
    Ok(Some(merged_tensors))
}

/// Where the type stands in the list, at its end if it was not there.
fn place(dtypes: &mut Vec<BlockType>, dtype: BlockType) -> usize {
    dtypes.iter().position(|&known| known == dtype).unwrap_or_else(|| {
        dtypes.push(dtype);
        dtypes.len() - 1
    })
}

/// Hashes and writes bands as they come; `None` where they end before the file is whole.
fn write_bands(mut writer: Writer, specs: &[TensorSpec], bands: &Receiver<Band>) -> Result<Option<Written>> {
    let mut hashes = vec![Sha256::new(); specs.len()];
    for Band { tensor, bytes } in bands {
        hashes[tensor].update(bytes.as_slice());
        writer.write(&specs[tensor].name, &bytes)?;
    }
    if !writer.is_complete() {
        return Ok(None);
    }
    let hashes = hashes.into_iter().map(Sha256::finalize).collect();
    Ok(Some(Written { file: writer.seal()?, hashes }))
}

/// Reads a file from disk and compares it with what was written. Its size; `None` where it was stopped.
fn read_back(
    output: &Output<'_>,
    written: &Written,
    progress: &mut Progress,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<u64>> {
    let found = GgufFile::open(written.file.path()).map_err(|error| Error::ReadBack(error.to_string()))?;
    check_header(&found, &output.metadata, &output.plan.specs)?;
    for (tensor, &hash) in found.tensors().iter().zip(&written.hashes) {
        if on_progress(*progress).is_break() {
            return Ok(None);
        }
        if hash_of(&found, tensor)? != hash {
            return Err(Error::ReadBack(format!("tensor `{}` differs from what was written", tensor.name)));
        }
        progress.done += 1;
    }
    Ok(Some(found.mapped().bytes().len() as u64))
}

fn hash_of(file: &GgufFile, tensor: &TensorInfo) -> Result<Hash> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES.min(tensor.size_bytes)];
    for start in (0..tensor.size_bytes).step_by(READ_BYTES) {
        let part = &mut buffer[..READ_BYTES.min(tensor.size_bytes - start)];
        file.mapped().read_at(tensor.offset + start, part)?;
        hash.update(part);
    }
    Ok(hash.finalize())
}

fn merged_tensor<'a>(merge: &Merge<'_>, delta: Deltas<'_, 'a>, tensor: &TensorInfo) -> Result<MergedTensor<'a>> {
    let (rank, scale) = merge.lora.map_or((0, 0.0), |lora| (lora.r as usize, lora.scale() as f32));
    let is_target = |target| merge.lora.is_some_and(|lora| lora.target_modules.contains(&target));
    let delta = match projection(&tensor.name) {
        Some((layer, target)) if is_target(target) => delta(layer, target),
        _ => None,
    };
    MergedTensor::new(&tensor.name, Weight::from_tensor(merge.base, tensor)?, delta, (rank, scale))
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

/// The base's metadata in its order, with the name, the chat template and the facts of storage set anew. What only told of the base's own
/// quantization or of its parts is left out.
fn metadata(merge: &Merge<'_>, quantization: Quantization) -> Vec<(String, Value)> {
    let mut changed = vec![
        ("general.file_type", Value::U32(quantization.file_type())),
        ("general.quantization_version", Value::U32(QUANTIZATION_VERSION)),
    ];
    let base_name = match merge.base.value("general.name") {
        Some(Value::String(name)) => Some(name.clone()),
        _ => None,
    };
    if let Some(suffix) = merge.name_suffix {
        let name = base_name.map_or_else(Vec::new, |name| [name, b" ".to_vec()].concat());
        changed.push(("general.name", Value::String([&name, suffix.as_bytes()].concat())));
    }
    if merge.base.value("general.alignment").is_some() {
        changed.push(("general.alignment", Value::U32(DEFAULT_ALIGNMENT as u32)));
    }
    if let Some(template) = merge.chat_template {
        changed.push((CHAT_TEMPLATE, Value::String(template.as_bytes().to_vec())));
    }
    // Beside a template that takes the base's place, its templates for other uses would prompt otherwise than was trained.
    let own_template =
        |key: &str| merge.chat_template.is_some() && key != CHAT_TEMPLATE && key.starts_with(CHAT_TEMPLATE);
    let stale = |key: &str| key.starts_with("quantize.") || key.starts_with("split.") || own_template(key);
    let mut metadata: Vec<(String, Value)> =
        merge.base.metadata().iter().filter(|(key, _)| !stale(key)).cloned().collect();
    for (key, value) in changed {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_written_is_no_stop_because_of_the_files_before_it() {
        let full = || Err(Error::ReadBack("the disk is full".to_owned()));
        for ended in [[Ok(None), full()], [full(), Ok(None)], [Ok(Some(1)), full()]] {
            assert!(all_or_none(ended.into_iter()).is_err());
        }
        assert_eq!(all_or_none([Ok(Some(1)), Ok(None)].into_iter()).unwrap(), None);
        assert_eq!(all_or_none([Ok(Some(1)), Ok(Some(2))].into_iter()).unwrap(), Some(vec![1, 2]));
    }
}
