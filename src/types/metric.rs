//! What one optimizer step measured.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The figures of one step: a row of the table `job_metric` and a line of the worker protocol.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// The step, counted from 1.
    pub step: i64,
    /// Steps of the whole run.
    pub total_steps: i64,
    /// Passes over the data set so far, with their fraction.
    pub epoch: f64,
    /// Mean loss of the trained tokens of the step.
    pub train_loss: f64,
    /// Share of the trained tokens whose likeliest prediction was right.
    pub train_mean_token_accuracy: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Trained tokens since the first step.
    pub trained_tokens: i64,
    /// Time that the step took.
    pub step_ms: i64,
    /// Mean loss of the whole validation file after the step, where it was evaluated.
    #[serde(default)]
    pub valid_loss: Option<f64>,
    /// Share of the validation file's trained tokens whose likeliest prediction was right.
    #[serde(default)]
    pub valid_mean_token_accuracy: Option<f64>,
}

impl Metric {
    /// The step's figures in OpenAI's words. An evaluation always takes the whole file, so `valid_*` and `full_valid_*` are the
    /// same; without one they are absent.
    pub fn figures(&self) -> Value {
        let mut figures = json!({
            "step": self.step,
            "train_loss": self.train_loss,
            "train_mean_token_accuracy": self.train_mean_token_accuracy,
        });
        for (name, value) in
            [("valid_loss", self.valid_loss), ("valid_mean_token_accuracy", self.valid_mean_token_accuracy)]
        {
            if let Some(value) = value {
                figures[name] = value.into();
                figures[format!("full_{name}")] = value.into();
            }
        }
        figures
    }
}
