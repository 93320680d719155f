//! The loss on a validation data set, and what follows from it: which LoRA is the best so far, and whether the run ends early.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use super::state::State;
use super::{TrainEvent, micro_batch};
use crate::data::Dataset;
use crate::model::Llama;
use crate::ops::cross_entropy::Loss;
use crate::spec::{EarlyStopping, SpecError, TrainSpec};
use crate::{Error, Result};

/// What the whole validation data set came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean loss of all its trained tokens, in nats.
    pub loss: f64,
    /// Share of them whose most likely token was the right one.
    pub token_accuracy: f64,
}

/// The best evaluation of a run with early stopping.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step after which it was made.
    pub step: u32,
    /// Its loss.
    #[serde(with = "as_text")]
    pub loss: f64,
    /// Evaluations since then, none of them better.
    pub since: u32,
}

/// A number as text: what serde_json reads from a number of JSON may be off by the last bit, and a resumed run would judge otherwise.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Best {
    /// After another evaluation.
    pub(super) fn after(best: Option<Self>, rule: EarlyStopping, step: u32, loss: f64) -> Self {
        match best {
            Some(best) if loss >= best.loss - rule.min_delta => Self { since: best.since.saturating_add(1), ..best },
            _ => Self { step, loss, since: 0 },
        }
    }
}

/// Refuses settings that mean nothing without a validation data set.
pub(super) fn check(spec: &TrainSpec, validation: Option<&Dataset>) -> Result<()> {
    let training = &spec.training;
    let told = |field, value: String| {
        let message = format!("{field} needs a validation data set, got `{value}` without one");
        Err(Error::Spec(SpecError { field, message }))
    };
    match (validation, training.early_stopping, training.eval_steps) {
        (Some(_), _, _) | (None, None, None) => Ok(()),
        (None, Some(rule), _) => told("training.early_stopping", format!("patience {}", rule.patience)),
        (None, None, Some(steps)) => told("training.eval_steps", steps.to_string()),
    }
}

/// The loss over the whole data set, forward only, in the file's order. The second value is what the receiver of its events
/// said: it does not break off, so that a step that was evaluated once never lacks its evaluation.
pub(super) fn evaluate(
    spec: &TrainSpec,
    model: &Llama,
    validation: &Dataset,
    (state, step): (&mut State, u32),
    on_event: &mut dyn FnMut(TrainEvent<'_>) -> ControlFlow<()>,
) -> Result<(Evaluation, ControlFlow<()>)> {
    let rows: Vec<usize> = (0..validation.rows.len()).collect();
    let (mut loss, mut flow, mut done) = (Loss::default(), ControlFlow::Continue(()), 0);
    for rows in rows.chunks(spec.training.micro_batch_size.max(1) as usize) {
        loss += state.evaluate(model, &micro_batch(validation, rows, spec.training.packing)?)?;
        done += rows.len();
        if on_event(TrainEvent::Evaluating { step, rows: done, total_rows: validation.rows.len() }).is_break() {
            flow = ControlFlow::Break(());
        }
    }
    let tokens = loss.tokens.max(1) as f64;
    let evaluation = Evaluation { loss: loss.sum / tokens, token_accuracy: loss.correct as f64 / tokens };
    if !evaluation.loss.is_finite() {
        let message = format!("validation loss {}; a lower learning_rate may help", evaluation.loss);
        return Err(Error::Training { step, message });
    }
    Ok((evaluation, flow))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_read_back_to_the_last_bit() {
        for index in 0..10_000u32 {
            let best = Best { step: 1, loss: f64::from(index).sqrt() / 7.0 + 1e-9, since: 0 };
            let json = serde_json::to_string(&best).unwrap();
            let value: serde_json::Value = serde_json::from_str(&json).unwrap();
            let read: Best = serde_json::from_value(value).unwrap();
            assert_eq!(read.loss.to_bits(), best.loss.to_bits(), "{json}");
        }
    }

    #[test]
    fn only_a_loss_that_is_lower_by_min_delta_is_better() {
        let rule = EarlyStopping { patience: 2, min_delta: 0.1 };
        let mut best = None;
        let mut seen = Vec::new();
        for (step, loss) in [(1, 2.0), (2, 1.95), (3, 1.9), (4, 1.8), (5, 1.75), (6, 1.2)] {
            let next = Best::after(best, rule, step, loss);
            seen.push((next.step, next.since));
            best = Some(next);
        }
        assert_eq!(seen, [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (6, 0)]);
        let same = Best::after(Some(Best { step: 1, loss: 1.0, since: 0 }), EarlyStopping::default(), 2, 1.0);
        assert_eq!((same.step, same.since), (1, 1), "the same loss is no better one");
    }
}
