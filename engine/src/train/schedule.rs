//! The learning rate of each step, as Hugging Face defines its schedules.
//!
//! Step t counts from 0: during warm-up lr · t / warmup_steps, which is 0 in the first step; then, linear,
//! lr · (total − t) / (total − warmup_steps); cosine, lr · ½ (1 + cos(π (t − warmup_steps) / (total − warmup_steps))); constant, lr.
//! Source: get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup and get_constant_schedule_with_warmup of transformers.

use std::f64::consts::PI;

use crate::spec::{LrScheduler, TrainingSpec};

/// The learning rate of the step with that index, counted from 0.
pub fn learning_rate(spec: &TrainingSpec, step_index: u32, total_steps: u32) -> f64 {
    let (step, warmup, total) = (f64::from(step_index), f64::from(spec.warmup_steps), f64::from(total_steps));
    let factor = if step_index < spec.warmup_steps {
        step / warmup.max(1.0)
    } else {
        match spec.lr_scheduler {
            LrScheduler::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
            LrScheduler::Cosine => {
                let progress = (step - warmup) / (total - warmup).max(1.0);
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
            LrScheduler::Constant => 1.0,
        }
    };
    spec.learning_rate * factor
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::TrainSpec;

    #[test]
    fn linear_rises_from_0_and_falls_to_one_step_before_0() {
        let mut spec = TrainSpec::default().training;
        (spec.learning_rate, spec.warmup_steps) = (1.0, 4);
        let rates: Vec<f64> = (0..8).map(|step| learning_rate(&spec, step, 8)).collect();
        assert_eq!(rates, [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]);
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        lr_scheduler: LrScheduler,
        warmup_steps: u32,
        total_steps: u32,
        learning_rate: Vec<f64>,
    }

    #[test]
    fn every_schedule_is_that_of_transformers() {
        let golden = include_str!("../../tests/golden/schedules.json");
        let runs: Vec<Golden> = serde_json::from_str(golden).unwrap();
        assert_eq!(runs.len(), 12);
        for run in runs {
            let mut spec = TrainSpec::default().training;
            (spec.lr_scheduler, spec.warmup_steps, spec.learning_rate) = (run.lr_scheduler, run.warmup_steps, 2e-4);
            for (step, expected) in (0..run.total_steps).zip(run.learning_rate) {
                let rate = learning_rate(&spec, step, run.total_steps);
                assert!((rate - expected).abs() < 1e-15, "{:?} step {step}: {rate} not {expected}", run.lr_scheduler);
            }
        }
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_only_rises() {
        let mut spec = TrainSpec::default().training;
        (spec.learning_rate, spec.warmup_steps) = (1.0, 10);
        let rates: Vec<f64> = (0..3).map(|step| learning_rate(&spec, step, 3)).collect();
        assert_eq!(rates, [0.0, 0.1, 0.2]);
        spec.warmup_steps = 0;
        assert_eq!(learning_rate(&spec, 0, 1), 1.0);
    }
}
