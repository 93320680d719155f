//! The learning rate of each step, as Hugging Face defines its schedules.
//!
//! Step t counts from 0: during warm-up lr · t / warmup_steps, which is 0 in the first step; then, linear,
//! lr · (total − t) / (total − warmup_steps).

use crate::spec::{LrScheduler, TrainingSpec};

/// The learning rate of the step with that index, counted from 0.
pub fn learning_rate(spec: &TrainingSpec, step_index: u32, total_steps: u32) -> f64 {
    let (step, warmup, total) = (f64::from(step_index), f64::from(spec.warmup_steps), f64::from(total_steps));
    let factor = if step_index < spec.warmup_steps {
        step / warmup.max(1.0)
    } else {
        match spec.lr_scheduler {
            LrScheduler::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
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
