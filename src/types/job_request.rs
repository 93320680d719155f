//! The body of `POST /v1/fine_tuning/jobs` as it comes over the wire, before any of it is believed.

use lorad_engine::spec::{
    BASE_LEARNING_RATE, Columns, ComputeType, DatasetFormat, EarlyStopping, GradientCheckpointing, LrScheduler,
    Optimizer, Target, Template, TrainOn, TrainSpec,
};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;
use utoipa::ToSchema;

use super::artifact::ArtifactRequest;
use super::job::Metadata;
use super::text::text_enum;

text_enum! {
    /// The word that leaves a choice to the server.
    pub enum Auto {
        /// The server chooses.
        Auto = "auto",
    }
}

/// A number, or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AutoOr<T> {
    /// The server chooses.
    Auto(Auto),
    /// The caller chose.
    Value(T),
}

impl<T: Copy> AutoOr<T> {
    /// Left to the server.
    pub const AUTO: Self = Self::Auto(Auto::Auto);

    /// The caller's choice.
    pub fn value(self) -> Option<T> {
        match self {
            Self::Auto(Auto::Auto) => None,
            Self::Value(value) => Some(value),
        }
    }
}

impl<'de, T: de::DeserializeOwned> Deserialize<'de> for AutoOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value == "auto" {
            return Ok(Self::Auto(Auto::Auto));
        }
        let shown = value.to_string();
        let number = serde_json::from_value(value).map(Self::Value);
        number.map_err(|error| de::Error::custom(format!("must be \"auto\" or a number, got `{shown}` ({error})")))
    }
}

/// OpenAI's three hyperparameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HyperparametersRequest {
    /// Passes over the data set; auto is 3.
    pub n_epochs: Option<AutoOr<u32>>,
    /// Examples a step; auto is 8.
    pub batch_size: Option<AutoOr<u32>>,
    /// Factor on the learning rate 2e-4; auto is 1.
    pub learning_rate_multiplier: Option<AutoOr<f64>>,
}

/// The settings of supervised training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SupervisedRequest {
    /// Its hyperparameters.
    pub hyperparameters: Option<HyperparametersRequest>,
}

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodRequest {
    /// `supervised`; OpenAI's other methods are refused by name.
    #[serde(rename = "type")]
    #[schema(example = "supervised")]
    pub kind: String,
    /// The settings of supervised training.
    pub supervised: Option<SupervisedRequest>,
    /// Not supported yet: must be null.
    #[serde(default, skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub dpo: Option<Value>,
    /// Not supported yet: must be null.
    #[serde(default, skip_serializing)]
    #[schema(value_type = Option<Object>)]
    pub reinforcement: Option<Value>,
}

/// The LoRA.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraFields {
    /// Rank, 1 to 1024; default 16.
    #[schema(minimum = 1, maximum = 1024)]
    pub r: Option<u32>,
    /// Numerator of the scale, above 0; default 16.
    #[schema(minimum = 0.001, maximum = 100000)]
    pub alpha: Option<f64>,
    /// Share of the LoRA's input that is dropped in training, in [0, 1); default 0.
    #[schema(minimum = 0, exclusive_maximum = 1)]
    pub dropout: Option<f64>,
    /// Scale alpha/√r instead of alpha/r; default false.
    pub use_rslora: Option<bool>,
    /// Adapter to go on from: id of an adapter artifact, or name of a fine-tuned model. What is not said about the LoRA is taken
    /// from it, what is said must agree with it (dropout excepted).
    pub init_from: Option<String>,
    /// Projections with a LoRA; default all seven.
    pub target_modules: Option<Vec<String>>,
}

/// The training loop.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainingFields {
    /// Type of the operands of products: `f32`, `bf16` (an error where the processor has no instructions for it), or `auto`: bf16
    /// where it is fast, else f32.
    #[schema(value_type = Option<String>, pattern = "^(auto|f32|bf16)$")]
    pub compute: Option<ComputeType>,
    /// Optimizer steps, instead of epochs.
    pub max_steps: Option<u32>,
    /// Examples computed at once; default 2.
    #[schema(minimum = 1, maximum = 4096)]
    pub micro_batch_size: Option<u32>,
    /// Micro-batches a step; default 4.
    #[schema(minimum = 1, maximum = 65536)]
    pub gradient_accumulation_steps: Option<u32>,
    /// Peak learning rate, in (0, 1]; default 2e-4.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub learning_rate: Option<f64>,
    /// Steps in which the learning rate rises from 0; default 5.
    pub warmup_steps: Option<u32>,
    /// Schedule after warm-up: `linear`, `cosine` or `constant`; default linear.
    #[schema(value_type = Option<String>, pattern = "^(linear|cosine|constant)$")]
    pub lr_scheduler: Option<LrScheduler>,
    /// Decoupled weight decay, in [0, 1]; default 0.01.
    #[schema(minimum = 0, maximum = 1)]
    pub weight_decay: Option<f64>,
    /// `adamw`, or `adamw_8bit`, which needs less memory; default adamw.
    #[schema(value_type = Option<String>, pattern = "^(adamw|adamw_8bit)$")]
    pub optimizer: Option<Optimizer>,
    /// Largest global norm of the gradient, above 0; default 1.
    pub max_grad_norm: Option<f64>,
    /// Tokens an example may have; default 2048, or the model's context length where that is less.
    pub max_seq_length: Option<u32>,
    /// A new order of the examples every epoch; default true.
    pub shuffle: Option<bool>,
    /// Whether the examples of a micro-batch lie end to end, not padded to one length; default true.
    pub packing: Option<bool>,
    /// `auto`, `none` or `full`.
    #[schema(value_type = Option<String>, pattern = "^(auto|none|full)$")]
    pub gradient_checkpointing: Option<GradientCheckpointing>,
    /// Steps between evaluations on the validation file, which it needs; null: one at the end of each epoch, where there is one.
    #[schema(minimum = 1, maximum = 10000000)]
    pub eval_steps: Option<u32>,
    /// Steps between listed checkpoints; null: one at the end of each epoch.
    #[schema(minimum = 1, maximum = 10000000)]
    pub save_steps: Option<u32>,
    /// Ends the job before its last step, once the validation loss has not fallen for a while; it needs a validation file, and
    /// the result is the adapter of the best evaluation. Default null: off.
    pub early_stopping: Option<EarlyStoppingFields>,
}

/// When a job ends before its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStoppingFields {
    /// Evaluations in a row without a better loss, 1 to 10000; default 3.
    #[schema(minimum = 1, maximum = 10000)]
    pub patience: Option<u32>,
    /// How much lower a loss must be to count as better, 0 to 100 nats; default 0.
    #[schema(minimum = 0, maximum = 100)]
    pub min_delta: Option<f64>,
}

impl From<EarlyStoppingFields> for EarlyStopping {
    fn from(fields: EarlyStoppingFields) -> Self {
        let default = Self::default();
        Self {
            patience: fields.patience.unwrap_or(default.patience),
            min_delta: fields.min_delta.unwrap_or(default.min_delta),
        }
    }
}

impl From<EarlyStopping> for EarlyStoppingFields {
    fn from(EarlyStopping { patience, min_delta }: EarlyStopping) -> Self {
        Self { patience: Some(patience), min_delta: Some(min_delta) }
    }
}

/// The data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DatasetFields {
    /// `auto`, `alpaca`, `sharegpt`, `chat`, `completion` or `text`.
    #[schema(value_type = Option<String>, pattern = "^(auto|alpaca|sharegpt|chat|completion|text)$")]
    pub format: Option<DatasetFormat>,
    /// The file's names for fields of the format, `{"instruction": "question", "output": "answer"}` for one.
    pub columns: Option<Columns>,
    /// `auto` (the model's own chat template), `alpaca`, or a chat template as Jinja text.
    #[schema(value_type = Option<String>)]
    pub template: Option<Template>,
    /// `completions` or `all`.
    #[schema(value_type = Option<String>, pattern = "^(completions|all)$")]
    pub train_on: Option<TrainOn>,
}

/// A fine-tuning job to be: OpenAI's fields and lorad's. Unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CreateFineTuningJobRequest)]
pub struct JobRequest {
    /// The base model: a catalogue alias, `hf:org/repo/file.gguf`, or `local:path` under the server's models folder.
    #[schema(example = "smollm2-135m-instruct")]
    pub model: String,
    /// Id of an uploaded file with purpose `fine-tune`.
    #[schema(pattern = "^file-[0-9a-f]{32}$")]
    pub training_file: String,
    /// Id of an uploaded file with purpose `fine-tune` whose loss is watched and never trained on.
    #[schema(pattern = "^file-[0-9a-f]{32}$")]
    pub validation_file: Option<String>,
    /// Becomes part of the model's name: 1 to 64 letters, digits, `.`, `_` and `-`.
    #[schema(pattern = "^[0-9A-Za-z._-]{1,64}$")]
    pub suffix: Option<String>,
    /// Seed of LoRA initialisation and shuffling; default 3407.
    pub seed: Option<u64>,
    /// At most 16 labels; keys up to 64 characters, values up to 512.
    pub metadata: Option<Metadata>,
    /// Must be null or empty: integrations are not supported yet.
    #[schema(value_type = Option<Vec<Object>>)]
    pub integrations: Option<Vec<Value>>,
    /// OpenAI's older place for the hyperparameters of supervised training.
    pub hyperparameters: Option<HyperparametersRequest>,
    /// How to train.
    pub method: Option<MethodRequest>,
    /// The LoRA.
    pub lora: Option<LoraFields>,
    /// Must be `auto`: the base stays as its file stores it.
    #[schema(pattern = "^auto$")]
    pub quantization: Option<String>,
    /// The data set.
    pub dataset: Option<DatasetFields>,
    /// -1000 to 1000, default 0: of jobs that wait, higher ones are trained first, then older ones.
    #[schema(minimum = -1000, maximum = 1000)]
    pub priority: Option<i64>,
    /// The training loop.
    pub training: Option<TrainingFields>,
    /// Files to leave behind; default the adapter and a q4_k_m GGUF.
    pub artifacts: Option<Vec<ArtifactRequest>>,
}

impl LoraFields {
    /// What a job does, and the name that its `init_from` has.
    pub fn resolved(spec: &TrainSpec, init_from: Option<String>) -> Self {
        Self {
            r: Some(spec.lora.r),
            alpha: Some(spec.lora.alpha),
            dropout: Some(spec.lora.dropout),
            use_rslora: Some(spec.lora.use_rslora),
            init_from,
            target_modules: Some(spec.lora.target_modules.iter().map(|&target| Target::name(target).into()).collect()),
        }
    }
}

impl From<&TrainSpec> for TrainingFields {
    fn from(spec: &TrainSpec) -> Self {
        let training = &spec.training;
        Self {
            compute: Some(training.compute),
            max_steps: training.max_steps,
            micro_batch_size: Some(training.micro_batch_size),
            gradient_accumulation_steps: Some(training.batch_size.div_ceil(training.micro_batch_size)),
            learning_rate: Some(training.learning_rate),
            warmup_steps: Some(training.warmup_steps),
            lr_scheduler: Some(training.lr_scheduler),
            weight_decay: Some(training.weight_decay),
            optimizer: Some(training.optimizer),
            max_grad_norm: Some(training.max_grad_norm),
            max_seq_length: training.max_seq_length,
            shuffle: Some(training.shuffle),
            packing: Some(training.packing),
            gradient_checkpointing: Some(training.gradient_checkpointing),
            eval_steps: training.eval_steps,
            save_steps: training.save_steps,
            early_stopping: training.early_stopping.map(Into::into),
        }
    }
}

impl From<&TrainSpec> for DatasetFields {
    fn from(spec: &TrainSpec) -> Self {
        Self {
            format: Some(spec.dataset.format),
            columns: Some(spec.dataset.columns.clone()).filter(|columns| !columns.is_empty()),
            template: Some(spec.dataset.template.clone()),
            train_on: Some(spec.dataset.train_on),
        }
    }
}

impl HyperparametersRequest {
    /// With the server's choices where the caller left them to it.
    pub fn resolved(spec: &TrainSpec) -> Self {
        let multiplier = spec.training.learning_rate / BASE_LEARNING_RATE;
        // 3e-4 / 2e-4 is 1.4999999999999998: show the number that was meant.
        let multiplier = (multiplier * 1e9).round() / 1e9;
        Self {
            n_epochs: Some(AutoOr::Value(spec.n_epochs)),
            batch_size: Some(AutoOr::Value(spec.training.batch_size)),
            learning_rate_multiplier: Some(AutoOr::Value(multiplier)),
        }
    }
}
