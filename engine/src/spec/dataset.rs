//! How the data set is read.

use serde::{Deserialize, Serialize};

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

pub(super) fn resolve(options: &DatasetOptions) -> DatasetSpec {
    DatasetSpec {
        format: options.format.unwrap_or_default(),
        template: options.template.unwrap_or_default(),
        train_on: options.train_on.unwrap_or_default(),
    }
}
