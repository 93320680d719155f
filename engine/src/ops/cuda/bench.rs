//! `lorad bench train`: whole micro-steps on random weights, and where their time goes.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::gemm::{Product, WORKSPACE_BYTES};
use super::random;
use super::sizes::Sizes;
use super::trainer::{Setup, Trainer};
use super::{Buffer, Dtype, Gpu};
use crate::adapter::{LoraLayout, LoraParams};
use crate::bench::BenchSpec;
use crate::data::MicroBatch;
use crate::device::{Device, cuda_device};
use crate::model::{MicroStep, Shape};
use crate::ops::adamw::{Update, clip_factor};
use crate::ops::host;
use crate::ops::matmul::Compute;
use crate::spec::{GradientCheckpointing, LoraSpec, Optimizer, Target, TrainSpec};
use crate::testing::normal;
use crate::{Error, Result};

/// Micro-steps before the first that is timed.
const WARM_UP: usize = 3;
/// Micro-steps of an optimizer step.
const ACCUMULATION: usize = 4;
/// Rows and columns of the product that gives the card's matrix rate, and how often it runs.
const RATE_SIZE: usize = 8192;
const RATE_RUNS: usize = 10;

/// Times micro-steps; one JSON object.
pub(crate) fn bench_train(spec: &BenchSpec) -> Result<Value> {
    let gpu = take(spec.device)?;
    let rates = Rates::measure(&gpu)?;
    let model = random::model(&gpu, spec)?;
    let shape = model.config.shape.clone();
    let tokens = spec.micro_batch_size as usize * spec.max_seq_length as usize;
    let setup = setup(spec, &shape, tokens);
    let model_bytes = gpu.allocated_bytes() - WORKSPACE_BYTES;
    let kept_layers = Trainer::choose_beside(&gpu, &model, &setup)?;
    let dequantizes_head = model.lm_head().as_mat(Dtype::Bf16).is_none();
    let mut trainer = Trainer::with_model(Rc::clone(&gpu), model, &setup, kept_layers)?;
    let estimated =
        WORKSPACE_BYTES + setup.bytes(&Sizes::new(&shape, &setup.layout), model_bytes, dequantizes_head, kept_layers);
    let used_bytes = gpu.used_bytes()?;
    trainer.write_parameters(&host(random_lora(&setup.layout)?.flat())?)?;
    let batch = batch(spec, shape.vocabulary);
    let times = Times::measure(&mut trainer, &gpu, &batch, spec.micro_steps as usize)?;
    let families = profile(&mut trainer, &gpu, &batch)?;
    let bytes = (estimated + trainer.resident_bytes(), used_bytes);
    Ok(report(spec, &shape, &trainer, &batch, (&rates, bytes), &times, families))
}

/// The GPU that is named.
pub(super) fn take(device: Device) -> Result<Rc<Gpu>> {
    match device {
        Device::Cuda(ordinal) => Gpu::new(ordinal),
        Device::Cpu => Err(Error::Device("this times a GPU, got `cpu`".to_owned())),
    }
}

fn setup(spec: &BenchSpec, shape: &Shape, tokens: usize) -> Setup {
    let lora = LoraSpec { r: spec.rank, target_modules: Target::ALL.to_vec(), ..TrainSpec::default().lora };
    Setup {
        layout: LoraLayout::new(&lora, shape),
        compute: Compute::Bf16,
        optimizer: Optimizer::AdamW,
        tokens,
        has_dropout: false,
        kept_layers: spec.gradient_checkpointing.kept_layers(shape.layers),
        may_stay_dequantized: spec.dense_resident || spec.gradient_checkpointing == GradientCheckpointing::Auto,
        memory_bytes: spec.memory_bytes,
    }
}

/// Neither factor of a LoRA is zero: products with zeros run faster than real ones.
fn random_lora(layout: &Arc<LoraLayout>) -> Result<LoraParams> {
    let lora = LoraParams::zeros(Arc::clone(layout))?;
    let mut random = ChaCha8Rng::seed_from_u64(7);
    crate::ops::host_mut(lora.flat(), |values| {
        values.fill_with(|| 0.01 * normal(&mut random));
        Ok(())
    })?;
    Ok(lora)
}

/// Rows of full length; every token but a row's first is a target.
fn batch(spec: &BenchSpec, vocabulary: usize) -> MicroBatch {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let rows: Vec<crate::data::Row> = (0..spec.micro_batch_size)
        .map(|_| crate::data::Row {
            tokens: (0..spec.max_seq_length).map(|_| random.random_range(0..vocabulary as u32)).collect(),
            trained: vec![true; spec.max_seq_length as usize],
        })
        .collect();
    MicroBatch::pack(&rows)
}

/// What the card reaches in this run.
pub(super) struct Rates {
    /// Operations a second of a large bf16 product.
    pub(super) matrix: f64,
    /// Bytes a second of a large copy, read and written.
    pub(super) copy: f64,
}

impl Rates {
    pub(super) fn measure(gpu: &Rc<Gpu>) -> Result<Self> {
        let bytes = RATE_SIZE * RATE_SIZE * 2;
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let unit: Vec<u16> = (0..1 << 20).map(|_| half::bf16::from_f32(normal(&mut random)).to_bits()).collect();
        let [a, b, out] = [0, 1, 2].map(|_| -> Result<Buffer> {
            let buffer = Buffer::new(gpu, bytes)?;
            buffer.write(0, &unit)?;
            buffer.repeat(size_of_val(&unit[..]))?;
            Ok(buffer)
        });
        let (a, b, out) = (a?, b?, out?);
        let square = |buffer| Buffer::mat(buffer, 0, (RATE_SIZE, RATE_SIZE), RATE_SIZE, Dtype::Bf16);
        let product = || gpu.gemm("rate", square(&out), Product::nt(square(&a), square(&b)));
        let product_ms = median_ms(gpu, RATE_RUNS, &product)?;
        let copy_ms = median_ms(gpu, RATE_RUNS, &|| out.copy_from(&a))?;
        Ok(Self {
            matrix: 2.0 * (RATE_SIZE as f64).powi(3) / (product_ms * 1e-3),
            copy: 2.0 * bytes as f64 / (copy_ms * 1e-3),
        })
    }
}

/// Median of the device times of so many runs, after two that warm up.
pub(super) fn median_ms(gpu: &Gpu, runs: usize, run: &dyn Fn() -> Result<()>) -> Result<f64> {
    run()?;
    run()?;
    let mut events = vec![gpu.event()?];
    for _ in 0..runs {
        run()?;
        events.push(gpu.event()?);
    }
    gpu.synchronize()?;
    let times = events.windows(2).map(|pair| Gpu::milliseconds(&pair[0], &pair[1])).collect::<Result<Vec<f64>>>()?;
    Ok(median(times))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// Milliseconds of micro-steps and of the optimizer's steps between them.
struct Times {
    device_ms: Vec<f64>,
    wall_ms: Vec<f64>,
    optimizer_ms: Vec<f64>,
    loss: f64,
}

impl Times {
    fn measure(trainer: &mut Trainer, gpu: &Gpu, batch: &MicroBatch, count: usize) -> Result<Self> {
        let mut times = Self { device_ms: Vec::new(), wall_ms: Vec::new(), optimizer_ms: Vec::new(), loss: 0.0 };
        trainer.clear_gradient()?;
        for number in 0..WARM_UP + count {
            gpu.synchronize()?;
            let (begin, began) = (gpu.event()?, Instant::now());
            trainer.forward_backward(batch, micro_step(batch))?;
            let end = gpu.event()?;
            gpu.synchronize()?;
            if number >= WARM_UP {
                times.device_ms.push(Gpu::milliseconds(&begin, &end)?);
                times.wall_ms.push(began.elapsed().as_secs_f64() * 1e3);
            }
            if (number + 1) % ACCUMULATION == 0 {
                let began = Instant::now();
                times.loss = optimizer_step(trainer, (number / ACCUMULATION) as u32 + 1)?;
                gpu.synchronize()?;
                times.optimizer_ms.push(began.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(times)
    }
}

fn micro_step(batch: &MicroBatch) -> MicroStep {
    let scale = 1.0 / (ACCUMULATION * batch.trained_tokens().max(1)) as f32;
    MicroStep { scale, kept_layers: usize::MAX, dropout: None, compute: Compute::Bf16 }
}

/// As a training's: the mean loss, the clipped gradient, AdamW.
fn optimizer_step(trainer: &mut Trainer, step: u32) -> Result<f64> {
    let loss = trainer.take_loss()?;
    let norm = trainer.gradient_norm()?;
    if !norm.is_finite() || !loss.sum.is_finite() {
        return Err(Error::Training { step, message: format!("loss {}, gradient norm {norm}", loss.sum) });
    }
    trainer.step(Update { step, learning_rate: 1e-5, weight_decay: 0.01, clip_factor: clip_factor(norm, 1.0) })?;
    trainer.clear_gradient()?;
    Ok(loss.sum / loss.tokens.max(1) as f64)
}

/// Milliseconds and launches of each kernel in one micro-step.
fn profile(trainer: &mut Trainer, gpu: &Gpu, batch: &MicroBatch) -> Result<Vec<(&'static str, f64, usize)>> {
    gpu.start_profile();
    trainer.forward_backward(batch, micro_step(batch))?;
    gpu.take_profile()
}

/// What a kernel belongs to.
fn family(label: &str) -> &'static str {
    match label {
        label if label.starts_with("gemm") => "large_products",
        label if label.starts_with("lora") => "lora_products",
        label if label.starts_with("attention") => "attention",
        label if label.starts_with("dequantize") => "dequantization",
        label if label.starts_with("cross_entropy") || label.starts_with("loss") => "loss",
        _ => "elementwise",
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// What the maker calls the GPU.
fn name_of(device: Device) -> Option<String> {
    cuda_device(ordinal(device)?).ok().map(|gpu| gpu.name)
}

/// Operations of the large products of a micro-step: forward and the gradient of each input, and forward once more in the layers that
/// keep nothing.
fn operations(shape: &Shape, tokens: usize, kept_layers: usize) -> f64 {
    let passes = 6.0 - 2.0 * kept_layers as f64 / shape.layers as f64;
    let projections: usize = Target::ALL.iter().map(|&target| shape.projection(target)).map(|(r, c)| r * c).sum();
    passes * (shape.layers * projections + shape.vocabulary * shape.hidden) as f64 * tokens as f64
}

fn report(
    spec: &BenchSpec,
    shape: &Shape,
    trainer: &Trainer,
    batch: &MicroBatch,
    (rates, (estimated_bytes, used_bytes)): (&Rates, (usize, usize)),
    times: &Times,
    kernels: Vec<(&'static str, f64, usize)>,
) -> Value {
    let (device_ms, wall_ms) = (median(times.device_ms.clone()), median(times.wall_ms.clone()));
    let trained = batch.trained_tokens() as f64;
    // An optimizer step is the share of every micro-step that it serves.
    let optimizer_ms = median(times.optimizer_ms.clone());
    let floor_ms = operations(shape, batch.tokens.len(), trainer.kept_layers()) / rates.matrix * 1e3;
    let mut families: BTreeMap<&str, f64> = BTreeMap::new();
    for (label, ms, _) in &kernels {
        *families.entry(family(label)).or_default() += ms;
    }
    let families: Map<String, Value> =
        families.into_iter().map(|(name, ms)| (name.to_owned(), json!(rounded(ms)))).collect();
    let kernel = |(label, ms, count): &(_, f64, _)| json!({ "kernel": label, "ms": rounded(*ms), "launches": count });
    let kernels: Vec<Value> = kernels.iter().map(kernel).collect();
    json!({
        "shape": spec.shape.name(),
        "quantization": spec.quantization.name(),
        "rank": spec.rank,
        "micro_batch_size": spec.micro_batch_size,
        "max_seq_length": spec.max_seq_length,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "device": name_of(spec.device),
        "trained_tokens": trained,
        "tokens_per_second": (trained / device_ms * 1e3).round(),
        "tokens_per_second_wall": (trained / wall_ms * 1e3).round(),
        "tokens_per_second_with_optimizer": (trained / (wall_ms + optimizer_ms / ACCUMULATION as f64) * 1e3).round(),
        "micro_step_ms": rounded(device_ms),
        "micro_step_ms_wall": rounded(wall_ms),
        "micro_step_ms_least": rounded(times.device_ms.iter().copied().fold(f64::INFINITY, f64::min)),
        "micro_step_ms_most": rounded(times.device_ms.iter().copied().fold(0.0, f64::max)),
        "optimizer_step_ms": rounded(optimizer_ms),
        "peak_bytes": trainer.allocated_bytes(),
        "estimated_bytes": estimated_bytes,
        "used_bytes_with_context": used_bytes,
        "peak_gib": rounded(trainer.allocated_bytes() as f64 / f64::from(1 << 30)),
        "kept_layers": trainer.kept_layers(),
        "resident_weight_bytes": trainer.resident_bytes(),
        "matrix_tflops": rounded(rates.matrix / 1e12),
        "copy_gb_per_second": rounded(rates.copy / 1e9),
        "floor_ms": rounded(floor_ms),
        "share_of_floor": rounded(floor_ms / device_ms),
        "loss": rounded(times.loss),
        "family_ms": families,
        "kernels": kernels,
    })
}

fn ordinal(device: Device) -> Option<usize> {
    match device {
        Device::Cuda(ordinal) => Some(ordinal),
        Device::Cpu => None,
    }
}
