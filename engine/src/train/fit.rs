//! Whether a run fits into memory at all, and the settings nearest to those of the request that do.
//!
//! Where `gradient_checkpointing` is `auto`, what counts is a run whose blocks keep nothing: that is what it comes to where memory is
//! short. Settings are taken back in the order in which they hurt least: first those that change nothing but time
//! (gradient_checkpointing, then micro_batch_size at the same rows a step), then the optimizer's moments, then max_seq_length.

use serde::{Deserialize, Serialize};

use super::estimate::{HostMemory, Length, Need, Work, lengths_of};
use super::moments::Moments;
use super::{estimate, state};
use crate::Result;
use crate::adapter::LoraLayout;
use crate::data::Dataset;
use crate::device::Device;
use crate::model::{Llama, Shape};
use crate::ops::cuda::{self, Setup};
use crate::ops::matmul::Compute;
use crate::spec::{GradientCheckpointing, Optimizer, TrainSpec};

/// Shortest `max_seq_length` that is proposed.
const SHORTEST: u64 = 64;

/// Whether a run fits, and what would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// Least memory of its device (this machine's for the CPU, the GPU's for a GPU) that the run can do with, in bytes, the base model
    /// included.
    pub least_bytes: u64,
    /// Memory of that device that it may have.
    pub memory_bytes: u64,
    /// Whether that is enough.
    pub fits: bool,
    /// What to change so that it fits; empty where it does, `None` where no setting makes it fit.
    pub nearest: Option<Vec<Change>>,
}

/// How much is needed, and which settings would do.
impl std::fmt::Display for Fit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let (least, may_have) = (mib(self.least_bytes), mib(self.memory_bytes));
        write!(f, "the training needs at least {least} MiB of memory and may have {may_have} MiB")?;
        match self.nearest.as_deref() {
            None => write!(f, ": no settings make it fit, take a smaller base model"),
            Some([]) => Ok(()),
            Some(changes) => {
                let changes = changes.iter().map(|change| format!("{} {}", change.field, change.value));
                write!(f, ": it fits with {}", changes.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// A setting, and the value that would fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The API's name of it.
    pub field: String,
    /// Its value in JSON.
    pub value: serde_json::Value,
}

/// Judges a run on that device; `memory_bytes` is what it may have of this machine's memory, all of it where none is given. Of a GPU's it
/// may have all but what the driver takes.
///
/// # Errors
/// Memory figures or rows that cannot be read, a GPU that is not there.
pub fn fit(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    validation: Option<&Dataset>,
    memory_bytes: Option<u64>,
    device: Device,
) -> Result<Fit> {
    let may_have = match estimate::gpu_bytes(device)? {
        Some((usable, _)) => usable,
        None => memory_bytes.map_or_else(|| HostMemory::now().map(|host| host.total_bytes), Ok)?,
    };
    fit_within(spec, model, (dataset, validation), may_have, device)
}

/// Judges a run on a GPU by the memory that is free there now, what other programs use of it taken off: for a run that found too little.
///
/// # Errors
/// As [`fit`].
pub fn fit_now(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    validation: Option<&Dataset>,
    ordinal: usize,
) -> Result<Fit> {
    fit_within(spec, model, (dataset, validation), cuda::free_bytes(ordinal)?, Device::Cuda(ordinal))
}

fn fit_within(
    spec: &TrainSpec,
    model: &Llama,
    (dataset, validation): (&Dataset, Option<&Dataset>),
    memory_bytes: u64,
    device: Device,
) -> Result<Fit> {
    let host = HostMemory::now()?;
    let compute = state::compute(spec.training.compute, device)?;
    if device != Device::Cpu {
        cuda::check(&model.config().shape)?;
    }
    let rows = Rows {
        shape: &model.config().shape,
        training: lengths_of(dataset)?,
        validation: validation.map(lengths_of).transpose()?,
        fixed_bytes: host.anonymous_bytes + host.file_bytes + model.file_bytes(),
        on_gpu: (device != Device::Cpu).then_some((model, compute)),
    };
    let max_seq_length = spec.max_seq_length(model.config().context_length)? as u64;
    Ok(rows.judge(spec, max_seq_length, memory_bytes))
}

/// What is left of `memory_bytes` for a training's own state and activations, beside what this process holds and the model.
///
/// # Errors
/// Memory figures that cannot be read.
pub fn left_of(memory_bytes: u64, model: &Llama) -> Result<u64> {
    let host = HostMemory::now()?;
    Ok(memory_bytes.saturating_sub(host.anonymous_bytes + host.file_bytes + model.file_bytes()))
}

/// What does not change with the settings.
struct Rows<'a> {
    shape: &'a Shape,
    training: Vec<Length>,
    validation: Option<Vec<Length>>,
    /// What the process holds before it trains, and the base model.
    fixed_bytes: u64,
    /// The model, and in which type a GPU computes, where one does.
    on_gpu: Option<(&'a Llama, Compute)>,
}

impl Rows<'_> {
    fn judge(&self, spec: &TrainSpec, max_seq_length: u64, memory_bytes: u64) -> Fit {
        let least_bytes = self.least(spec, max_seq_length);
        let fits = least_bytes <= memory_bytes;
        let nearest = if fits { Some(Vec::new()) } else { self.nearest(spec, max_seq_length, memory_bytes) };
        Fit { least_bytes, memory_bytes, fits, nearest }
    }

    /// Least bytes that a run can do with whose rows are cut at `max_seq_length`.
    fn least(&self, spec: &TrainSpec, max_seq_length: u64) -> u64 {
        let cut = |rows: &[Length]| rows.iter().map(|row| row.cut_at(max_seq_length)).collect::<Vec<_>>();
        let (training, validation) = (cut(&self.training), self.validation.as_deref().map(cut));
        let work = Work::of_rows(spec, &training, validation.as_deref());
        let layout = LoraLayout::new(&spec.lora, self.shape);
        if let Some((model, compute)) = self.on_gpu {
            let setup =
                Setup { tokens: work.largest_micro_batch() as usize, ..Setup::of(spec, &layout, compute, None) };
            let kept_layers = spec.training.gradient_checkpointing.kept_layers(self.shape.layers);
            return cuda::peak_bytes(model, &setup, kept_layers.unwrap_or(0));
        }
        let need = Need::of(spec, self.shape, &work, &layout);
        let state = need.state(Moments::size_bytes(spec.training.optimizer, &layout));
        self.fixed_bytes + state + need.activations(need.kept_layers(0))
    }

    fn nearest(&self, asked: &TrainSpec, asked_length: u64, memory_bytes: u64) -> Option<Vec<Change>> {
        let (mut spec, mut length) = (asked.clone(), asked_length);
        loop {
            let training = &mut spec.training;
            if training.gradient_checkpointing == GradientCheckpointing::None {
                training.gradient_checkpointing = GradientCheckpointing::Full;
            } else if training.micro_batch_size > 1 {
                training.micro_batch_size /= 2;
            } else if training.optimizer == Optimizer::AdamW {
                training.optimizer = Optimizer::AdamW8bit;
            } else if length / 2 >= SHORTEST {
                length /= 2;
            } else {
                return None;
            }
            if self.least(&spec, length) <= memory_bytes {
                return Some(changes((asked, asked_length), (&spec, length)));
            }
        }
    }
}

fn changes((asked, asked_length): (&TrainSpec, u64), (spec, length): (&TrainSpec, u64)) -> Vec<Change> {
    let (before, after) = (&asked.training, &spec.training);
    let mut changes = Vec::new();
    let mut change = |field: &str, value: serde_json::Value, changed: bool| {
        if changed {
            changes.push(Change { field: format!("training.{field}"), value });
        }
    };
    change(
        "gradient_checkpointing",
        serde_json::to_value(after.gradient_checkpointing).unwrap_or_default(),
        after.gradient_checkpointing != before.gradient_checkpointing,
    );
    let smaller = after.micro_batch_size != before.micro_batch_size;
    change("micro_batch_size", after.micro_batch_size.into(), smaller);
    change("gradient_accumulation_steps", after.batch_size.div_ceil(after.micro_batch_size).into(), smaller);
    change("optimizer", serde_json::to_value(after.optimizer).unwrap_or_default(), after.optimizer != before.optimizer);
    change("max_seq_length", length.into(), length != asked_length);
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(shape: &Shape) -> Rows<'_> {
        let long = Length { tokens: 500, trained: 400 };
        Rows { shape, training: vec![long; 20], validation: None, fixed_bytes: 1 << 20, on_gpu: None }
    }

    fn fields(fit: &Fit) -> Vec<(&str, String)> {
        let nearest = fit.nearest.as_ref().expect("settings that fit");
        nearest.iter().map(|change| (change.field.as_str(), change.value.to_string())).collect()
    }

    #[test]
    fn what_hurts_least_is_changed_first_and_what_is_proposed_fits() {
        let shape = Shape::tiny();
        let rows = rows(&shape);
        let mut spec = TrainSpec::default();
        spec.training.gradient_checkpointing = GradientCheckpointing::None;
        spec.training.micro_batch_size = 4;
        let asked = rows.judge(&spec, 512, u64::MAX);
        assert!(asked.fits && asked.nearest == Some(Vec::new()), "{asked:?}");
        assert!(rows.judge(&spec, 512, asked.least_bytes).fits);

        let a_little_less = rows.judge(&spec, 512, asked.least_bytes - 1);
        assert!(!a_little_less.fits);
        assert_eq!(fields(&a_little_less), [("training.gradient_checkpointing", "\"full\"".to_owned())]);

        spec.training.gradient_checkpointing = GradientCheckpointing::Auto;
        let auto = rows.judge(&spec, 512, u64::MAX);
        assert!(auto.least_bytes < asked.least_bytes);
        let less = rows.judge(&spec, 512, auto.least_bytes - 1);
        let expected = [("micro_batch_size", "2"), ("gradient_accumulation_steps", "4")];
        let expected = expected.map(|(field, value)| (format!("training.{field}"), value.to_owned()));
        let got: Vec<_> = fields(&less).into_iter().map(|(field, value)| (field.to_owned(), value)).collect();
        assert_eq!(got, expected);
        spec.training.micro_batch_size = 2;
        assert!(rows.judge(&spec, 512, auto.least_bytes - 1).fits);
    }

    #[test]
    fn a_model_that_is_too_large_for_the_machine_has_no_settings_that_fit() {
        let shape = Shape::tiny();
        let rows = rows(&shape);
        let fit = rows.judge(&TrainSpec::default(), 512, 1 << 20);
        assert!(!fit.fits && fit.nearest.is_none(), "{fit:?}");
        let shorter = rows.judge(&TrainSpec::default(), 512, rows.least(&TrainSpec::default(), 64));
        assert!(shorter.nearest.is_some_and(|changes| !changes.is_empty()));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn of_a_gpus_memory_only_what_the_card_holds_counts() {
        use crate::gguf::GgufFile;
        use crate::testing::TinyModel;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        TinyModel::default().write(&path).unwrap();
        let model = Llama::load(&GgufFile::open(&path).unwrap()).unwrap();
        let rows = Rows { on_gpu: Some((&model, Compute::Bf16)), ..rows(&model.config().shape) };
        let mut spec = TrainSpec::default();
        spec.training.gradient_checkpointing = GradientCheckpointing::None;
        spec.training.micro_batch_size = 8;
        // Moments of small tensors stay in 32 bits.
        spec.lora.r = 256;
        let asked = rows.judge(&spec, 512, u64::MAX);
        assert!(asked.fits && asked.least_bytes > rows.fixed_bytes + model.file_bytes());
        let mut told = Vec::new();
        let mut memory_bytes = asked.least_bytes - 1;
        while let Some(changes) = rows.judge(&spec, 512, memory_bytes).nearest {
            told.push(changes.last().expect("a change").field.clone());
            memory_bytes -= 64 << 10;
        }
        let order = ["gradient_checkpointing", "gradient_accumulation_steps", "optimizer", "max_seq_length"];
        told.dedup();
        assert_eq!(told, order.map(|field| format!("training.{field}")));
    }
}
