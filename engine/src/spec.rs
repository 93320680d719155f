//! Every hyperparameter of a run, with its unit, range and default.
//!
//! [`TrainOptions`] is what a caller said (`None` where it said nothing); [`TrainSpec::resolve`] turns it into what will be
//! done, or names the first field that is wrong. The HTTP API and the command line both go through it, so that defaults and
//! ranges have one home.

use serde::{Deserialize, Serialize};

/// A hyperparameter that cannot be used: which one, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SpecError {
    /// Path of the field as the HTTP API spells it, `lora.r` for one.
    pub field: &'static str,
    /// Names the field and the value, and what would be right.
    pub message: String,
}

/// The seven projections of a Llama block that can carry a LoRA, in the order in which the block uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Query projection of the attention.
    QProj,
    /// Key projection of the attention.
    KProj,
    /// Value projection of the attention.
    VProj,
    /// Output projection of the attention.
    OProj,
    /// Gate projection of the MLP.
    GateProj,
    /// Up projection of the MLP.
    UpProj,
    /// Down projection of the MLP.
    DownProj,
}

impl Target {
    /// All seven, in the block's order.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The Hugging Face name, `q_proj` for one.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The target of that Hugging Face name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// Position in [`Target::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// How a row of the data set is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetFormat {
    /// Found out from the first rows.
    #[default]
    Auto,
    /// `instruction`, optional `input`, `output`.
    Alpaca,
    /// OpenAI's `messages: [{role, content}]`.
    Chat,
}

/// Which prompt text surrounds the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// The model's own chat template; the Alpaca prompt where it has none.
    #[default]
    Auto,
    /// The Alpaca prompt.
    Alpaca,
}

/// Which tokens have a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// The assistant's turns, their end token included.
    #[default]
    Completions,
    /// Every token but the first of a row.
    All,
}

/// How the learning rate falls after warm-up, as Hugging Face defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// In a straight line to 0 at the last step.
    #[default]
    Linear,
}

/// Which activations a layer keeps for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Decided from the memory there is; today the same as `none`.
    #[default]
    Auto,
    /// Everything backward needs is kept.
    None,
    /// Only each block's input is kept; the rest is computed again.
    Full,
}

/// The optimizer over the LoRA parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW, moments in f32.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
}

/// What a caller said about the LoRA.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraOptions {
    /// Rank.
    pub r: Option<u32>,
    /// Numerator of the scale.
    pub alpha: Option<f64>,
    /// Whether the scale is alpha/√r instead of alpha/r.
    pub use_rslora: Option<bool>,
    /// Projections that get a LoRA.
    pub target_modules: Option<Vec<String>>,
}

/// What a caller said about the training loop.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainingOptions {
    /// Optimizer steps, instead of epochs.
    pub max_steps: Option<u32>,
    /// Rows computed at once.
    pub micro_batch_size: Option<u32>,
    /// Micro-batches a step.
    pub gradient_accumulation_steps: Option<u32>,
    /// Peak learning rate.
    pub learning_rate: Option<f64>,
    /// Steps in which the learning rate rises from 0.
    pub warmup_steps: Option<u32>,
    /// Schedule after warm-up.
    pub lr_scheduler: Option<LrScheduler>,
    /// Decoupled weight decay.
    pub weight_decay: Option<f64>,
    /// Optimizer.
    pub optimizer: Option<Optimizer>,
    /// Largest global norm of the gradient.
    pub max_grad_norm: Option<f64>,
    /// Tokens a row may have.
    pub max_seq_length: Option<u32>,
    /// Whether rows are drawn in a new order every epoch.
    pub shuffle: Option<bool>,
    /// Which activations are kept.
    pub gradient_checkpointing: Option<GradientCheckpointing>,
    /// Steps between listed checkpoints; `None`: one at the end of each epoch.
    pub save_steps: Option<u32>,
}

/// What a caller said about the data set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DatasetOptions {
    /// Row layout.
    pub format: Option<DatasetFormat>,
    /// Prompt text.
    pub template: Option<Template>,
    /// Which tokens have a loss.
    pub train_on: Option<TrainOn>,
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

/// LoRA: y = W x + scale · B (A x).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank R, 1 to 1024. Default 16.
    pub r: u32,
    /// Numerator of the scale, 0.001 to 100000. Default 16.
    pub alpha: f64,
    /// Scale alpha/√r instead of alpha/r. Default false.
    pub use_rslora: bool,
    /// Projections with a LoRA, in the block's order. Default all seven.
    pub target_modules: Vec<Target>,
}

impl LoraSpec {
    /// alpha / r, or alpha / √r with rsLoRA.
    pub fn scale(&self) -> f64 {
        let rank = f64::from(self.r);
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// The training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingSpec {
    /// Optimizer steps, at least 1; `None`: as many as `n_epochs` make.
    pub max_steps: Option<u32>,
    /// Rows a step, 1 to 65536. Default 8.
    pub batch_size: u32,
    /// Rows computed at once, 1 to batch_size. Default 2.
    pub micro_batch_size: u32,
    /// Peak learning rate, in (0, 1]. Default 2e-4.
    pub learning_rate: f64,
    /// Steps in which the learning rate rises from 0. Default 5.
    pub warmup_steps: u32,
    /// Schedule after warm-up. Default linear.
    pub lr_scheduler: LrScheduler,
    /// Decoupled weight decay, in [0, 1]. Default 0.01.
    pub weight_decay: f64,
    /// Optimizer. Default AdamW.
    pub optimizer: Optimizer,
    /// Largest global norm of the gradient, 1e-6 to 1e6. Default 1.
    pub max_grad_norm: f64,
    /// Tokens a row may have, 2 to the model's context length; longer rows are cut and counted. Default 2048, or the model's
    /// context length where that is less.
    pub max_seq_length: Option<u32>,
    /// A new row order every epoch. Default true.
    pub shuffle: bool,
    /// Which activations are kept. Default auto.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Steps between listed checkpoints; `None`: one at the end of each epoch.
    pub save_steps: Option<u32>,
}

/// The data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// Row layout. Default auto.
    pub format: DatasetFormat,
    /// Prompt text. Default auto.
    pub template: Template,
    /// Which tokens have a loss. Default completions.
    pub train_on: TrainOn,
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
            lora: resolve_lora(&options.lora)?,
            training: resolve_training(options)?,
            dataset: DatasetSpec {
                format: options.dataset.format.unwrap_or_default(),
                template: options.dataset.template.unwrap_or_default(),
                train_on: options.dataset.train_on.unwrap_or_default(),
            },
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

fn resolve_lora(options: &LoraOptions) -> Result<LoraSpec, SpecError> {
    let r = options.r.unwrap_or(16);
    check((1..=1024).contains(&r), "lora.r", r, "from 1 to 1024")?;
    let alpha = options.alpha.unwrap_or(16.0);
    check((1e-3..=1e5).contains(&alpha), "lora.alpha", alpha, "from 0.001 to 100000")?;
    let target_modules = match &options.target_modules {
        None => Target::ALL.to_vec(),
        Some(names) => resolve_targets(names)?,
    };
    Ok(LoraSpec { r, alpha, use_rslora: options.use_rslora.unwrap_or(false), target_modules })
}

fn resolve_targets(names: &[String]) -> Result<Vec<Target>, SpecError> {
    const FIELD: &str = "lora.target_modules";
    let right = format!("some of {}", Target::ALL.map(Target::name).join(", "));
    check(!names.is_empty(), FIELD, "[]", &right)?;
    let mut targets = Vec::with_capacity(names.len());
    for name in names {
        let Some(target) = Target::from_name(name) else {
            return Err(out_of_range(FIELD, name, &right));
        };
        check(!targets.contains(&target), FIELD, name, "named once")?;
        targets.push(target);
    }
    targets.sort_unstable();
    Ok(targets)
}

fn resolve_training(options: &TrainOptions) -> Result<TrainingSpec, SpecError> {
    let training = &options.training;
    let (batch_size, micro_batch_size) = resolve_batch(options)?;
    let learning_rate = resolve_learning_rate(options)?;
    let weight_decay = training.weight_decay.unwrap_or(0.01);
    check((0.0..=1.0).contains(&weight_decay), "training.weight_decay", weight_decay, "in [0, 1]")?;
    let max_grad_norm = training.max_grad_norm.unwrap_or(1.0);
    let norm_ok = (1e-6..=1e6).contains(&max_grad_norm);
    check(norm_ok, "training.max_grad_norm", max_grad_norm, "from 0.000001 to 1000000")?;
    let warmup_steps = training.warmup_steps.unwrap_or(5);
    check(warmup_steps <= 1_000_000, "training.warmup_steps", warmup_steps, "at most 1000000")?;
    for (field, value, least) in [
        ("training.max_steps", training.max_steps, 1),
        ("training.save_steps", training.save_steps, 1),
        ("training.max_seq_length", training.max_seq_length, 2),
    ] {
        if let Some(value) = value {
            check((least..=10_000_000).contains(&value), field, value, &format!("from {least} to 10000000"))?;
        }
    }
    Ok(TrainingSpec {
        max_steps: training.max_steps,
        batch_size,
        micro_batch_size,
        learning_rate,
        warmup_steps,
        lr_scheduler: training.lr_scheduler.unwrap_or_default(),
        weight_decay,
        optimizer: training.optimizer.unwrap_or_default(),
        max_grad_norm,
        max_seq_length: training.max_seq_length,
        shuffle: training.shuffle.unwrap_or(true),
        gradient_checkpointing: training.gradient_checkpointing.unwrap_or_default(),
        save_steps: training.save_steps,
    })
}

/// Rows a step and rows at once. OpenAI's `batch_size` and the pair of lorad's names are two ways to say the same.
fn resolve_batch(options: &TrainOptions) -> Result<(u32, u32), SpecError> {
    let training = &options.training;
    let accumulation = training.gradient_accumulation_steps;
    if let Some(steps) = accumulation {
        check((1..=65536).contains(&steps), "training.gradient_accumulation_steps", steps, "from 1 to 65536")?;
    }
    let said = training.micro_batch_size;
    if let Some(size) = said {
        check((1..=4096).contains(&size), "training.micro_batch_size", size, "from 1 to 4096")?;
    }
    let batch_size = match options.batch_size {
        Some(batch_size) => {
            check((1..=65536).contains(&batch_size), "batch_size", batch_size, "from 1 to 65536")?;
            if let Some(steps) = accumulation {
                let micro = said.unwrap_or(2);
                let right = format!("micro_batch_size {micro} × gradient_accumulation_steps {steps}");
                check(micro.checked_mul(steps) == Some(batch_size), "batch_size", batch_size, &right)?;
            }
            batch_size
        }
        None => {
            let micro = said.unwrap_or(2);
            let steps = accumulation.unwrap_or(4);
            let rows = micro.saturating_mul(steps);
            let right = "at most 65536 with micro_batch_size";
            check(rows <= 65536, "training.gradient_accumulation_steps", steps, right)?;
            rows
        }
    };
    let micro_batch_size = said.unwrap_or(2).min(batch_size);
    if let Some(size) = said {
        let right = format!("at most batch_size {batch_size}");
        check(size <= batch_size, "training.micro_batch_size", size, &right)?;
    }
    Ok((batch_size, micro_batch_size))
}

fn resolve_learning_rate(options: &TrainOptions) -> Result<f64, SpecError> {
    let said = options.training.learning_rate;
    if let Some(rate) = said {
        check(rate > 0.0 && rate <= 1.0, "training.learning_rate", rate, "in (0, 1]")?;
    }
    let Some(multiplier) = options.learning_rate_multiplier else {
        return Ok(said.unwrap_or(BASE_LEARNING_RATE));
    };
    let rate = multiplier * BASE_LEARNING_RATE;
    let right = format!("in (0, {}]", 1.0 / BASE_LEARNING_RATE);
    check(rate > 0.0 && rate <= 1.0, "learning_rate_multiplier", multiplier, &right)?;
    if let Some(said) = said {
        let right = format!("training.learning_rate {said} over {BASE_LEARNING_RATE}, or absent");
        check((said - rate).abs() <= 1e-9 * said, "learning_rate_multiplier", multiplier, &right)?;
    }
    Ok(rate)
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
