//! The training loop's hyperparameters.

use serde::{Deserialize, Serialize};

use super::{BASE_LEARNING_RATE, SpecError, TrainOptions, check};

/// How the learning rate falls after warm-up, as Hugging Face defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// In a straight line to 0 at the last step.
    #[default]
    Linear,
    /// Along half a wave of the cosine to 0 at the last step.
    Cosine,
    /// Not at all.
    Constant,
}

/// Which activations a layer keeps for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// As many blocks keep their activations as fit the memory there is.
    #[default]
    Auto,
    /// Everything backward needs is kept.
    None,
    /// Only each block's input is kept; the rest is computed again.
    Full,
}

impl GradientCheckpointing {
    /// How many of so many layers keep their activations; `None` for `auto`: as many as there is room for.
    pub fn kept_layers(self, layers: usize) -> Option<usize> {
        match self {
            Self::Auto => None,
            Self::None => Some(layers),
            Self::Full => Some(0),
        }
    }
}

/// The optimizer over the LoRA parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// AdamW, moments in f32.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW, moments in blocks of 8-bit codes as bitsandbytes keeps them.
    #[serde(rename = "adamw_8bit")]
    AdamW8bit,
}

/// In which type the large products take their operands; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeType {
    /// bf16 on a GPU, and where the processor multiplies it faster than f32 (AMD's with AVX512-BF16); else f32; decided once a run.
    #[default]
    Auto,
    /// As activations and dequantized weights are.
    F32,
    /// Rounded to bf16; an error where the processor has no instructions for it. On a GPU activations are kept in it too.
    Bf16,
}

/// When a run ends before its last step: the validation loss has not fallen for a while.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// Evaluations in a row without a better loss, 1 to 10000, after which the run ends. Default 3.
    #[serde(default = "default_patience")]
    pub patience: u32,
    /// How much lower a loss must be to count as better, 0 to 100 nats. Default 0.
    #[serde(default)]
    pub min_delta: f64,
}

impl Default for EarlyStopping {
    fn default() -> Self {
        Self { patience: default_patience(), min_delta: 0.0 }
    }
}

fn default_patience() -> u32 {
    3
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
    /// Whether the rows of a micro-batch lie end to end instead of being padded to one length.
    pub packing: Option<bool>,
    /// Which activations are kept.
    pub gradient_checkpointing: Option<GradientCheckpointing>,
    /// Type of the operands of products.
    pub compute: Option<ComputeType>,
    /// Steps between evaluations; `None`: one at the end of each epoch, where there is a validation data set.
    pub eval_steps: Option<u32>,
    /// Steps between listed checkpoints; `None`: one at the end of each epoch.
    pub save_steps: Option<u32>,
    /// When to end before the last step.
    pub early_stopping: Option<EarlyStopping>,
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
    /// The rows of a micro-batch lie end to end; else each is padded to the longest of them, which costs time and changes no
    /// result but in the last bits (with dropout, masks are others). Default true.
    #[serde(default = "yes")]
    pub packing: bool,
    /// Which activations are kept. Default auto.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Type of the operands of products. Default auto.
    pub compute: ComputeType,
    /// Steps between evaluations on the validation data set, which it needs; `None`: one at the end of each epoch, where there
    /// is one. The last step is always followed by one.
    pub eval_steps: Option<u32>,
    /// Steps between listed checkpoints; `None`: one at the end of each epoch.
    pub save_steps: Option<u32>,
    /// When to end before the last step; it needs a validation data set, and the result is the LoRA of the best evaluation.
    pub early_stopping: Option<EarlyStopping>,
}

fn yes() -> bool {
    true
}

pub(super) fn resolve(options: &TrainOptions) -> Result<TrainingSpec, SpecError> {
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
        ("training.eval_steps", training.eval_steps, 1),
        ("training.max_seq_length", training.max_seq_length, 2),
    ] {
        if let Some(value) = value {
            check((least..=10_000_000).contains(&value), field, value, &format!("from {least} to 10000000"))?;
        }
    }
    if let Some(EarlyStopping { patience, min_delta }) = training.early_stopping {
        let (patience_ok, delta_ok) = ((1..=10_000).contains(&patience), (0.0..=100.0).contains(&min_delta));
        check(patience_ok, "training.early_stopping.patience", patience, "from 1 to 10000")?;
        check(delta_ok, "training.early_stopping.min_delta", min_delta, "from 0 to 100")?;
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
        packing: training.packing.unwrap_or(true),
        gradient_checkpointing: training.gradient_checkpointing.unwrap_or_default(),
        compute: training.compute.unwrap_or_default(),
        eval_steps: training.eval_steps,
        save_steps: training.save_steps,
        early_stopping: training.early_stopping,
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
