//! What the engine's integration tests share: a tiny model, a LoRA that is not zero, rows that are not text.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "each test binary uses its part")]

use candle_core::Tensor;
use lorad_engine::adapter::{LoraLayout, LoraParams};
use lorad_engine::data::{Dataset, Format, Report, Row, Rows};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::spec::{LoraOptions, LoraSpec, Target, TrainOptions, TrainSpec};
use lorad_engine::testing::TinyModel;
use rand::{Rng, SeedableRng};

/// The model's file and the model; the file is mapped, so its name may go.
pub(crate) fn tiny(model: &TinyModel) -> (GgufFile, Llama) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    model.write(&path).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let model = Llama::load(&file).unwrap();
    (file, model)
}

/// A LoRA of that rank on those projections.
pub(crate) fn lora_spec(rank: u32, targets: &[Target]) -> LoraSpec {
    let target_modules = Some(targets.iter().map(|target| target.name().to_owned()).collect());
    let lora = LoraOptions { r: Some(rank), target_modules, ..LoraOptions::default() };
    TrainSpec::resolve(&TrainOptions { lora, ..TrainOptions::default() }).unwrap().lora
}

/// A LoRA whose A and B are both random.
pub(crate) fn random_lora(spec: &LoraSpec, model: &TinyModel) -> LoraParams {
    let layout = LoraLayout::new(spec, &tiny(model).1.config().shape);
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let values: Vec<f32> = (0..layout.len()).map(|_| random.random_range(-0.2..0.2)).collect();
    let length = values.len();
    LoraParams::new(layout, Tensor::from_vec(values, length, &candle_core::Device::Cpu).unwrap()).unwrap()
}

/// Rows of odd lengths, prompt first, that the tiny model's vocabulary has.
pub(crate) fn rows(count: usize) -> Vec<Row> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(9);
    (0..count)
        .map(|index| {
            let length = 5 + (index * 13) % 41;
            let tokens = (0..length).map(|_| random.random_range(3..270)).collect();
            Row { tokens, trained: (0..length).map(|t| t > length / 3).collect() }
        })
        .collect()
}

/// Those rows as a data set.
pub(crate) fn dataset(count: usize) -> Dataset {
    kept(&rows(count))
}

/// Rows as a data set.
pub(crate) fn kept(rows: &[Row]) -> Dataset {
    let report = Report { format: Some(Format::Chat), ..Report::default() };
    Dataset { rows: Rows::from_memory(rows).unwrap(), report }
}
