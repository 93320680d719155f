//! Every hyperparameter of a run, with its unit, range and default.
//!
//! [`TrainOptions`] is what a caller said (`None` where it said nothing); [`TrainSpec::resolve`] turns it into what will be
//! done, or names the first field that is wrong. The HTTP API and the command line both go through it, so that defaults and
//! ranges have one home.

mod dataset;
mod lora;
mod training;

use serde::{Deserialize, Serialize};

pub use dataset::{Columns, DatasetFormat, DatasetOptions, DatasetSpec, Template, TrainOn};
pub use lora::{LoraOptions, LoraSpec, Target};
pub use training::{
    ComputeType, EarlyStopping, GradientCheckpointing, LrScheduler, Optimizer, TrainingOptions, TrainingSpec,
};

/// A hyperparameter that cannot be used: which one, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SpecError {
    /// Path of the field as the HTTP API spells it, `lora.r` for one.
    pub field: &'static str,
    /// Names the field and the value, and what would be right.
    pub message: String,
}

/// Everything a caller may say about a run. OpenAI's three hyperparameters stand beside lorad's own names for the same things.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainOptions {
    /// Seed of LoRA initialisation and shuffling.
    pub seed: Option<u64>,
    /// Passes over the data set.
    pub n_epochs: Option<u32>,
    /// Rows a step (OpenAI's name for micro_batch_size × gradient_accumulation_steps).
    pub batch_size: Option<u32>,
    /// Factor on the default learning rate (OpenAI's way to say learning_rate).
    pub learning_rate_multiplier: Option<f64>,
    /// The LoRA.
    pub lora: LoraOptions,
    /// The training loop.
    pub training: TrainingOptions,
    /// The data set.
    pub dataset: DatasetOptions,
}

/// A run, resolved: every field has its value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Seed of LoRA initialisation and shuffling. Default 3407.
    pub seed: u64,
    /// Passes over the data set, 1 to 1000. Default 3. Unused where `training.max_steps` is given.
    pub n_epochs: u32,
    /// The LoRA.
    pub lora: LoraSpec,
    /// The training loop.
    pub training: TrainingSpec,
    /// The data set.
    pub dataset: DatasetSpec,
}

/// Learning rate that `learning_rate_multiplier` 1 stands for.
pub const BASE_LEARNING_RATE: f64 = 2e-4;
/// Seed of a run that names none.
pub const DEFAULT_SEED: u64 = 3407;
/// `max_seq_length` of a run that names none (less where the model's context is shorter).
pub const DEFAULT_MAX_SEQ_LENGTH: u32 = 2048;

impl Default for TrainSpec {
    fn default() -> Self {
        Self::resolve(&TrainOptions::default()).expect("the defaults are in range")
    }
}

impl TrainSpec {
    /// Fills in the defaults and checks every range.
    ///
    /// # Errors
    /// The first field that is out of range, or said twice with different values.
    pub fn resolve(options: &TrainOptions) -> Result<Self, SpecError> {
        let n_epochs = options.n_epochs.unwrap_or(3);
        check((1..=1000).contains(&n_epochs), "n_epochs", n_epochs, "from 1 to 1000")?;
        Ok(Self {
            seed: options.seed.unwrap_or(DEFAULT_SEED),
            n_epochs,
            lora: lora::resolve(&options.lora)?,
            training: training::resolve(options)?,
            dataset: dataset::resolve(&options.dataset)?,
        })
    }

    /// The row length that holds for a model with that context length.
    ///
    /// # Errors
    /// `training.max_seq_length` above the model's context length.
    pub fn max_seq_length(&self, context_length: usize) -> Result<usize, SpecError> {
        let Some(length) = self.training.max_seq_length else {
            return Ok(context_length.min(DEFAULT_MAX_SEQ_LENGTH as usize));
        };
        let right = format!("at most the model's context length {context_length}");
        check(length as usize <= context_length, "training.max_seq_length", length, &right)?;
        Ok(length as usize)
    }
}

fn check(ok: bool, field: &'static str, value: impl std::fmt::Display, right: &str) -> Result<(), SpecError> {
    if ok { Ok(()) } else { Err(out_of_range(field, value, right)) }
}

fn out_of_range(field: &'static str, value: impl std::fmt::Display, right: &str) -> SpecError {
    SpecError { field, message: format!("{field} must be {right}, got `{value}`") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(change: impl FnOnce(&mut TrainOptions)) -> SpecError {
        let mut options = TrainOptions::default();
        change(&mut options);
        TrainSpec::resolve(&options).expect_err("out of range")
    }

    #[test]
    fn defaults_are_those_of_the_tutorial() {
        let spec = TrainSpec::default();
        assert_eq!((spec.seed, spec.n_epochs), (3407, 3));
        assert_eq!((spec.lora.r, spec.lora.alpha, spec.lora.target_modules.len()), (16, 16.0, 7));
        assert_eq!((spec.training.batch_size, spec.training.micro_batch_size), (8, 2));
        assert_eq!((spec.training.learning_rate, spec.training.warmup_steps), (2e-4, 5));
    }

    #[test]
    fn out_of_range_values_name_the_field_and_the_value() {
        let cases = [
            (error(|o| o.lora.r = Some(0)), "lora.r must be from 1 to 1024, got `0`"),
            (error(|o| o.training.learning_rate = Some(-1.0)), "training.learning_rate must be in (0, 1], got `-1`"),
            (
                error(|o| o.training.learning_rate = Some(f64::NAN)),
                "training.learning_rate must be in (0, 1], got `NaN`",
            ),
            (error(|o| o.lora.dropout = Some(1.0)), "lora.dropout must be in [0, 1), got `1`"),
            (
                error(|o| o.training.early_stopping = Some(EarlyStopping { patience: 0, min_delta: 0.0 })),
                "training.early_stopping.patience must be from 1 to 10000, got `0`",
            ),
            (error(|o| o.training.eval_steps = Some(0)), "training.eval_steps must be from 1 to 10000000, got `0`"),
            (error(|o| o.lora.alpha = Some(f64::INFINITY)), "lora.alpha must be from 0.001 to 100000, got `inf`"),
            (
                error(|o| o.lora.target_modules = Some(vec!["lm_head".into()])),
                "lora.target_modules must be some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, got `lm_head`",
            ),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn the_same_thing_said_twice_must_agree() {
        let mut options = TrainOptions { batch_size: Some(6), ..TrainOptions::default() };
        let training = TrainSpec::resolve(&options).expect("6 rows in micro-batches of 2").training;
        assert_eq!((training.batch_size, training.micro_batch_size), (6, 2));
        options.training.gradient_accumulation_steps = Some(4);
        assert_eq!(TrainSpec::resolve(&options).expect_err("8 is not 6").field, "batch_size");
        options.batch_size = Some(8);
        assert!(TrainSpec::resolve(&options).is_ok());
        let twice = error(|o| {
            o.learning_rate_multiplier = Some(2.0);
            o.training.learning_rate = Some(2e-4);
        });
        assert_eq!(twice.field, "learning_rate_multiplier");
    }

    #[test]
    fn a_lora_to_start_with_gives_what_was_not_said_and_must_agree_with_the_rest() {
        let names = ["v_proj", "q_proj"].map(str::to_owned).to_vec();
        let mut of_adapter = LoraOptions { r: Some(4), alpha: Some(8.0), ..LoraOptions::default() };
        of_adapter.target_modules = Some(names.clone());
        let options = TrainOptions { lora: of_adapter, ..TrainOptions::default() };
        let adapter = TrainSpec::resolve(&options).expect("in range").lora;
        let dropout = Some(0.1);
        let mut said = LoraOptions { r: Some(4), target_modules: Some(names), dropout, ..LoraOptions::default() };
        said.inherit(&adapter).expect("it agrees");
        let options = TrainOptions { lora: said, ..TrainOptions::default() };
        assert_eq!(TrainSpec::resolve(&options).expect("in range").lora, LoraSpec { dropout: 0.1, ..adapter.clone() });
        let refused = |mut said: LoraOptions| said.inherit(&adapter).expect_err("it does not agree");
        assert_eq!(
            refused(LoraOptions { r: Some(8), ..LoraOptions::default() }).to_string(),
            "lora.r must be 4, as the adapter that lora.init_from names has it, or absent, got `8`"
        );
        assert_eq!(refused(LoraOptions { alpha: Some(9.0), ..LoraOptions::default() }).field, "lora.alpha");
        let target_modules = Some(vec!["q_proj".to_owned()]);
        assert_eq!(refused(LoraOptions { target_modules, ..LoraOptions::default() }).field, "lora.target_modules");
    }

    #[test]
    fn max_seq_length_may_not_exceed_the_model() {
        let mut spec = TrainSpec::default();
        assert_eq!(spec.max_seq_length(512), Ok(512));
        assert_eq!(spec.max_seq_length(8192), Ok(2048));
        spec.training.max_seq_length = Some(1024);
        assert_eq!(
            spec.max_seq_length(512).expect_err("above the model").to_string(),
            "training.max_seq_length must be at most the model's context length 512, got `1024`"
        );
    }
}
