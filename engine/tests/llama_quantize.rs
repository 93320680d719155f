//! Against `llama-quantize` itself, from the same file: every tensor of every quantization has its type and its bytes.
//!
//! Skipped aloud unless LORAD_LLAMA_CPP names the folder of llama.cpp's tools; scripts/compare-quantize.sh sets it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use lorad_engine::export::{Merge, Quantization, merged_gguf};
use lorad_engine::gguf::GgufFile;
use lorad_engine::quant::{BlockType, quantize};
use lorad_engine::testing::TinyModel;

fn tool() -> Option<PathBuf> {
    let found = std::env::var_os("LORAD_LLAMA_CPP").map(|folder| Path::new(&folder).join("llama-quantize"));
    if found.is_none() {
        eprintln!("SKIPPED: LORAD_LLAMA_CPP does not name the folder of llama-quantize");
    }
    found
}

fn convert(base: &Path, quantization: Quantization, target: &Path) {
    let base = GgufFile::open(base).unwrap();
    let merge = Merge { base: &base, lora: None, name_suffix: None, chat_template: None };
    let reports =
        merged_gguf(&merge, &|_, _| None, &[(quantization, target)], &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(reports.unwrap().len(), 1);
}

/// Quantizes the file both ways; by type, how many tensors there are and how many have the same bytes.
fn compare(tool: &Path, base: &Path, quantization: Quantization) -> BTreeMap<&'static str, (usize, usize)> {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours.gguf"), folder.path().join("theirs.gguf"));
    convert(base, quantization, &ours);
    let output = Command::new(tool).args([base, &theirs]).arg(quantization.name()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let (ours, theirs) = (GgufFile::open(&ours).unwrap(), GgufFile::open(&theirs).unwrap());
    let file_type = |file: &GgufFile| file.require_u32("general.file_type").unwrap();
    assert_eq!(file_type(&ours), file_type(&theirs), "{quantization:?}");
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    let mut shares = BTreeMap::new();
    for tensor in theirs.tensors() {
        let found = ours.require_tensor(&tensor.name).unwrap();
        assert_eq!(found.stored, tensor.stored, "{quantization:?}: {}", tensor.name);
        let is_equal = ours.data(found).unwrap() == theirs.data(tensor).unwrap();
        let (count, equal) = shares.entry(tensor.dtype().unwrap().name()).or_insert((0, 0));
        *count += 1;
        *equal += usize::from(is_equal);
        if !is_equal {
            eprintln!("{quantization:?}: the bytes of {} differ", tensor.name);
        }
    }
    shares
}

fn compare_all(tool: &Path, base: &Path) {
    for quantization in Quantization::ALL {
        let shares = compare(tool, base, quantization);
        let text: Vec<_> = shares.iter().map(|(name, (count, equal))| format!("{name} {equal} of {count}")).collect();
        eprintln!("{}: byte-equal tensors {}", quantization.name(), text.join(", "));
        // The compiler of another machine may fuse products and sums.
        if cfg!(target_arch = "x86_64") {
            assert!(shares.values().all(|(count, equal)| count == equal), "{quantization:?}: {shares:?}");
        }
    }
}

#[test]
fn tiny_models_get_the_types_and_bytes_of_llama_quantize() {
    let Some(tool) = tool() else { return };
    let folder = tempfile::tempdir().unwrap();
    let wide = TinyModel { layers: 17, hidden: 256, heads: 8, kv_heads: 2, intermediate: 512, ..TinyModel::default() };
    let tied = TinyModel { layers: 8, kv_heads: 8, rope_freqs: true, ..wide.clone() };
    let narrow = TinyModel { layers: 9, hidden: 96, heads: 4, kv_heads: 1, intermediate: 256, ..TinyModel::default() };
    let odd = TinyModel { layers: 3, hidden: 80, heads: 2, kv_heads: 1, intermediate: 48, ..TinyModel::default() };
    let models = [
        ("wide", TinyModel { tied: false, dtypes: vec![BlockType::F32], ..wide }),
        ("tied", TinyModel { dtypes: vec![BlockType::F16], ..tied }),
        ("narrow", TinyModel { tied: false, dtypes: vec![BlockType::BF16], ..narrow }),
        ("odd", TinyModel { dtypes: vec![BlockType::F32, BlockType::F16], ..odd }),
    ];
    for (name, model) in models {
        eprintln!("{name}: {} layers, rows of {} and {}", model.layers, model.hidden, model.intermediate);
        let base = folder.path().join(name);
        model.write(&base).unwrap();
        compare_all(&tool, &base);
    }
}

/// What no mix has for any tensor, but an older file may.
#[test]
fn the_types_outside_of_the_mixes_have_the_bytes_of_llama_quantize() {
    let Some(tool) = tool() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (base, theirs) = (folder.path().join("base.gguf"), folder.path().join("theirs.gguf"));
    TinyModel { hidden: 256, heads: 8, dtypes: vec![BlockType::F32], ..TinyModel::default() }.write(&base).unwrap();
    for dtype in BlockType::ALL.into_iter().filter(|dtype| dtype.is_quantized()) {
        let name = match dtype {
            BlockType::Q3K | BlockType::Q4K | BlockType::Q5K => format!("{}_M", dtype.name()),
            _ => dtype.name().to_owned(),
        };
        let output = Command::new(&tool).arg("--pure").args([&base, &theirs]).arg(&name).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let (base, theirs) = (GgufFile::open(&base).unwrap(), GgufFile::open(&theirs).unwrap());
        for tensor in theirs.tensors().iter().filter(|tensor| tensor.dtype().unwrap() == dtype) {
            let source = base.require_tensor(&tensor.name).unwrap();
            let values: Vec<f32> =
                base.data(source).unwrap().as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
            let ours = quantize(dtype, tensor.columns(), &values).unwrap();
            assert!(ours == theirs.data(tensor).unwrap(), "{name}: the bytes of {} differ", tensor.name);
        }
    }
}

#[test]
fn smollm2_gets_the_types_and_bytes_of_llama_quantize() {
    let Some(tool) = tool() else { return };
    let Some(path) = std::env::var_os("LORAD_SMOLLM2") else {
        eprintln!("SKIPPED: LORAD_SMOLLM2 does not name SmolLM2's GGUF file");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("f16.gguf");
    convert(Path::new(&path), Quantization::F16, &base);
    compare_all(&tool, &base);
}
