//! A job specification: a request that was checked once, so that nothing behind it checks again.

use std::ops::RangeInclusive;

use lorad_engine::spec::{DatasetOptions, LoraOptions, LoraSpec, TrainOptions, TrainSpec, TrainingOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::artifact::{ArtifactRequest, ArtifactType, Quantization};
use super::ids::{ArtifactId, FileId};
use super::job::Metadata;
use super::job_request::{
    AutoOr, DatasetFields, HyperparametersRequest, JobRequest, LoraFields, MethodRequest, TrainingFields,
};

/// Priorities that a job may have.
const PRIORITIES: RangeInclusive<i64> = -1000..=1000;

/// A request that cannot be carried out: which field, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// Path of the field, as the caller wrote it; absent where the body as a whole is wrong.
    pub param: Option<String>,
    /// Names the field and the value, and what would be right.
    pub message: String,
}

impl Invalid {
    fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), message: message.into() }
    }
}

/// What a job is to do, with every default filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The base model, as the request named it.
    pub model: String,
    /// The data set.
    pub training_file: FileId,
    /// The data set whose loss is watched.
    pub validation_file: Option<FileId>,
    /// The adapter that the training begins with.
    pub init_from: Option<InitFrom>,
    /// Part of the model's name.
    pub suffix: Option<String>,
    /// The caller's labels.
    pub metadata: Option<Metadata>,
    /// OpenAI's three hyperparameters, as the caller gave them.
    pub hyperparameters: HyperparametersRequest,
    /// Every hyperparameter, resolved.
    pub train: TrainSpec,
    /// Files to leave behind.
    pub artifacts: Vec<ArtifactRequest>,
    /// Higher ones are trained first, then older ones.
    #[serde(default)]
    pub priority: i64,
}

/// The adapter that a training begins with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InitFrom {
    /// As the request named it.
    pub name: String,
    /// The artifact that it stands for.
    pub artifact_id: ArtifactId,
    /// The LoRA that it is.
    pub lora: LoraSpec,
}

impl JobSpec {
    /// What a request's `lora.init_from` names, which [`JobSpec::parse`] has to be given.
    ///
    /// # Errors
    /// The first field that is unknown or of the wrong type.
    pub fn adapter_named_in(body: &[u8]) -> Result<Option<String>, Invalid> {
        Ok(read::<JobRequest>(body)?.lora.and_then(|lora| lora.init_from))
    }

    /// Checks a request's body; `init_from` is what its `lora.init_from` was found to be.
    ///
    /// # Errors
    /// The first field that is unknown, of the wrong type, out of range or not supported.
    pub fn parse(body: &[u8], init_from: Option<InitFrom>) -> Result<Self, Invalid> {
        let request: JobRequest = read(body)?;
        refuse_unsupported(&request)?;
        if let Some(suffix) = &request.suffix {
            check_suffix(suffix)?;
        }
        if let Some(metadata) = &request.metadata {
            check_metadata(metadata)?;
        }
        let training_file = file_id("training_file", &request.training_file)?;
        let validation_file = request.validation_file.as_ref().map(|id| file_id("validation_file", id)).transpose()?;
        let (hyperparameters, place) = hyperparameters(&request)?;
        let mut options = options(&request, hyperparameters);
        if let Some(init_from) = &init_from {
            let inherited = options.lora.inherit(&init_from.lora);
            inherited.map_err(|error| Invalid::new(error.field, error.message))?;
        }
        let train = TrainSpec::resolve(&options).map_err(|error| {
            let inner = matches!(error.field, "n_epochs" | "batch_size" | "learning_rate_multiplier");
            let param = if inner { format!("{place}.{}", error.field) } else { error.field.to_owned() };
            Invalid::new(param, error.message)
        })?;
        check_validation(validation_file, &train)?;
        let artifacts = artifacts(request.artifacts)?;
        let priority = request.priority.unwrap_or(0);
        if !PRIORITIES.contains(&priority) {
            let message = format!("priority must be from -1000 to 1000, got `{priority}`");
            return Err(Invalid::new("priority", message));
        }
        Ok(Self {
            model: request.model,
            training_file,
            validation_file,
            init_from,
            suffix: request.suffix,
            metadata: request.metadata,
            hyperparameters,
            train,
            artifacts,
            priority,
        })
    }
}

/// Reads a request's body, every part of which its type must know.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Invalid> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let request: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            field_error(&path, &inner.to_string())
        } else {
            Invalid { param: None, message: format!("the body is not valid JSON: {inner}") }
        }
    })?;
    let end = deserializer.end();
    end.map_err(|error| Invalid { param: None, message: format!("the body is not valid JSON: {error}") })?;
    Ok(request)
}

/// Serde names the container of a missing or unknown field in the path, and the field itself in the message.
fn field_error(path: &str, message: &str) -> Invalid {
    let message = message.split(" at line ").next().unwrap_or(message);
    let parent = if path == "." { "" } else { path };
    for kind in ["unknown field `", "missing field `"] {
        let Some(name) = message.strip_prefix(kind).and_then(|rest| rest.split('`').next()) else { continue };
        let already = parent == name || parent.ends_with(&format!(".{name}"));
        let param = if parent.is_empty() || already { name_or(parent, name) } else { format!("{parent}.{name}") };
        return Invalid::new(param.clone(), message.replacen(&format!("`{name}`"), &format!("`{param}`"), 1));
    }
    if parent.is_empty() {
        return Invalid { param: None, message: format!("the body must be an object: {message}") };
    }
    Invalid::new(parent, format!("{parent}: {message}"))
}

fn name_or(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { parent.to_owned() }
}

/// Fields that OpenAI or lorad defines and this version cannot honour yet: silence would train another model than was asked for.
fn refuse_unsupported(request: &JobRequest) -> Result<(), Invalid> {
    let MethodRequest { kind, dpo, reinforcement, .. } = &request.method.clone().unwrap_or_else(default_method);
    unsupported("method.type", kind != "supervised", kind, "supervised")?;
    unsupported("method.dpo", dpo.is_some(), dpo, "null")?;
    unsupported("method.reinforcement", reinforcement.is_some(), reinforcement, "null")?;
    let integrations = request.integrations.as_deref().unwrap_or_default();
    unsupported("integrations", !integrations.is_empty(), &integrations, "null or empty")?;
    let quantization = request.quantization.as_deref().unwrap_or("auto");
    unsupported("quantization", quantization != "auto", &quantization, "auto")?;
    Ok(())
}

/// Refuses a field that was `given` a value which this version has no use for.
fn unsupported(field: &str, given: bool, value: &impl Serialize, only: &str) -> Result<(), Invalid> {
    if given {
        let value = serde_json::to_value(value).unwrap_or_default();
        return Err(Invalid::new(field, format!("{field} `{value}` is not supported yet, it must be {only}")));
    }
    Ok(())
}

fn default_method() -> MethodRequest {
    MethodRequest { kind: "supervised".into(), supervised: None, dpo: None, reinforcement: None }
}

fn file_id(field: &str, id: &str) -> Result<FileId, Invalid> {
    id.parse().map_err(|right| Invalid::new(field, format!("{field} {right}")))
}

/// Settings that mean nothing without a validation file.
fn check_validation(validation_file: Option<FileId>, train: &TrainSpec) -> Result<(), Invalid> {
    let training = &train.training;
    let needing = [
        ("training.eval_steps", training.eval_steps.is_some()),
        ("training.early_stopping", training.early_stopping.is_some()),
    ];
    match needing.into_iter().find(|(_, given)| *given && validation_file.is_none()) {
        None => Ok(()),
        Some((field, _)) => Err(Invalid::new(field, format!("{field} needs a validation_file, got `null`"))),
    }
}

pub(super) fn check_suffix(suffix: &str) -> Result<(), Invalid> {
    let fits = (1..=64).contains(&suffix.len());
    let plain = suffix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if fits && plain {
        return Ok(());
    }
    let message = format!("suffix must be 1 to 64 letters, digits, `.`, `_` or `-`, got `{suffix}`");
    Err(Invalid::new("suffix", message))
}

pub(super) fn check_metadata(metadata: &Metadata) -> Result<(), Invalid> {
    if metadata.len() > 16 {
        return Err(Invalid::new("metadata", format!("metadata must have at most 16 keys, got `{}`", metadata.len())));
    }
    for (key, value) in metadata {
        if key.chars().count() > 64 {
            return Err(Invalid::new(
                "metadata",
                format!("metadata keys must have at most 64 characters, got `{key}`"),
            ));
        }
        let length = value.chars().count();
        if length > 512 {
            let message = format!("metadata.{key} must have at most 512 characters, got `{length}`");
            return Err(Invalid::new(format!("metadata.{key}"), message));
        }
    }
    Ok(())
}

/// OpenAI's three hyperparameters from whichever of their two places the caller used, and that place.
fn hyperparameters(request: &JobRequest) -> Result<(HyperparametersRequest, &'static str), Invalid> {
    const OLD: &str = "hyperparameters";
    const NEW: &str = "method.supervised.hyperparameters";
    let new = request.method.as_ref().and_then(|method| method.supervised).and_then(|method| method.hyperparameters);
    let (given, place) = match (request.hyperparameters, new) {
        (None, None) => (HyperparametersRequest::default(), NEW),
        (Some(old), None) => (old, OLD),
        (None, Some(new)) => (new, NEW),
        (Some(old), Some(new)) if with_auto(old) == with_auto(new) => (new, NEW),
        (Some(_), Some(_)) => {
            return Err(Invalid::new(OLD, format!("{OLD} and {NEW} differ: give them in one place")));
        }
    };
    Ok((with_auto(given), place))
}

fn with_auto(given: HyperparametersRequest) -> HyperparametersRequest {
    HyperparametersRequest {
        n_epochs: Some(given.n_epochs.unwrap_or(AutoOr::AUTO)),
        batch_size: Some(given.batch_size.unwrap_or(AutoOr::AUTO)),
        learning_rate_multiplier: Some(given.learning_rate_multiplier.unwrap_or(AutoOr::AUTO)),
    }
}

fn options(request: &JobRequest, hyperparameters: HyperparametersRequest) -> TrainOptions {
    let LoraFields { r, alpha, dropout, use_rslora, target_modules, .. } = request.lora.clone().unwrap_or_default();
    let DatasetFields { format, columns, template, train_on } = request.dataset.clone().unwrap_or_default();
    TrainOptions {
        seed: request.seed,
        n_epochs: hyperparameters.n_epochs.and_then(AutoOr::value),
        batch_size: hyperparameters.batch_size.and_then(AutoOr::value),
        learning_rate_multiplier: hyperparameters.learning_rate_multiplier.and_then(AutoOr::value),
        lora: LoraOptions { r, alpha, dropout, use_rslora, target_modules },
        training: training_options(request.training.clone().unwrap_or_default()),
        dataset: DatasetOptions { format, columns, template, train_on },
    }
}

fn training_options(fields: TrainingFields) -> TrainingOptions {
    TrainingOptions {
        max_steps: fields.max_steps,
        micro_batch_size: fields.micro_batch_size,
        gradient_accumulation_steps: fields.gradient_accumulation_steps,
        learning_rate: fields.learning_rate,
        warmup_steps: fields.warmup_steps,
        lr_scheduler: fields.lr_scheduler,
        weight_decay: fields.weight_decay,
        optimizer: fields.optimizer,
        max_grad_norm: fields.max_grad_norm,
        max_seq_length: fields.max_seq_length,
        shuffle: fields.shuffle,
        packing: fields.packing,
        gradient_checkpointing: fields.gradient_checkpointing,
        compute: fields.compute,
        eval_steps: fields.eval_steps,
        save_steps: fields.save_steps,
        early_stopping: fields.early_stopping.map(Into::into),
    }
}

fn artifacts(requested: Option<Vec<ArtifactRequest>>) -> Result<Vec<ArtifactRequest>, Invalid> {
    let adapter = ArtifactRequest { kind: ArtifactType::Adapter, quantization: None };
    let gguf = ArtifactRequest { kind: ArtifactType::Gguf, quantization: Some(Quantization::DEFAULT) };
    let Some(requested) = requested else { return Ok(vec![adapter, gguf]) };
    if requested.is_empty() {
        return Err(Invalid::new("artifacts", "artifacts must name at least one artifact, got `[]`"));
    }
    let mut artifacts = Vec::with_capacity(requested.len());
    for (index, request) in requested.into_iter().enumerate() {
        let artifact = resolve(&format!("artifacts[{index}]."), request)?;
        if artifacts.contains(&artifact) {
            let param = format!("artifacts[{index}]");
            return Err(Invalid::new(param.clone(), format!("{param} is asked for twice")));
        }
        artifacts.push(artifact);
    }
    Ok(artifacts)
}

impl ArtifactRequest {
    /// Checks a request for one more artifact.
    ///
    /// # Errors
    /// A field that is unknown, of the wrong type or in the wrong place.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        resolve("", read(body)?)
    }
}

/// An artifact with its quantization, where its kind has one; `place` is how the names of its fields begin.
fn resolve(place: &str, request: ArtifactRequest) -> Result<ArtifactRequest, Invalid> {
    match (request.kind.takes_quantization(), request.quantization) {
        (false, None) | (true, Some(_)) => Ok(request),
        (true, None) => Ok(ArtifactRequest { quantization: Some(Quantization::DEFAULT), ..request }),
        (false, Some(quantization)) => {
            let param = format!("{place}quantization");
            let kind = request.kind;
            let message = format!("{param} must be absent for an artifact of type {kind}, got `{quantization}`");
            Err(Invalid::new(param, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request(changes: Value) -> Vec<u8> {
        let mut body = json!({"model": "tiny", "training_file": FileId::new()});
        let Value::Object(changes) = changes else { panic!("changes are an object") };
        for (key, value) in changes {
            body[key] = value;
        }
        body.to_string().into_bytes()
    }

    /// Checks a body whose `init_from` stands for an adapter of rank 4.
    fn parse(body: &[u8]) -> Result<JobSpec, Invalid> {
        let lora = LoraSpec { r: 4, ..TrainSpec::default().lora };
        let named = JobSpec::adapter_named_in(body)?;
        JobSpec::parse(body, named.map(|name| InitFrom { name, artifact_id: ArtifactId::new(), lora }))
    }

    fn refused(changes: Value) -> (Option<String>, String) {
        let invalid = parse(&request(changes)).expect_err("must be refused");
        (invalid.param, invalid.message)
    }

    #[test]
    fn a_minimal_request_gets_the_defaults() {
        let spec = parse(&request(json!({}))).expect("a good request");
        assert_eq!(spec.train, TrainSpec::default());
        assert_eq!(spec.hyperparameters.n_epochs, Some(AutoOr::AUTO));
        let artifacts = serde_json::to_value(&spec.artifacts).expect("JSON");
        assert_eq!(artifacts, json!([{"type": "adapter"}, {"type": "gguf", "quantization": "q4_k_m"}]));
        let stored = serde_json::to_string(&spec).expect("a spec is JSON");
        assert_eq!(serde_json::from_str::<JobSpec>(&stored).expect("and reads back"), spec);
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        let cases = [
            (json!({"modle": "x"}), "modle"),
            (json!({"lora": {"rank": 8}}), "lora.rank"),
            (json!({"lora": {"r": 0}}), "lora.r"),
            (json!({"lora": {"r": -1}}), "lora.r"),
            (json!({"lora": {"r": "8"}}), "lora.r"),
            (json!({"lora": {"dropout": 1.0}}), "lora.dropout"),
            (json!({"lora": {"init_from": "artifact-1", "r": 8}}), "lora.r"),
            (json!({"lora": {"target_modules": ["lm_head"]}}), "lora.target_modules"),
            (json!({"training": {"learning_rate": -1}}), "training.learning_rate"),
            (json!({"training": {"lr_scheduler": "polynomial"}}), "training.lr_scheduler"),
            (json!({"training": {"optimizer": "sgd"}}), "training.optimizer"),
            (json!({"training": {"packing": 1}}), "training.packing"),
            (json!({"training": {"compute": "fp8"}}), "training.compute"),
            (json!({"training": {"eval_steps": 5}}), "training.eval_steps"),
            (json!({"training": {"early_stopping": {"patience": 0}}}), "training.early_stopping.patience"),
            (json!({"training": {"early_stopping": {"patiense": 3}}}), "training.early_stopping.patiense"),
            (json!({"training": {"early_stopping": {"patience": 3}}}), "training.early_stopping"),
            (json!({"dataset": {"format": "dpo"}}), "dataset.format"),
            (json!({"dataset": {"template": "llama3"}}), "dataset.template"),
            (json!({"dataset": {"template": "{% if %}"}}), "dataset.template"),
            (json!({"dataset": {"columns": {"instruction": 5}}}), "dataset.columns.instruction"),
            (json!({"dataset": {"format": "text", "columns": {"instruction": "question"}}}), "dataset.columns"),
            (json!({"dataset": {"columns": {"a": "b"}}}), "dataset.columns"),
            (json!({"method": {"type": "dpo", "dpo": {}}}), "method.type"),
            (json!({"method": {"kind": "supervised"}}), "method.kind"),
            (json!({"method": {}}), "method.type"),
            (json!({"hyperparameters": {"batch_size": 0}}), "hyperparameters.batch_size"),
            (json!({"hyperparameters": {"n_epochs": "many"}}), "hyperparameters.n_epochs"),
            (
                json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}}),
                "method.supervised.hyperparameters.batch_size",
            ),
            (
                json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}}),
                "method.supervised.hyperparameters.epochs",
            ),
            (json!({"validation_file": "file-1"}), "validation_file"),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
            (json!({"quantization": "nf4"}), "quantization"),
            (json!({"priority": 1001}), "priority"),
            (json!({"suffix": "a:b"}), "suffix"),
            (json!({"suffix": ""}), "suffix"),
            (json!({"seed": -1}), "seed"),
            (json!({"metadata": {"key": "v".repeat(513)}}), "metadata.key"),
            (json!({"artifacts": []}), "artifacts"),
            (json!({"artifacts": [{"type": "adapter"}, {"type": "adapter"}]}), "artifacts[1]"),
            (json!({"artifacts": [{"type": "adapter", "quantization": "f16"}]}), "artifacts[0].quantization"),
            (json!({"artifacts": [{"type": "merged", "quantization": "f16"}]}), "artifacts[0].quantization"),
            (json!({"artifacts": [{"type": "ollama"}, {"type": "ollama", "quantization": "q4_k_m"}]}), "artifacts[1]"),
            (json!({"artifacts": [{"type": "onnx"}]}), "artifacts[0].type"),
            (json!({"artifacts": [{"type": "gguf", "quantization": "q9_k_m"}]}), "artifacts[0].quantization"),
            (json!({"training_file": "nope"}), "training_file"),
            (json!({"training_file": null}), "training_file"),
        ];
        for (changes, field) in cases {
            let shown = changes.to_string();
            let (param, message) = refused(changes);
            assert_eq!(param.as_deref(), Some(field), "{shown}: {message}");
            let last = field.rsplit('.').next().unwrap_or(field);
            assert!(message.contains(last), "{shown}: {message}");
            let of_rust = ["Some(", "Number(", "Object ", "String("];
            assert!(!of_rust.iter().any(|word| message.contains(word)), "no JSON: {message}");
        }
    }

    #[test]
    fn a_data_set_may_name_its_columns_and_bring_its_template() {
        let template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}";
        let columns = json!({"instruction": "question", "output": "answer"});
        let spec = parse(&request(json!({"dataset": {"columns": columns, "template": template}})));
        let spec = spec.expect("a good request");
        let shown = serde_json::to_value(DatasetFields::from(&spec.train)).expect("JSON");
        assert_eq!(
            shown,
            json!({"format": "alpaca", "columns": columns, "template": template, "train_on": "completions"})
        );
        let stored = serde_json::to_string(&spec).expect("a spec is JSON");
        assert_eq!(serde_json::from_str::<JobSpec>(&stored).expect("and reads back"), spec);
    }

    #[test]
    fn a_job_with_everything_says_what_it_will_do() {
        let validation_file = FileId::new();
        let spec = parse(&request(json!({
            "validation_file": validation_file, "lora": {"dropout": 0.1, "init_from": "ft:m:lorad::abcd1234"},
            "training": {"lr_scheduler": "cosine", "optimizer": "adamw_8bit", "packing": false, "eval_steps": 4,
                         "early_stopping": {"min_delta": 0.01}},
        })));
        let spec = spec.expect("a good request");
        assert_eq!(spec.validation_file, Some(validation_file));
        assert_eq!((spec.train.lora.r, spec.train.lora.dropout), (4, 0.1));
        assert_eq!(spec.init_from.expect("an adapter").name, "ft:m:lorad::abcd1234");
        let shown = serde_json::to_value(TrainingFields::from(&spec.train)).expect("JSON");
        let picked = ["lr_scheduler", "optimizer", "packing", "eval_steps"].map(|name| shown[name].clone());
        assert_eq!(picked, [json!("cosine"), json!("adamw_8bit"), json!(false), json!(4)]);
        assert_eq!(shown["early_stopping"], json!({"patience": 3, "min_delta": 0.01}));
    }

    #[test]
    fn a_missing_field_and_broken_json_are_told_apart() {
        let missing = parse(br#"{"model": "tiny"}"#).expect_err("no file");
        assert_eq!(missing.param.as_deref(), Some("training_file"));
        for broken in [&b"{"[..], b"", b"{} {}", b"\xff"] {
            let error = parse(broken).expect_err("not JSON");
            assert!(error.param.is_none() || broken == b"{} {}", "{error}");
        }
        assert_eq!(parse(b"[]").expect_err("no object").param, None);
    }

    #[test]
    fn a_field_that_holds_its_default_is_fine() {
        let spec = parse(&request(json!({
            "validation_file": null, "integrations": [], "priority": 0, "quantization": "auto", "suffix": null,
            "lora": {"dropout": 0.0, "init_from": null}, "dataset": {"columns": null, "template": "auto"},
            "training": {"compute": "auto", "packing": true, "eval_steps": null, "optimizer": "adamw"},
            "hyperparameters": {"n_epochs": "auto"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}}},
        })));
        assert_eq!(spec.expect("all defaults").train, TrainSpec::default());
    }

    #[test]
    fn the_two_places_of_the_hyperparameters_must_agree() {
        let method = |n: u32| json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": n}}});
        let (param, _) = refused(json!({"hyperparameters": {"n_epochs": 2}, "method": method(3)}));
        assert_eq!(param.as_deref(), Some("hyperparameters"));
        let same = parse(&request(json!({"hyperparameters": {"n_epochs": 3}, "method": method(3)})));
        assert_eq!(same.expect("they agree").train.n_epochs, 3);
    }
}
