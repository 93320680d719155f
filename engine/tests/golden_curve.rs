//! Training agrees with PyTorch and PEFT: the run that scripts/golden/peft_curve.py made, reproduced step by step.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lorad_engine::adapter::{LoraLayout, LoraParams, peft_spec};
use lorad_engine::data::{Dataset, Format, Report, Row, Rows};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::ops::matmul::Compute;
use lorad_engine::spec::{ComputeType, LoraOptions, TrainOptions, TrainSpec, TrainingOptions};
use lorad_engine::testing::TinyModel;
use lorad_engine::train::{Outcome, Start, StepMetrics, TrainEvent, train};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    recipe: Recipe,
    rows: Vec<GoldenRow>,
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
    learning_rate: Vec<f64>,
    token_accuracy: Vec<f64>,
}

#[derive(Deserialize)]
struct Recipe {
    max_steps: u32,
    micro_batch_size: u32,
    gradient_accumulation_steps: u32,
    learning_rate: f64,
    warmup_steps: u32,
    weight_decay: f64,
    max_grad_norm: f64,
}

#[derive(Deserialize)]
struct GoldenRow {
    tokens: Vec<u32>,
    trained: Vec<bool>,
}

fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_curve")
}

fn spec(recipe: &Recipe, compute: ComputeType) -> TrainSpec {
    let lora = peft_spec(&golden_folder().join("start")).unwrap();
    let options = TrainOptions {
        lora: LoraOptions {
            r: Some(lora.r),
            alpha: Some(lora.alpha),
            dropout: None,
            use_rslora: Some(lora.use_rslora),
            target_modules: Some(lora.target_modules.iter().map(|target| target.name().to_owned()).collect()),
        },
        training: TrainingOptions {
            max_steps: Some(recipe.max_steps),
            micro_batch_size: Some(recipe.micro_batch_size),
            gradient_accumulation_steps: Some(recipe.gradient_accumulation_steps),
            learning_rate: Some(recipe.learning_rate),
            warmup_steps: Some(recipe.warmup_steps),
            weight_decay: Some(recipe.weight_decay),
            max_grad_norm: Some(recipe.max_grad_norm),
            shuffle: Some(false),
            compute: Some(compute),
            ..TrainingOptions::default()
        },
        ..TrainOptions::default()
    };
    TrainSpec::resolve(&options).unwrap()
}

fn values(folder: &Path, model: &Llama) -> Vec<f32> {
    let lora = LoraParams::zeros(LoraLayout::new(&peft_spec(folder).unwrap(), &model.config().shape)).unwrap();
    lora.load_peft(folder).unwrap();
    lora.flat().to_vec1().unwrap()
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

/// The run of the recipe in that type, its steps, and the model.
fn run(golden: &Golden, compute: ComputeType) -> (Outcome, Vec<StepMetrics>, Llama) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::default().write(&path).unwrap();
    let model = Llama::load(&GgufFile::open(&path).unwrap()).unwrap();
    let rows: Vec<Row> =
        golden.rows.iter().map(|row| Row { tokens: row.tokens.clone(), trained: row.trained.clone() }).collect();
    let dataset = Dataset {
        rows: Rows::from_memory(&rows).unwrap(),
        report: Report { format: Some(Format::Chat), ..Report::default() },
    };
    let start = Start { init_from: Some(golden_folder().join("start")), ..Start::default() };
    let mut steps = Vec::new();
    let outcome = train(&spec(&golden.recipe, compute), &model, &dataset, start, &mut |event| {
        if let TrainEvent::Step(metrics) = event {
            steps.push(metrics);
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    (outcome, steps, model)
}

fn golden() -> Golden {
    let json = std::fs::read_to_string(golden_folder().join("curve.json")).unwrap();
    serde_json::from_str(&json).unwrap()
}

#[test]
fn thirty_steps_in_bf16_follow_those_in_f32() {
    let golden = golden();
    if Compute::bf16().is_none() {
        eprintln!("SKIPPED: this processor has no products of bf16");
        return;
    }
    let (_, steps, _) = run(&golden, ComputeType::Bf16);
    assert_eq!(steps.len(), golden.loss.len());
    for (step, theirs) in steps.iter().zip(&golden.loss) {
        assert!((step.loss - theirs).abs() <= 1e-2 * theirs, "step {}: {} not {theirs}", step.step, step.loss);
    }
    // Not by accident the f32 run again.
    assert!(steps.iter().zip(&golden.loss).any(|(step, theirs)| (step.loss - theirs).abs() > 1e-5));
}

#[test]
fn thirty_steps_follow_pytorch_and_peft() {
    let golden = golden();
    let (outcome, steps, model) = run(&golden, ComputeType::F32);
    assert!(outcome.completed);
    assert_eq!(steps.len(), golden.loss.len());
    for (index, step) in steps.iter().enumerate() {
        let close = |ours: f64, theirs: f64, tolerance: f64| (ours - theirs).abs() <= tolerance;
        assert!(
            close(step.loss, golden.loss[index], 1e-3),
            "step {}: {} not {}",
            step.step,
            step.loss,
            golden.loss[index]
        );
        let theirs = golden.grad_norm[index];
        assert!(close(step.grad_norm, theirs, 1e-3 * theirs), "step {}: {} not {theirs}", step.step, step.grad_norm);
        assert!(close(step.learning_rate, golden.learning_rate[index], 1e-12), "step {}", step.step);
        assert!(close(step.token_accuracy, golden.token_accuracy[index], 0.01), "step {}", step.step);
    }
    let ours: Vec<f32> = outcome.lora.flat().to_vec1().unwrap();
    let theirs = values(&golden_folder().join("final"), &model);
    let difference = norm(ours.iter().zip(&theirs).map(|(a, b)| a - b));
    let scale = norm(theirs.iter().copied());
    assert!(difference <= 1e-3 * scale, "weights are off by {difference:e} of {scale:e}");
    // Not trivially: the run moved them.
    let begun = values(&golden_folder().join("start"), &model);
    assert!(norm(theirs.iter().zip(&begun).map(|(a, b)| a - b)) > 0.1 * scale);
}
