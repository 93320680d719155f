//! The LoRA as a GGUF file of its own, for `llama-cli --lora` beside the base: written, and read back into parameters.
//!
//! llama.cpp's layout: metadata `general.type` = adapter, `adapter.type` = lora, `adapter.lora.alpha`; a pair of tensors
//! `blk.N.attn_q.weight.lora_a` (R, in) and `….lora_b` (out, R) for each projection, rows in the order of the base's own
//! weight. llama.cpp multiplies by alpha / R, R being read off the tensor, so that alpha stands here as scale · R: for rsLoRA
//! that is alpha · √R.

use std::ops::ControlFlow;
use std::path::Path;

use super::Progress;
use crate::adapter::{LoraLayout, LoraPair, LoraParams};
use crate::gguf::{GgufFile, TensorSpec, Value, Writer};
use crate::model::{Shape, gguf_name};
use crate::ops::{host, host_mut};
use crate::quant::BlockType;
use crate::spec::{LoraOptions, LoraSpec, Target, TrainOptions, TrainSpec};
use crate::{Error, Result};

const ALPHA_KEY: &str = "adapter.lora.alpha";

/// Writes the LoRA in f32 under the name `target`, which it gets once it is whole; `Break` leaves nothing behind and gives
/// `None`, otherwise the size in bytes.
///
/// # Errors
/// [`Error::Io`]; [`Error::Adapter`] where it has no pair.
pub fn gguf_lora(
    lora: &LoraParams,
    name: &str,
    target: &Path,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<u64>> {
    let pairs: Vec<(String, &LoraPair)> = lora
        .projections()
        .filter_map(|(layer, projection)| Some((gguf_name(layer, projection), lora.pair(layer, projection)?)))
        .collect();
    if pairs.is_empty() {
        return Err(Error::Adapter("it has no pair of matrices".to_owned()));
    }
    let tensors = |(name, pair): &(String, &LoraPair)| {
        [(format!("{name}.lora_a"), pair.lora_a.clone()), (format!("{name}.lora_b"), pair.lora_b.clone())]
    };
    let tensors: Vec<_> = pairs.iter().flat_map(tensors).collect();
    let spec = |(name, tensor): &(String, candle_core::Tensor)| TensorSpec {
        name: name.clone(),
        shape: tensor.dims().to_vec(),
        dtype: BlockType::F32,
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let mut writer = Writer::create(target, &metadata(lora.layout().spec(), name), &specs)?;
    for (done, (name, tensor)) in tensors.iter().enumerate() {
        if on_progress(Progress { done, total: tensors.len() }).is_break() {
            return Ok(None);
        }
        let bytes: Vec<u8> = host(tensor)?.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.write(name, &bytes)?;
    }
    writer.finish()?;
    Ok(Some(std::fs::metadata(target).map_err(Error::io(target))?.len()))
}

fn metadata(spec: &LoraSpec, name: &str) -> Vec<(String, Value)> {
    let alpha = (spec.scale() * f64::from(spec.r)) as f32;
    let pairs = [
        ("general.architecture", Value::from("llama")),
        ("general.type", Value::from("adapter")),
        ("general.name", Value::from(name)),
        ("general.file_type", Value::U32(0)),
        ("adapter.type", Value::from("lora")),
        (ALPHA_KEY, Value::F32(alpha)),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Reads a GGUF-LoRA for a model of that shape.
///
/// # Errors
/// [`Error::Adapter`] or [`Error::Model`] where it is none, or does not fit; the message names the key or tensor.
pub fn read_gguf_lora(file: &GgufFile, shape: &Shape) -> Result<LoraParams> {
    for (key, wanted) in [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")] {
        let found = file.require_string(key)?;
        if found != wanted {
            return Err(Error::Adapter(format!("metadata `{key}` must be {wanted}, got `{found}`")));
        }
    }
    let lora = LoraParams::zeros(LoraLayout::new(&spec_of(file, shape)?, shape))?;
    let mut expected = 0;
    for (layer, projection) in lora.projections() {
        let Some(pair) = lora.pair(layer, projection) else { continue };
        let name = gguf_name(layer, projection);
        for (suffix, place) in [("lora_a", &pair.lora_a), ("lora_b", &pair.lora_b)] {
            fill(file, &format!("{name}.{suffix}"), place)?;
            expected += 1;
        }
    }
    match file.tensors().len() {
        found if found == expected => Ok(lora),
        found => Err(Error::Adapter(format!("it has {found} tensors, a LoRA of its projections has {expected}"))),
    }
}

fn fill(file: &GgufFile, name: &str, place: &candle_core::Tensor) -> Result<()> {
    let tensor = file.require_tensor(name)?;
    if tensor.shape != place.dims() {
        let (found, wanted) = (&tensor.shape, place.dims());
        return Err(Error::Adapter(format!("tensor `{name}` has the shape {found:?}, must have {wanted:?}")));
    }
    let values = crate::model::weights::vector(file, name, place.elem_count())?;
    host_mut(place, |place| {
        place.copy_from_slice(&values);
        Ok(())
    })
}

/// Rank, alpha and targets, from the first layer's tensors.
fn spec_of(file: &GgufFile, shape: &Shape) -> Result<LoraSpec> {
    let of_first_layer = |target: &Target| file.tensor(&format!("{}.lora_a", gguf_name(0, *target))).is_some();
    let targets: Vec<Target> = Target::ALL.into_iter().filter(of_first_layer).collect();
    let Some(&first) = targets.first() else {
        return Err(Error::Adapter(format!("it has no tensor of the first of {} layers", shape.layers)));
    };
    let rank = file.require_tensor(&format!("{}.lora_a", gguf_name(0, first)))?.rows();
    let lora = LoraOptions {
        r: Some(u32::try_from(rank).unwrap_or(u32::MAX)),
        target_modules: Some(targets.iter().map(|target| target.name().to_owned()).collect()),
        ..LoraOptions::default()
    };
    let alpha = f64::from(file.require_f32(ALPHA_KEY)?);
    if !(alpha.is_finite() && alpha > 0.0) {
        return Err(Error::Adapter(format!("metadata `{ALPHA_KEY}` must be above 0, got `{alpha}`")));
    }
    // Above the range that a run may ask for: alpha stands here as alpha · √R for rsLoRA.
    Ok(LoraSpec { alpha, ..TrainSpec::resolve(&TrainOptions { lora, ..TrainOptions::default() })?.lora })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Llama;
    use crate::testing::TinyModel;

    fn tiny(folder: &Path) -> Llama {
        let path = folder.join("tiny.gguf");
        TinyModel::default().write(&path).unwrap();
        Llama::load(&GgufFile::open(&path).unwrap()).unwrap()
    }

    fn lora(shape: &Shape, use_rslora: bool, targets: &[Target]) -> LoraParams {
        let mut spec = TrainSpec::default().lora;
        (spec.r, spec.alpha, spec.use_rslora, spec.target_modules) = (4, 10.0, use_rslora, targets.to_vec());
        let lora = LoraParams::zeros(LoraLayout::new(&spec, shape)).unwrap();
        host_mut(lora.flat(), |values| {
            values.iter_mut().enumerate().for_each(|(i, value)| *value = ((i * 7919) % 1009) as f32 / 5e3 - 0.1);
            Ok(())
        })
        .unwrap();
        lora
    }

    #[test]
    fn what_is_read_back_computes_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny(folder.path());
        let path = folder.path().join("lora.gguf");
        for (use_rslora, targets) in [(false, &Target::ALL[..]), (true, &[Target::QProj, Target::DownProj][..])] {
            let lora = lora(&model.config().shape, use_rslora, targets);
            let size = gguf_lora(&lora, "tiny tuned", &path, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(size, Some(std::fs::metadata(&path).unwrap().len()));
            let file = GgufFile::open(&path).unwrap();
            // Twice alpha for rsLoRA of rank 4: llama.cpp divides by the rank.
            assert_eq!(file.require_f32(ALPHA_KEY).unwrap(), if use_rslora { 20.0 } else { 10.0 });
            let read = read_gguf_lora(&file, &model.config().shape).unwrap();
            assert_eq!(*host(lora.flat()).unwrap(), *host(read.flat()).unwrap());
            assert_eq!(read.scale(), lora.scale());
            let logits = |lora| model.logits(&[5, 80, 13], Some(lora)).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(logits(&lora), logits(&read));
        }
    }

    #[test]
    fn another_shape_another_kind_and_a_stop_are_refused_or_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny(folder.path());
        let shape = &model.config().shape;
        let path = folder.path().join("lora.gguf");
        let lora = lora(shape, false, &Target::ALL);
        let stopped = gguf_lora(&lora, "tiny", &path, &mut |progress| match progress.done {
            5 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        assert_eq!(stopped.unwrap(), None);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the base is there");
        gguf_lora(&lora, "tiny", &path, &mut |_| ControlFlow::Continue(())).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let says = |shape: &Shape| read_gguf_lora(&file, shape).unwrap_err().to_string();
        let fewer = Shape { layers: 1, ..shape.clone() };
        assert!(says(&fewer).contains("it has 28 tensors, a LoRA of its projections has 14"), "{}", says(&fewer));
        let wider = Shape { intermediate: 256, ..shape.clone() };
        assert!(says(&wider).contains("`blk.0.ffn_gate.weight.lora_b` has the shape [128, 4]"), "{}", says(&wider));
        let base = GgufFile::open(&folder.path().join("tiny.gguf")).unwrap();
        assert!(read_gguf_lora(&base, shape).unwrap_err().to_string().contains("`general.type` is missing"));
    }
}
