//! The merged file holds base + LoRA in the target's rounding, or does not appear at all.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Delta, Deltas, ExportReport, Merge, Progress, Quantization, merged_gguf, merged_gguf_bytes};
use crate::gguf::{GgufFile, TensorInfo, TensorSpec, Value, Writer};
use crate::model::weights::dequantize_blocks;
use crate::quant::tests::tolerance;
use crate::quant::{BlockType, quantize};
use crate::spec::{LoraSpec, Target};
use crate::testing::TinyModel;
use crate::{Error, Result};

const RANK: usize = 4;

fn lora() -> LoraSpec {
    LoraSpec { r: RANK as u32, alpha: 16.0, dropout: 0.0, use_rslora: true, target_modules: Target::ALL.to_vec() }
}

fn tiny(folder: &Path) -> GgufFile {
    let dtypes = vec![BlockType::Q8_0, BlockType::Q4_0, BlockType::F32, BlockType::BF16, BlockType::Q5_1];
    // ffn_down has rows of 48, no multiple of 32.
    let model = TinyModel { tied: false, rope_freqs: true, intermediate: 48, dtypes, ..TinyModel::default() };
    let path = folder.join("tiny.gguf");
    model.write(&path).expect("written");
    GgufFile::open(&path).expect("our own file")
}

fn name_of(layer: usize, target: Target) -> String {
    let part = match target {
        Target::QProj => "attn_q",
        Target::KProj => "attn_k",
        Target::VProj => "attn_v",
        Target::OProj => "attn_output",
        Target::GateProj => "ffn_gate",
        Target::UpProj => "ffn_up",
        Target::DownProj => "ffn_down",
    };
    format!("blk.{layer}.{part}.weight")
}

/// A LoRA whose values depend on the layer and the projection.
fn delta(base: &GgufFile, layer: usize, target: Target) -> Option<Delta<'static>> {
    let tensor = base.tensor(&name_of(layer, target))?;
    let mut random = ChaCha8Rng::seed_from_u64((layer * 10 + target.index()) as u64);
    let mut some = |count: usize| Cow::Owned((0..count).map(|_| random.random_range(-0.1..0.1)).collect());
    Some(Delta { lora_a: some(RANK * tensor.columns()), lora_b: some(tensor.rows() * RANK) })
}

fn export(base: &GgufFile, quantization: Quantization, target: &Path) -> Result<ExportReport> {
    let delta = |layer, target| delta(base, layer, target);
    let merge = Merge { base, lora: Some(&lora()), name_suffix: Some("tuned"), chat_template: None };
    let reports = merged_gguf(&merge, &delta, &[(quantization, target)], &mut |_| ControlFlow::Continue(()))?;
    let report = reports.expect("not stopped").remove(0);
    assert_eq!(merged_gguf_bytes(&merge, quantization)?, report.size_bytes, "known before it is made");
    Ok(report)
}

/// A tensor through candle: an implementation that shares nothing with the export.
fn candle_tensor(path: &Path, name: &str) -> QTensor {
    let mut file = std::fs::File::open(path).expect("there");
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).expect("readable by candle");
    content.tensor(&mut file, name, &Device::Cpu).expect("readable by candle")
}

/// W + scale · B A in f32 by candle.
fn candle_merge(base: &GgufFile, path: &Path, name: &str) -> Tensor {
    let weight = candle_tensor(path, name).dequantize(&Device::Cpu).expect("f32");
    let found = (0..2).flat_map(|layer| Target::ALL.map(|target| (layer, target)));
    let Some((layer, target)) = found.into_iter().find(|&(layer, target)| name_of(layer, target) == name) else {
        return weight;
    };
    let Delta { lora_a, lora_b } = delta(base, layer, target).expect("there");
    let (rows, columns) = weight.dims2().expect("a matrix");
    let a = Tensor::from_slice(&lora_a, (RANK, columns), &Device::Cpu).expect("A");
    let b = Tensor::from_slice(&lora_b, (rows, RANK), &Device::Cpu).expect("B");
    let product = (b.matmul(&a).expect("B A") * lora().scale()).expect("scaled");
    (weight + product).expect("merged")
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).and_then(|d| d.abs()?.flatten_all()?.max(0)?.to_scalar());
    difference.expect("the same shape")
}

#[test]
fn every_tensor_is_base_plus_lora_in_the_targets_rounding() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    for quantization in Quantization::ALL {
        let target = folder.path().join("merged.gguf");
        let report = export(&base, quantization, &target).expect("exported");
        assert_eq!((report.tensors, report.merged_tensors), (base.tensors().len(), 14));
        // Rows of 64 are no multiple of 256, rows of 48 none of 32 either.
        let matrices = base.tensors().iter().filter(|tensor| tensor.shape.len() > 1);
        let fell_back = |tensor: &&TensorInfo| match quantization.main_type().block_values() {
            1 => false,
            32 => tensor.columns() == 48 || tensor.name == "output.weight" && quantization != Quantization::Q8_0,
            _ => tensor.name != "output.weight",
        };
        let fallbacks: Vec<&str> = matrices.filter(fell_back).map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(report.fallback_tensors, fallbacks, "{quantization:?}");

        let merged = GgufFile::open(&target).expect("readable");
        assert_eq!(report.size_bytes, std::fs::metadata(&target).expect("there").len());
        let names = |file: &GgufFile| file.tensors().iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&merged), names(&base));
        for tensor in merged.tensors() {
            let name = &tensor.name;
            let dtype = tensor.dtype().expect("known");
            let reference = candle_merge(&base, &folder.path().join("tiny.gguf"), name);
            let found = candle_tensor(&target, name).dequantize(&Device::Cpu).expect("f32");
            let largest = reference.abs().and_then(|t| t.flatten_all()?.max(0)?.to_scalar::<f32>()).expect("not empty");
            // The nearest level, or with a LoRA one beside it, which is another two of these away.
            let levels = if dtype.is_quantized() && name.starts_with("blk.") { 3.0 } else { 1.0 };
            let tolerance = largest * (levels * tolerance(dtype) + 1e-6);
            let difference = largest_difference(&reference, &found);
            assert!(difference <= tolerance, "{quantization:?} {name}: {difference} > {tolerance}");
            if levels > 1.0 {
                // All values together are about as close as with their nearest levels.
                let flat = |tensor: &Tensor| -> Vec<f32> {
                    tensor.flatten_all().and_then(|tensor| tensor.to_vec1()).expect("f32")
                };
                let wanted = flat(&reference);
                let stored = quantize(dtype, tensor.columns(), &wanted).expect("quantized");
                let mut nearest = vec![0.0; wanted.len()];
                dequantize_blocks(dtype, &stored, &mut nearest).expect("read back");
                let apart = |found: &[f32]| found.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
                let (ours, least) = (apart(&flat(&found)), apart(&nearest));
                assert!(ours <= 1.5 * least, "{quantization:?} {name}: {ours} apart, {least} with the nearest levels");
            }
        }
    }
}

#[test]
fn tensors_without_a_lora_get_candles_own_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    let target = folder.path().join("merged.gguf");
    export(&base, Quantization::Q8_0, &target).expect("exported");
    let merged = GgufFile::open(&target).expect("readable");
    for name in ["token_embd.weight", "output.weight"] {
        let weight = candle_tensor(&folder.path().join("tiny.gguf"), name).dequantize(&Device::Cpu).expect("f32");
        let expected = QTensor::quantize(&weight, GgmlDType::Q8_0).expect("whole blocks");
        let found = merged.data(merged.require_tensor(name).expect("there")).expect("q8_0");
        assert_eq!(expected.data().expect("bytes").as_ref(), found, "{name}");
    }
    for name in ["blk.0.attn_norm.weight", "rope_freqs.weight"] {
        let bytes = |file: &GgufFile| file.data(file.require_tensor(name).expect("there")).expect("f32").to_vec();
        assert_eq!(bytes(&base), bytes(&merged), "{name}");
    }
}

#[test]
fn metadata_is_the_bases_but_for_what_tells_of_storage() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    let target = folder.path().join("merged.gguf");
    export(&base, Quantization::F16, &target).expect("exported");
    let merged = GgufFile::open(&target).expect("readable");
    assert_eq!(merged.require_string("general.name").expect("a name"), "tiny tuned");
    assert_eq!(merged.require_u32("general.file_type").expect("a number"), 1);
    assert_eq!(merged.require_u32("general.quantization_version").expect("a number"), 2);
    for (key, value) in base.metadata() {
        assert!(key == "general.name" || merged.value(key) == Some(value), "{key}");
    }
    assert!(matches!(merged.value("tokenizer.chat_template"), Some(Value::String(_))));
}

#[test]
fn a_template_in_place_of_the_bases_leaves_none_of_its_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    let other = ("tokenizer.chat_template.tool_use".to_owned(), Value::from("{{ tools }}"));
    let metadata = [base.metadata(), &[other]].concat();
    let spec = |tensor: &TensorInfo| {
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        TensorSpec { name, shape, dtype: tensor.dtype().expect("known") }
    };
    let specs: Vec<TensorSpec> = base.tensors().iter().map(spec).collect();
    let path = folder.path().join("with-tools.gguf");
    let mut writer = Writer::create(&path, &metadata, &specs).expect("a file");
    for tensor in base.tensors() {
        writer.write(&tensor.name, base.data(tensor).expect("there")).expect("written");
    }
    writer.finish().expect("whole");
    let base = GgufFile::open(&path).expect("our own file");
    for (chat_template, keys) in [
        (None, ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"].as_slice()),
        (Some("{{ messages }}"), &["tokenizer.chat_template"]),
    ] {
        let merge = Merge { base: &base, lora: None, name_suffix: None, chat_template };
        let target = folder.path().join("merged.gguf");
        let outputs = [(Quantization::F16, target.as_path())];
        merged_gguf(&merge, &|_, _| None, &outputs, &mut |_| ControlFlow::Continue(())).expect("exported");
        let merged = GgufFile::open(&target).expect("readable");
        let found = merged.metadata().iter().map(|(key, _)| key.as_str());
        assert_eq!(found.filter(|key| key.starts_with("tokenizer.chat_template")).collect::<Vec<_>>(), keys);
        let expected =
            chat_template.map_or_else(|| base.value("tokenizer.chat_template").cloned(), |text| Some(text.into()));
        assert_eq!(merged.value("tokenizer.chat_template"), expected.as_ref());
    }
}

#[test]
fn a_stopped_or_failed_export_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    let out = tempfile::tempdir().expect("a folder");
    let target = out.path().join("merged.gguf");
    let given = |layer, target| delta(&base, layer, target);
    let lora = lora();
    let merge = Merge { base: &base, lora: Some(&lora), name_suffix: None, chat_template: None };
    let second = out.path().join("second.gguf");
    let outputs = [(Quantization::F16, target.as_path()), (Quantization::Q4KM, second.as_path())];
    let total = 3 * base.tensors().len();
    for stop_at in [0, 3, total / 3, total / 2, total - 1] {
        let mut on_progress = |progress: Progress| {
            assert_eq!(progress.total, total);
            if progress.done == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        assert_eq!(merged_gguf(&merge, &given, &outputs, &mut on_progress).expect("no error"), None);
    }
    let failing: [(Deltas<'_, '_>, &str); 4] = [
        (&|_, _| None, "it has a LoRA for none of the base's tensors"),
        (
            &|layer, target| delta(&base, layer, target).map(|d| Delta { lora_a: vec![0.0; 3].into(), ..d }),
            "LoRA A of tensor `blk.0.attn_q.weight` has 3 values, must have 4 × 64",
        ),
        (
            &|layer, target| {
                delta(&base, layer, target).map(|d| Delta { lora_b: vec![f32::NAN; d.lora_b.len()].into(), ..d })
            },
            "merged, tensor `blk.0.attn_q.weight` has the value NaN in row 0, F16 cannot hold it",
        ),
        (
            &|layer, target| {
                delta(&base, layer, target).map(|d| Delta { lora_b: vec![1e9; d.lora_b.len()].into(), ..d })
            },
            "F16 cannot hold it",
        ),
    ];
    for (delta, says) in failing {
        let error = merged_gguf(&merge, delta, &outputs, &mut |_| ControlFlow::Continue(())).expect_err(says);
        assert!(matches!(error, Error::Adapter(_)) && error.to_string().contains(says), "{error}");
    }
    assert_eq!(std::fs::read_dir(out.path()).expect("a folder").count(), 0, "nothing is left behind");
}

#[test]
fn what_changed_on_the_way_to_the_disk_is_found() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = tiny(folder.path());
    let out = tempfile::tempdir().expect("a folder");
    let given = |layer, target| delta(&base, layer, target);
    let lora = lora();
    let merge = Merge { base: &base, lora: Some(&lora), name_suffix: None, chat_template: None };
    let target = out.path().join("merged.gguf");
    let half = base.tensors().len();
    let mut flipped = false;
    let error = merged_gguf(&merge, &given, &[(Quantization::Q8_0, &target)], &mut |progress| {
        // The file is complete and sealed once reading back begins.
        if progress.done == half && !flipped {
            let path =
                std::fs::read_dir(out.path()).expect("a folder").next().expect("one file").expect("an entry").path();
            let mut bytes = std::fs::read(&path).expect("there");
            let end =
                GgufFile::open(&path).expect("complete").tensors().last().map(|last| last.offset).expect("a tensor");
            bytes[end - 32] ^= 1;
            std::fs::write(&path, bytes).expect("written");
            flipped = true;
        }
        ControlFlow::Continue(())
    });
    let error = error.expect_err("one bit differs");
    assert!(
        matches!(&error, Error::ReadBack(message) if message.contains("tensor `output.weight` differs")),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(out.path()).expect("a folder").count(), 0, "nothing is left behind");
}

#[test]
fn the_files_of_other_programs_are_merged() {
    let Some(data) = crate::testing::shared_data() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["stories260K.gguf", "stories260K-Q4_0.gguf"] {
        let base = GgufFile::open(&data.join(file)).expect("a good file");
        for (quantization, fallbacks) in [(Quantization::F16, 0), (Quantization::Q8_0, 5), (Quantization::Q4KM, 36)] {
            let report = export(&base, quantization, &folder.path().join("merged.gguf")).expect("exported");
            assert_eq!((report.tensors, report.merged_tensors), (48, 35));
            // Rows of 172 are no multiple of 32, rows of 64 none of 256.
            assert_eq!(report.fallback_tensors.len(), fallbacks, "{file} {quantization:?}");
        }
    }
}
