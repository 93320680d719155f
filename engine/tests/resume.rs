//! A run that is broken off and resumed, at any step, ends with the same bits as one that was not.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use lorad_engine::data::{Dataset, MicroBatch, Row};
use lorad_engine::device::Device;
use lorad_engine::model::Llama;
use lorad_engine::ops::cross_entropy::Loss;
use lorad_engine::ops::matmul::Compute;
use lorad_engine::spec::{
    ComputeType, EarlyStopping, LrScheduler, Optimizer, TrainOptions, TrainSpec, TrainingOptions,
};
use lorad_engine::testing::TinyModel;
use lorad_engine::train::{Checkpoint, Outcome, Start, StepMetrics, TrainEvent, estimate, measure_rate, train};
use support::{dataset, kept, random_lora, rows, tiny};

fn spec(change: impl FnOnce(&mut TrainOptions)) -> TrainSpec {
    let training = TrainingOptions { learning_rate: Some(1e-2), warmup_steps: Some(1), ..TrainingOptions::default() };
    let mut options = TrainOptions { training, batch_size: Some(5), n_epochs: Some(3), ..TrainOptions::default() };
    change(&mut options);
    TrainSpec::resolve(&options).unwrap()
}

/// Runs from a checkpoint until `stop_after` steps are done; the last checkpoint stands in `path`.
fn run(spec: &TrainSpec, model: &Llama, data: &Dataset, path: &Path, stop_after: u32) -> (Outcome, Vec<StepMetrics>) {
    run_with(spec, model, (data, None), path, stop_after)
}

fn run_with(
    spec: &TrainSpec,
    model: &Llama,
    (data, validation): (&Dataset, Option<&Dataset>),
    path: &Path,
    stop_after: u32,
) -> (Outcome, Vec<StepMetrics>) {
    let resume = path.exists().then(|| Checkpoint::load(path).unwrap());
    let mut steps = Vec::new();
    let outcome = train(spec, model, data, Start { resume, validation, ..Start::default() }, &mut |event| {
        match event {
            TrainEvent::Started { .. } | TrainEvent::Evaluating { .. } => {}
            TrainEvent::Checkpoint { checkpoint, .. } => checkpoint.save(path).unwrap(),
            TrainEvent::Step(metrics) => {
                steps.push(StepMetrics { step_ms: 0, ..metrics });
                if metrics.step == stop_after {
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    });
    (outcome.unwrap(), steps)
}

/// Stops a run after each of its steps and goes on: nothing may differ from the run that was not stopped.
fn check_resume(spec: &TrainSpec, data: (&Dataset, Option<&Dataset>)) -> (Outcome, Vec<StepMetrics>) {
    let (_, model) = tiny(&TinyModel::default());
    let folder = tempfile::tempdir().unwrap();
    let undisturbed_path = folder.path().join("undisturbed");
    let (undisturbed, all_steps) = run_with(spec, &model, data, &undisturbed_path, u32::MAX);
    assert!(undisturbed.completed);
    for stop_after in 1..undisturbed.step {
        let path = folder.path().join(format!("stopped-{stop_after}"));
        let (stopped, mut steps) = run_with(spec, &model, data, &path, stop_after);
        assert_eq!((stopped.completed, stopped.step), (false, stop_after));
        let (resumed, rest) = run_with(spec, &model, data, &path, u32::MAX);
        steps.extend(rest);
        assert_eq!(steps, all_steps, "stopped after {stop_after}");
        assert_eq!(resumed.trained_tokens, undisturbed.trained_tokens);
        assert_eq!((resumed.best, resumed.stopped_early), (undisturbed.best, undisturbed.stopped_early));
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&undisturbed_path).unwrap());
        let adapter = |outcome: &Outcome, name: &str| {
            let folder = folder.path().join(name);
            outcome.lora.save_peft(&folder, "tiny").unwrap();
            std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
        };
        assert_eq!(adapter(&resumed, "resumed"), adapter(&undisturbed, "undisturbed-adapter"));
    }
    // A run that has come to its end stays there.
    let (again, steps) = run_with(spec, &model, data, &undisturbed_path, u32::MAX);
    assert_eq!((again.completed, again.step, steps.len()), (true, undisturbed.step, 0));
    assert_eq!(again.lora.flat().to_vec1::<f32>().unwrap(), undisturbed.lora.flat().to_vec1::<f32>().unwrap());
    (undisturbed, all_steps)
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let (undisturbed, steps) = check_resume(&spec(|_| {}), (&dataset(13), None));
    assert_eq!((undisturbed.step, steps.len(), undisturbed.best), (9, 9, None));
    let (first, last) = (steps.first().unwrap().loss, steps.last().unwrap().loss);
    assert!(last < first - 0.1, "the loss falls: {first} to {last}");
    assert!(steps.iter().all(|step| step.evaluation.is_none()));
}

#[test]
fn so_does_one_with_dropout_validation_early_stopping_and_8_bit_moments() {
    let held_out = &rows(20)[13..];
    let validation = kept(held_out);
    let spec = spec(|options| {
        options.lora.dropout = Some(0.2);
        options.lora.r = Some(64);
        options.n_epochs = Some(20);
        let training = &mut options.training;
        training.optimizer = Some(Optimizer::AdamW8bit);
        training.lr_scheduler = Some(LrScheduler::Cosine);
        training.packing = Some(false);
        training.eval_steps = Some(2);
        training.early_stopping = Some(EarlyStopping { patience: 2, min_delta: 0.0 });
    });
    let (outcome, steps) = check_resume(&spec, (&dataset(13), Some(&validation)));
    assert!(outcome.stopped_early && outcome.step < 60, "random rows are learned by heart: {}", outcome.step);
    let evaluations: Vec<(u32, f64)> =
        steps.iter().filter_map(|step| Some((step.step, step.evaluation?.loss))).collect();
    assert!(evaluations.iter().all(|(step, _)| step % 2 == 0) && evaluations.len() == outcome.step as usize / 2);
    let least = evaluations.iter().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
    let best = outcome.best.unwrap();
    assert_eq!((best.loss, best.since), (least, 2));
    assert_eq!(best.step + 4, outcome.step);
    // The result is the best evaluation's adapter, not the last step's.
    let (_, model) = tiny(&TinyModel::default());
    // What `auto` means.
    let compute = Compute::bf16().unwrap_or(Compute::F32);
    let mut again = Loss::default();
    for rows in held_out.chunks(2) {
        again += model.evaluate(&MicroBatch::pad(rows), &outcome.lora, compute).unwrap();
    }
    assert_eq!(again.sum / again.tokens as f64, least);
}

#[test]
fn a_validation_data_set_is_evaluated_each_epoch_and_at_the_end() {
    let (_, model) = tiny(&TinyModel::default());
    let evaluated = |change: fn(&mut TrainOptions), validation: Option<&Dataset>| {
        let mut steps = Vec::new();
        let mut parts = Vec::new();
        let start = Start { validation, ..Start::default() };
        train(&spec(change), &model, &dataset(13), start, &mut |event| {
            match event {
                TrainEvent::Step(StepMetrics { step, evaluation: Some(evaluation), .. }) => {
                    assert!(evaluation.loss > 0.0 && (0.0..=1.0).contains(&evaluation.token_accuracy));
                    steps.push(step);
                }
                TrainEvent::Evaluating { rows, total_rows, .. } => parts.push((rows, total_rows)),
                _ => {}
            }
            ControlFlow::Continue(())
        })
        .map(|_| (steps, parts))
    };
    let validation = dataset(5);
    let (steps, parts) = evaluated(|_| {}, Some(&validation)).unwrap();
    assert_eq!(steps, [3, 6, 9]);
    assert_eq!(parts[..3], [(2, 5), (4, 5), (5, 5)]);
    assert_eq!(evaluated(|o| o.training.eval_steps = Some(4), Some(&validation)).unwrap().0, [4, 8, 9]);
    assert_eq!(evaluated(|_| {}, None).unwrap().0, [0; 0]);
    let refused = |change| evaluated(change, None).unwrap_err().to_string();
    let message = refused(|o| o.training.eval_steps = Some(4));
    assert_eq!(message, "training.eval_steps needs a validation data set, got `4` without one");
    let message = refused(|o| o.training.early_stopping = Some(EarlyStopping::default()));
    assert!(message.starts_with("training.early_stopping needs a validation data set"), "{message}");
}

#[test]
fn a_small_memory_budget_keeps_fewer_layers_for_the_whole_run_and_the_same_bits() {
    let (_, model) = tiny(&TinyModel::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let results: Vec<(Vec<f32>, String)> = [Some(0), Some(u64::MAX), None]
        .into_iter()
        .map(|memory_budget_bytes| {
            let start = Start { memory_budget_bytes, ..Start::default() };
            let outcome = train(&spec(|_| {}), &model, &dataset(13), start, &mut |event| {
                if let TrainEvent::Checkpoint { checkpoint, .. } = event {
                    checkpoint.save(&path).unwrap();
                }
                ControlFlow::Continue(())
            });
            let saved = String::from_utf8_lossy(&std::fs::read(&path).unwrap()[..2000]).into_owned();
            (outcome.unwrap().lora.flat().to_vec1().unwrap(), saved)
        })
        .collect();
    assert!(results.iter().all(|(values, _)| *values == results[0].0));
    let says = |index: usize, layers: usize| results[index].1.contains(&format!(r#"\"kept_layers\":{layers},"#));
    assert!(says(0, 0) && says(1, 2) && says(2, 2), "{}", results[0].1);
}

#[test]
fn an_estimate_counts_what_a_run_does() {
    let (_, model) = tiny(&TinyModel::default());
    let (data, validation) = (dataset(13), dataset(5));
    let spec = spec(|options| options.training.packing = Some(false));
    let estimated = estimate(&spec, &model, &data, Some(&validation), Some(1000.0), Device::Cpu).unwrap();
    assert_eq!((estimated.total_steps, estimated.kept_layers, estimated.layers), (9, 2, 2));
    let widest = |rows: &[Row]| rows.iter().map(|row| row.tokens.len()).max().unwrap() * rows.len();
    let evaluated: usize = rows(5).chunks(2).map(widest).sum();
    assert_eq!(estimated.evaluated_tokens, 3 * evaluated as u64);
    assert!(estimated.largest_micro_batch <= 90 && estimated.tokens > 9 * 5 * 5);
    let seconds = estimated.tokens as f64 / 1000.0 + evaluated as f64 / 1000.0;
    assert!((estimated.seconds.unwrap() - seconds).abs() < 1e-9);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let (outcome, _) = run_with(&spec, &model, (&data, Some(&validation)), &path, u32::MAX);
    let near = |bytes: u64, path: &Path| (0..20_000).contains(&(std::fs::metadata(path).unwrap().len() - bytes));
    assert!(near(estimated.checkpoint_bytes, &path));
    outcome.lora.save_peft(folder.path(), "tiny").unwrap();
    assert!(near(estimated.adapter_bytes, &folder.path().join("adapter_model.safetensors")));
    assert!(measure_rate(&spec, &model, &data, Device::Cpu).unwrap() > 0.0);
}

#[test]
fn dropout_changes_the_run_and_each_step_has_a_mask_of_its_own() {
    let (_, model) = tiny(&TinyModel::default());
    let losses = |dropout| {
        let spec = spec(|options| {
            options.lora.dropout = Some(dropout);
            // Nothing moves but by the mask: what differs between steps of the same rows is the mask.
            options.training.learning_rate = Some(1e-12);
            (options.batch_size, options.training.shuffle) = (Some(13), Some(false));
        });
        let folder = tempfile::tempdir().unwrap();
        let adapter = folder.path().join("adapter");
        random_lora(&spec.lora, &TinyModel::default()).save_peft(&adapter, "tiny").unwrap();
        let start = Start { init_from: Some(adapter), ..Start::default() };
        let mut losses = Vec::new();
        train(&spec, &model, &dataset(13), start, &mut |event| {
            if let TrainEvent::Step(step) = event {
                losses.push(step.loss);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        losses
    };
    let (none, some) = (losses(0.0), losses(0.3));
    assert!(none.iter().all(|loss| (loss - none[0]).abs() < 1e-5), "{none:?}");
    assert!(some.iter().all(|loss| (loss - none[0]).abs() > 1e-5), "{some:?}");
    assert!((some[0] - some[1]).abs() > 1e-5 && (some[1] - some[2]).abs() > 1e-5, "{some:?}");
}

#[test]
fn accumulating_four_times_two_rows_is_eight_rows_at_once() {
    let (_, model) = tiny(&TinyModel::default());
    let data = dataset(16);
    let losses = |micro_batch_size, recompute: &str, packing| {
        let spec = spec(|options| {
            options.training.packing = Some(packing);
            options.batch_size = Some(8);
            options.training.micro_batch_size = Some(micro_batch_size);
            options.training.gradient_checkpointing = serde_json::from_value(recompute.into()).unwrap();
            // In bf16 the last bits of a sum decide how its result is rounded, and the runs drift apart faster.
            options.training.compute = Some(ComputeType::F32);
        });
        let folder = tempfile::tempdir().unwrap();
        run(&spec, &model, &data, &folder.path().join("c"), u32::MAX).1.iter().map(|s| s.loss).collect::<Vec<_>>()
    };
    let (four_times_two, eight) = (losses(2, "none", true), losses(8, "none", true));
    let are_close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(are_close(&four_times_two, &eight), "{four_times_two:?} {eight:?}");
    assert_eq!(eight, losses(8, "full", true));
    for padded in [losses(2, "none", false), losses(8, "none", false)] {
        assert!(are_close(&padded, &eight), "{padded:?} {eight:?}");
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let (_, model) = tiny(&TinyModel::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    run(&spec(|_| {}), &model, &dataset(13), &path, 2);
    let start = Start { resume: Some(Checkpoint::load(&path).unwrap()), ..Start::default() };
    let (_, other_weights) = tiny(&TinyModel { seed: 2, ..TinyModel::default() });
    assert!(train(&spec(|_| {}), &other_weights, &dataset(13), start, &mut |_| ControlFlow::Continue(())).is_err());
    let others = [
        (spec(|o| o.seed = Some(1)), dataset(13)),
        (spec(|o| o.lora.r = Some(8)), dataset(13)),
        (spec(|_| {}), dataset(12)),
    ];
    for (spec, data) in others {
        let start = Start { resume: Some(Checkpoint::load(&path).unwrap()), ..Start::default() };
        let error = train(&spec, &model, &data, start, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(error.to_string().contains("another specification, model or data set"), "{error}");
    }
}

#[test]
fn a_run_broken_off_before_its_first_step_can_go_on() {
    let (_, model) = tiny(&TinyModel::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    let outcome = train(&spec(|_| {}), &model, &dataset(13), Start::default(), &mut |event| {
        if let TrainEvent::Checkpoint { checkpoint, listed: false } = event {
            checkpoint.save(&path).unwrap();
        }
        ControlFlow::Break(())
    });
    assert_eq!(outcome.unwrap().step, 0);
    assert_eq!(run(&spec(|_| {}), &model, &dataset(13), &path, u32::MAX).0.step, 9);
}

#[test]
fn checkpoints_are_listed_at_the_end_of_each_epoch_or_as_asked() {
    let (_, model) = tiny(&TinyModel::default());
    let listed = |save_steps| {
        let spec = spec(|options| options.training.save_steps = save_steps);
        let mut listed = Vec::new();
        train(&spec, &model, &dataset(13), Start::default(), &mut |event| {
            if let TrainEvent::Checkpoint { checkpoint, listed: true } = event {
                listed.push(checkpoint.step());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        listed
    };
    assert_eq!(listed(None), [3, 6, 9]);
    assert_eq!(listed(Some(4)), [4, 8, 9]);
}
