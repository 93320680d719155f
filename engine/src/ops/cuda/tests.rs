//! A whole step on a GPU against the CPU's, in f32 and bf16, and what must not change a bit of it.

use std::sync::Arc;

use super::testing::{assert_near, gpu};
use super::trainer::{HostMoments, Setup, Trainer};
use crate::adapter::{LoraLayout, LoraParams};
use crate::data::{MicroBatch, NO_LABEL};
use crate::gguf::GgufFile;
use crate::model::{Llama, MicroStep};
use crate::ops::adamw::{self, Update};
use crate::ops::adamw_8bit::{self, Moments as EightBitMoments};
use crate::ops::dropout::Dropout;
use crate::ops::matmul::Compute;
use crate::ops::{host, host_mut};
use crate::quant::BlockType;
use crate::spec::{LoraSpec, Optimizer, Target, TrainSpec};
use crate::testing::{TinyModel, normal};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn model(tiny: &TinyModel) -> Llama {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    tiny.write(&path).unwrap();
    Llama::load(&GgufFile::open(&path).unwrap()).unwrap()
}

/// Random rows of those lengths; every third token has no label.
fn batch(model: &Llama, lengths: &[usize]) -> MicroBatch {
    let vocabulary = model.config().shape.vocabulary as u32;
    let mut batch = MicroBatch { cu_seqlens: vec![0], ..MicroBatch::default() };
    for &length in lengths {
        for place in 0..length {
            let token = (batch.tokens.len() as u32 * 7919 + 13) % vocabulary;
            batch.tokens.push(token);
            batch.positions.push(place as u32);
            let trained = place + 1 < length && place % 3 != 1;
            batch.labels.push(if trained { ((token * 31 + 7) % vocabulary) as i32 } else { NO_LABEL });
        }
        batch.cu_seqlens.push(batch.tokens.len());
    }
    batch
}

fn lora(model: &Llama, rank: u32, targets: &[Target]) -> LoraParams {
    let spec = LoraSpec { r: rank, target_modules: targets.to_vec(), ..TrainSpec::default().lora };
    let lora = LoraParams::zeros(LoraLayout::new(&spec, &model.config().shape)).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    host_mut(lora.flat(), |values| {
        values.fill_with(|| 0.05 * normal(&mut random));
        Ok(())
    })
    .unwrap();
    lora
}

fn setup(lora: &LoraParams, compute: Compute, tokens: usize, kept_layers: Option<usize>) -> Setup {
    Setup {
        layout: Arc::clone(lora.layout()),
        compute,
        optimizer: Optimizer::AdamW,
        tokens,
        has_dropout: true,
        kept_layers,
        may_stay_dequantized: false,
        memory_bytes: None,
    }
}

fn trainer(model: &Llama, lora: &LoraParams, setup: &Setup) -> Trainer {
    let mut trainer = Trainer::new(0, model, setup).unwrap();
    trainer.write_parameters(&host(lora.flat()).unwrap()).unwrap();
    trainer
}

fn micro_step(compute: Compute, dropout: Option<Dropout>) -> MicroStep {
    MicroStep { scale: 1.0 / 64.0, kept_layers: 9, dropout, compute }
}

/// Loss sum, labels that were right, gradient.
fn on_gpu(trainer: &mut Trainer, batch: &MicroBatch, step: MicroStep) -> (f64, usize, Vec<f32>) {
    trainer.clear_gradient().unwrap();
    trainer.forward_backward(batch, step).unwrap();
    let loss = trainer.take_loss().unwrap();
    assert_eq!(loss.tokens, batch.trained_tokens());
    let mut gradient = vec![0f32; trainer.parameter_count()];
    trainer.read_gradient(&mut gradient).unwrap();
    (loss.sum, loss.correct, gradient)
}

fn shapes() -> Vec<TinyModel> {
    use BlockType::{BF16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q6K, Q8_0};
    let of = |heads: usize, kv_heads: usize, head_dim: usize, dtypes: &[BlockType]| TinyModel {
        layers: 3,
        hidden: heads * head_dim,
        heads,
        kv_heads,
        intermediate: 256,
        dtypes: dtypes.to_vec(),
        ..TinyModel::default()
    };
    vec![
        of(4, 2, 16, &[Q8_0]),
        of(9, 3, 8, &[F32, F16, BF16]),
        TinyModel { tied: false, intermediate: 344, rope_freqs: true, ..of(4, 1, 64, &[Q4_0, Q5_0, Q4_1]) },
        TinyModel { tied: false, intermediate: 512, ..of(2, 1, 128, &[Q4K, Q6K]) },
    ]
}

/// Says how far each matrix is off where all together are too far.
fn assert_gradient_near(name: &str, layout: &LoraLayout, ours: &[f32], reference: &[f32], tolerance: f64) {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let off = |at: std::ops::Range<usize>| {
        let difference = norm(&mut ours[at.clone()].iter().zip(&reference[at.clone()]).map(|(a, b)| a - b));
        (difference, norm(&mut reference[at].iter().copied()))
    };
    let (difference, scale) = off(0..ours.len());
    if difference > tolerance * scale {
        let parts: Vec<String> = layout
            .tensors()
            .into_iter()
            .map(off)
            .map(|(difference, scale)| format!("{:.1e}/{scale:.1e}", difference))
            .collect();
        panic!("{name}: off by {difference:e} of {scale:e}: {}", parts.join(" "));
    }
}

#[test]
fn a_steps_loss_and_gradient_are_the_cpus() {
    let Some(_) = gpu() else { return };
    for tiny in shapes() {
        let model = model(&tiny);
        for (lengths, rank) in [(&[37, 5, 1, 70][..], 8), (&[1], 16), (&[300], 5)] {
            let batch = batch(&model, lengths);
            let lora = lora(&model, rank, &Target::ALL);
            let expected = LoraParams::zeros(Arc::clone(lora.layout())).unwrap();
            let loss = model.forward_backward(&batch, &lora, &expected, micro_step(Compute::F32, None)).unwrap();
            let expected = host(expected.flat()).unwrap().to_vec();
            for (compute, tolerance) in [(Compute::F32, 2e-5), (Compute::Bf16, 2e-2)] {
                let setup = setup(&lora, compute, batch.tokens.len(), Some(3));
                let mut trainer = trainer(&model, &lora, &setup);
                let (sum, _, gradient) = on_gpu(&mut trainer, &batch, micro_step(compute, None));
                let name = format!("heads of {}, rows {lengths:?}, {compute:?}", tiny.hidden / tiny.heads);
                assert!(
                    (sum - loss.sum).abs() <= tolerance * loss.sum.abs().max(1e-3),
                    "{name}: loss {sum}, not {}",
                    loss.sum
                );
                assert_gradient_near(&name, lora.layout(), &gradient, &expected, tolerance);
                trainer.evaluate(&batch).unwrap();
                assert_eq!(trainer.take_loss().unwrap().sum.to_bits(), sum.to_bits(), "{name}: evaluation");
            }
        }
    }
}

#[test]
fn some_projections_and_dropout_are_the_cpus() {
    let Some(_) = gpu() else { return };
    let model = model(&shapes()[2]);
    let batch = batch(&model, &[30, 11]);
    for targets in
        [&[Target::QProj, Target::VProj][..], &[Target::DownProj], &[Target::UpProj], &[Target::OProj], &Target::ALL]
    {
        for dropout in [None, Dropout::new(0.3, &[1, 2])] {
            let lora = lora(&model, 8, targets);
            let expected = LoraParams::zeros(Arc::clone(lora.layout())).unwrap();
            let loss = model.forward_backward(&batch, &lora, &expected, micro_step(Compute::F32, dropout)).unwrap();
            let mut trainer = trainer(&model, &lora, &setup(&lora, Compute::F32, 64, Some(1)));
            let (sum, correct, gradient) = on_gpu(&mut trainer, &batch, micro_step(Compute::F32, dropout));
            let name = format!("{targets:?}, {dropout:?}");
            assert!((sum - loss.sum).abs() <= 1e-5 * loss.sum, "{name}: loss {sum}, not {}", loss.sum);
            assert_eq!(correct, loss.correct, "{name}");
            assert_near(&name, &gradient, &host(expected.flat()).unwrap(), 2e-5);
        }
    }
}

#[test]
fn kept_layers_resident_weights_and_repetition_change_no_bit() {
    let Some(_) = gpu() else { return };
    for tiny in &shapes()[2..] {
        let model = model(tiny);
        let (batch, other) = (batch(&model, &[60, 3]), batch(&model, &[12]));
        let lora = lora(&model, 8, &Target::ALL);
        let mut results = Vec::new();
        for (kept, may_stay_dequantized) in [(0, false), (1, false), (3, false), (3, true)] {
            let setup = Setup { may_stay_dequantized, ..setup(&lora, Compute::Bf16, 80, Some(kept)) };
            let mut trainer = trainer(&model, &lora, &setup);
            assert_eq!(trainer.kept_layers(), kept);
            assert_eq!(trainer.resident_bytes() > 0, may_stay_dequantized);
            for _ in 0..2 {
                results.push(on_gpu(&mut trainer, &batch, micro_step(Compute::Bf16, None)));
                on_gpu(&mut trainer, &other, micro_step(Compute::Bf16, None));
            }
        }
        let bits = |(sum, correct, gradient): &(f64, usize, Vec<f32>)| {
            (sum.to_bits(), *correct, gradient.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
        };
        assert!(results.iter().all(|result| bits(result) == bits(&results[0])));
    }
}

/// Moments of either kind, with room for both.
struct Moments {
    optimizer: Optimizer,
    f32: candle_core::Tensor,
    eight_bit: EightBitMoments,
}

impl Moments {
    fn zeros(optimizer: Optimizer, layout: &LoraLayout) -> Self {
        let f32 = candle_core::Tensor::zeros((2, layout.len()), candle_core::DType::F32, &candle_core::Device::Cpu);
        Self { optimizer, f32: f32.unwrap(), eight_bit: EightBitMoments::zeros(&layout.tensors()) }
    }

    /// Those on the GPU.
    fn of(trainer: &Trainer, optimizer: Optimizer, layout: &LoraLayout) -> Self {
        let mut moments = Self::zeros(optimizer, layout);
        moments.exchange(|moments| trainer.read_moments(moments));
        moments
    }

    fn exchange(&mut self, with: impl FnOnce(HostMoments<'_>) -> crate::Result<()>) {
        match self.optimizer {
            Optimizer::AdamW => host_mut(&self.f32, |values| with(HostMoments::F32(values))).unwrap(),
            Optimizer::AdamW8bit => with(HostMoments::EightBit(&mut self.eight_bit)).unwrap(),
        }
    }

    fn step(&mut self, parameters: &LoraParams, gradient: &LoraParams, update: Update) {
        let (values, gradient) = (parameters.flat(), gradient.flat());
        match self.optimizer {
            Optimizer::AdamW => adamw::step(values, &self.f32, gradient, update),
            Optimizer::AdamW8bit => {
                let tensors = parameters.layout().tensors();
                adamw_8bit::step(values, &tensors, &mut self.eight_bit, gradient, update)
            }
        }
        .unwrap();
    }
}

fn update(step: u32, norm: f64) -> Update {
    Update { step, learning_rate: 1e-3, weight_decay: 0.01, clip_factor: adamw::clip_factor(norm, 1.0) }
}

fn parameters_of(trainer: &Trainer) -> Vec<f32> {
    let mut values = vec![0f32; trainer.parameter_count()];
    trainer.read_parameters(&mut values).unwrap();
    values
}

#[test]
fn steps_of_the_optimizer_follow_the_cpus() {
    let Some(_) = gpu() else { return };
    let model = model(&shapes()[2]);
    let batch = batch(&model, &[40, 20]);
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8bit] {
        let start = lora(&model, 8, &Target::ALL);
        let setup = Setup { optimizer, ..setup(&start, Compute::F32, 64, None) };
        let mut trainer = trainer(&model, &start, &setup);
        let layout = start.layout();
        let (gradient, values) = (LoraParams::zeros(Arc::clone(layout)).unwrap(), start.flat().copy().unwrap());
        let cpu = LoraParams::new(Arc::clone(layout), values).unwrap();
        let mut moments = Moments::zeros(optimizer, layout);
        for step in 1..=5 {
            gradient.clear().unwrap();
            let loss = model.forward_backward(&batch, &cpu, &gradient, micro_step(Compute::F32, None)).unwrap();
            let norm = adamw::norm(gradient.flat()).unwrap();
            let (sum, ..) = on_gpu(&mut trainer, &batch, micro_step(Compute::F32, None));
            let gpu_norm = trainer.gradient_norm().unwrap();
            assert!((gpu_norm - norm).abs() <= 1e-3 * norm && (sum - loss.sum).abs() <= 1e-3 * loss.sum, "step {step}");
            trainer.step(update(step, gpu_norm)).unwrap();
            moments.step(&cpu, &gradient, update(step, norm));
        }
        // Moments rounded to 8 bits may fall to either side.
        let tolerance = if optimizer == Optimizer::AdamW { 1e-4 } else { 3e-3 };
        assert_near(&format!("{optimizer:?}"), &parameters_of(&trainer), &host(cpu.flat()).unwrap(), tolerance);
        let read = Moments::of(&trainer, optimizer, layout);
        match optimizer {
            Optimizer::AdamW => assert_near("moments", &host(&read.f32).unwrap(), &host(&moments.f32).unwrap(), 1e-3),
            Optimizer::AdamW8bit => {
                let has_moved = read.eight_bit.small.iter().any(|&moment| moment != 0.0);
                assert!(read.eight_bit.fit(&layout.tensors()) && has_moved);
            }
        }
    }
}

#[test]
fn moments_that_were_read_go_on_in_another_run_with_the_same_bits() {
    let Some(_) = gpu() else { return };
    let model = model(&shapes()[2]);
    let batch = batch(&model, &[40, 20]);
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8bit] {
        let start = lora(&model, 8, &Target::ALL);
        let layout = start.layout();
        let setup = Setup { optimizer, ..setup(&start, Compute::F32, 64, None) };
        let step = |trainer: &mut Trainer, step| {
            on_gpu(trainer, &batch, micro_step(Compute::F32, None));
            let norm = trainer.gradient_norm().unwrap();
            trainer.step(update(step, norm)).unwrap();
        };
        let mut first = trainer(&model, &start, &setup);
        step(&mut first, 1);
        let mut second = trainer(&model, &start, &setup);
        second.write_parameters(&parameters_of(&first)).unwrap();
        let mut moments = Moments::of(&first, optimizer, layout);
        moments.exchange(|moments| second.write_moments(&moments));
        step(&mut first, 2);
        step(&mut second, 2);
        let bits = |trainer: &Trainer| parameters_of(trainer).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&first), bits(&second), "{optimizer:?}");
        let moments = [&first, &second].map(|trainer| Moments::of(trainer, optimizer, layout));
        let [of_first, of_second] =
            moments.each_ref().map(|moments| (&moments.eight_bit, host(&moments.f32).unwrap().to_vec()));
        assert_eq!(of_first, of_second, "{optimizer:?}");
    }
}
