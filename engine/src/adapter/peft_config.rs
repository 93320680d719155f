//! `adapter_config.json` of a PEFT folder: written, and read from adapters that others trained. What changes an adapter in a way
//! that is not supported is refused by name.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::damaged;
use crate::files::shorten;
use crate::spec::LoraSpec;
use crate::{Error, Result};

pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// Reads the LoRA of a PEFT folder.
///
/// # Errors
/// A config that is no LoRA or uses what the engine does not have; the message names the field.
pub fn peft_spec(folder: &Path) -> Result<LoraSpec> {
    let path = folder.join(CONFIG_FILE);
    let json = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config: PeftConfig = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&json))
        .map_err(|error| damaged(&path, &error))?;
    config.spec()
}

/// The fields of `adapter_config.json` that matter here, in PEFT's spelling.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PeftConfig {
    peft_type: String,
    task_type: Option<String>,
    base_model_name_or_path: Option<String>,
    r: u32,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Vec<String>,
    #[serde(default = "no_bias")]
    bias: String,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    init_lora_weights: serde_json::Value,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    alpha_pattern: serde_json::Map<String, serde_json::Value>,
    /// What other versions and methods of PEFT have beside these.
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

/// Fields of PEFT's that change what an adapter computes in ways that are not supported here, unless they say nothing.
const MUST_BE_UNSET: [&str; 9] = [
    "use_qalora",
    "lora_bias",
    "layers_to_transform",
    "layer_replication",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
];

/// Starts that take something away from the base's weights, which are then not those of the base model.
const CHANGES_THE_BASE: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

/// Null, false, or empty.
fn is_unset(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Null | serde_json::Value::Bool(false) => true,
        serde_json::Value::String(text) => text.is_empty(),
        serde_json::Value::Array(items) => items.is_empty(),
        serde_json::Value::Object(fields) => fields.is_empty(),
        serde_json::Value::Bool(true) | serde_json::Value::Number(_) => false,
    }
}

fn no_bias() -> String {
    "none".to_owned()
}

impl PeftConfig {
    pub(super) fn new(spec: &LoraSpec, base_model: &str) -> Self {
        Self {
            peft_type: "LORA".to_owned(),
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: Some(base_model.to_owned()),
            r: spec.r,
            lora_alpha: spec.alpha,
            lora_dropout: spec.dropout,
            target_modules: spec.target_modules.iter().map(|target| target.name().to_owned()).collect(),
            bias: no_bias(),
            use_rslora: spec.use_rslora,
            use_dora: false,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: true.into(),
            modules_to_save: None,
            rank_pattern: serde_json::Map::new(),
            alpha_pattern: serde_json::Map::new(),
            rest: serde_json::Map::new(),
        }
    }

    fn spec(self) -> Result<LoraSpec> {
        let unsupported = [
            ("peft_type", self.peft_type != "LORA"),
            ("bias", self.bias != "none"),
            ("use_dora", self.use_dora),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty())),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
        ];
        let unsupported = unsupported.into_iter().filter(|(_, wrong)| *wrong).map(|(field, _)| field);
        let set = |field: &&str| self.rest.get(*field).is_some_and(|value| !is_unset(value));
        if let Some(field) = unsupported.chain(MUST_BE_UNSET.into_iter().filter(set)).next() {
            return Err(Error::Adapter(format!("{CONFIG_FILE} has a `{field}` that is not supported")));
        }
        if let Some(start) = self.init_lora_weights.as_str()
            && CHANGES_THE_BASE.iter().any(|kind| start.starts_with(kind))
        {
            let start = shorten(start);
            let message = format!(
                "has init_lora_weights `{start}`, whose base is not the base model: convert it to plain LoRA first"
            );
            return Err(Error::Adapter(format!("{CONFIG_FILE} {message}")));
        }
        let plain = |name: &String| {
            let plain = name.strip_prefix("self_attn.").or_else(|| name.strip_prefix("mlp."));
            plain.unwrap_or(name).to_owned()
        };
        let options = crate::spec::LoraOptions {
            r: Some(self.r),
            alpha: Some(self.lora_alpha),
            dropout: Some(self.lora_dropout),
            use_rslora: Some(self.use_rslora),
            target_modules: Some(self.target_modules.iter().map(plain).collect()),
        };
        let spec = crate::spec::TrainOptions { lora: options, ..Default::default() };
        let resolved = crate::spec::TrainSpec::resolve(&spec);
        resolved.map(|spec| spec.lora).map_err(|error| Error::Adapter(format!("{CONFIG_FILE}: {error}")))
    }
}
