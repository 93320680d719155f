//! Logits against an independent implementation on the same dequantized weights: candle-transformers' quantized Llama.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::quant::BlockType;
use lorad_engine::testing::TinyModel;

/// Candle's quantized products round the activations unless this is set, and it is read once a thread.
const DEQUANTIZE_ALL: &str = "CANDLE_DEQUANTIZE_ALL";

/// Runs `check` in a process of this test alone that has the variable set.
fn with_dequantized_weights(test: &str, check: impl FnOnce()) {
    if std::env::var_os(DEQUANTIZE_ALL).is_some() {
        return check();
    }
    let this = std::env::current_exe().unwrap();
    let child = Command::new(this).args(["--exact", test, "--nocapture"]).env(DEQUANTIZE_ALL, "1").output().unwrap();
    eprint!("{}", String::from_utf8_lossy(&child.stderr));
    let told = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && told.contains("1 passed"), "{told}");
}

/// The largest difference of a logit over those tokens.
fn largest_difference(path: &Path, tokens: &[u32]) -> f32 {
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut oracle = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let model = Llama::load(&GgufFile::open(path).unwrap()).unwrap();
    let ours: Vec<Vec<f32>> = model.logits(tokens, None).unwrap().to_vec2().unwrap();
    let mut largest = 0f32;
    for (place, (&token, ours)) in tokens.iter().zip(&ours).enumerate() {
        let input = Tensor::new(&[[token]], &Device::Cpu).unwrap();
        let theirs: Vec<f32> = oracle.forward(&input, place).unwrap().squeeze(0).unwrap().to_vec1().unwrap();
        assert_eq!(ours.len(), theirs.len());
        let differences = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
        largest = differences.fold(largest, f32::max);
    }
    largest
}

#[test]
fn tiny_models_of_every_stored_type_agree() {
    with_dequantized_weights("tiny_models_of_every_stored_type_agree", || {
        use BlockType::{F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        let small = TinyModel { dtypes: vec![F32, Q4_0, F16, Q4_1, Q8_0, Q5_0, Q5_1], ..TinyModel::default() };
        let wide = TinyModel {
            hidden: 256,
            intermediate: 512,
            tied: false,
            dtypes: vec![Q4K, Q6K, Q2K, Q3K, Q5K, F32],
            ..TinyModel::default()
        };
        let folder = tempfile::tempdir().unwrap();
        for (name, model) in [("small", small), ("wide", wide)] {
            let path = folder.path().join(name);
            model.write(&path).unwrap();
            let tokens: Vec<u32> = (0..64).map(|place| (place * 37 + 5) % 270).collect();
            let difference = largest_difference(&path, &tokens);
            assert!(difference < 1e-4, "{name}: {difference}");
        }
    });
}

#[test]
fn smollm2_agrees_over_64_tokens() {
    let Some(path) = std::env::var_os("LORAD_SMOLLM2") else {
        eprintln!("skipped: LORAD_SMOLLM2 does not name SmolLM2's GGUF file");
        return;
    };
    with_dequantized_weights("smollm2_agrees_over_64_tokens", || {
        let tokens: Vec<u32> = (0..64u32).map(|place| (place * 7919 + 31) % 49152).collect();
        let difference = largest_difference(Path::new(&path), &tokens);
        eprintln!("largest difference {difference:e}");
        assert!(difference < 1e-3, "{difference}");
    });
}
