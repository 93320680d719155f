//! A run that is broken off and resumed, at any step, ends with the same bits as one that was not.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use lorad_engine::data::Dataset;
use lorad_engine::model::Llama;
use lorad_engine::spec::{TrainOptions, TrainSpec, TrainingOptions};
use lorad_engine::testing::TinyModel;
use lorad_engine::train::{Checkpoint, Outcome, Start, StepMetrics, TrainEvent, train};
use support::{dataset, tiny};

fn spec(change: impl FnOnce(&mut TrainOptions)) -> TrainSpec {
    let training = TrainingOptions { learning_rate: Some(1e-2), warmup_steps: Some(1), ..TrainingOptions::default() };
    let mut options = TrainOptions { training, batch_size: Some(5), n_epochs: Some(3), ..TrainOptions::default() };
    change(&mut options);
    TrainSpec::resolve(&options).unwrap()
}

/// Runs from a checkpoint until `stop_after` steps are done; the last checkpoint stands in `path`.
fn run(spec: &TrainSpec, model: &Llama, data: &Dataset, path: &Path, stop_after: u32) -> (Outcome, Vec<StepMetrics>) {
    let resume = path.exists().then(|| Checkpoint::load(path).unwrap());
    let mut steps = Vec::new();
    let outcome = train(spec, model, data, Start { resume, ..Start::default() }, &mut |event| {
        match event {
            TrainEvent::Started { .. } => {}
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

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let (_, model) = tiny(&TinyModel::default());
    let (spec, data) = (spec(|_| {}), dataset(13));
    let folder = tempfile::tempdir().unwrap();
    let undisturbed_path = folder.path().join("undisturbed");
    let (undisturbed, all_steps) = run(&spec, &model, &data, &undisturbed_path, u32::MAX);
    assert_eq!((undisturbed.completed, undisturbed.step, all_steps.len()), (true, 9, 9));
    let first = all_steps.first().unwrap().loss;
    let last = all_steps.last().unwrap().loss;
    assert!(last < first - 0.1, "the loss falls: {first} to {last}");
    for stop_after in 1..9 {
        let path = folder.path().join(format!("stopped-{stop_after}"));
        let (stopped, mut steps) = run(&spec, &model, &data, &path, stop_after);
        assert_eq!((stopped.completed, stopped.step), (false, stop_after));
        let (resumed, rest) = run(&spec, &model, &data, &path, u32::MAX);
        steps.extend(rest);
        assert_eq!(steps, all_steps, "stopped after {stop_after}");
        assert_eq!(resumed.trained_tokens, undisturbed.trained_tokens);
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&undisturbed_path).unwrap());
        let adapter = |outcome: &Outcome, name: &str| {
            let folder = folder.path().join(name);
            outcome.lora.save_peft(&folder, "tiny").unwrap();
            std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
        };
        assert_eq!(adapter(&resumed, "resumed"), adapter(&undisturbed, "undisturbed-adapter"));
    }
}

#[test]
fn accumulating_four_times_two_rows_is_eight_rows_at_once() {
    let (_, model) = tiny(&TinyModel::default());
    let data = dataset(16);
    let losses = |micro_batch_size, recompute: &str| {
        let spec = spec(|options| {
            options.batch_size = Some(8);
            options.training.micro_batch_size = Some(micro_batch_size);
            options.training.gradient_checkpointing = serde_json::from_value(recompute.into()).unwrap();
        });
        let folder = tempfile::tempdir().unwrap();
        run(&spec, &model, &data, &folder.path().join("c"), u32::MAX).1.iter().map(|s| s.loss).collect::<Vec<_>>()
    };
    let (four_times_two, eight) = (losses(2, "none"), losses(8, "none"));
    assert!(four_times_two.iter().zip(&eight).all(|(a, b)| (a - b).abs() < 1e-4), "{four_times_two:?} {eight:?}");
    assert_eq!(eight, losses(8, "full"));
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
