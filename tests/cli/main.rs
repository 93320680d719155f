//! `lorad train` and `lorad chat` as a user runs them: real processes on a tiny model.

mod dataset;
mod devices;
mod export;
mod keys;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lorad_engine::testing::TinyModel;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

/// A folder with a tiny model and a data set.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(tempfile::tempdir().expect("a temporary folder"));
        TinyModel::default().write(&home.path("tiny.gguf")).expect("a model");
        let row = |index: usize| {
            let message = |role: &str, content: String| json!({"role": role, "content": content});
            let question = message("user", format!("How many are {index} and {index}?"));
            let answer = message("assistant", format!("They are {}.", 2 * index));
            json!({"messages": [question, answer]}).to_string() + "\n"
        };
        std::fs::write(home.path("rows.jsonl"), (0..30).map(row).collect::<String>()).expect("a data set");
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, role: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.arg(role).args(["--base", "tiny.gguf"]).args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    fn train(&self, out: &str, arguments: &[&str]) -> Output {
        let mut command = self.command("train", &["--data", "rows.jsonl", "--out", out]);
        command.args(arguments).output().expect("a process")
    }

    fn adapter(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.path(out).join("adapter_model.safetensors")).expect("an adapter")
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// metrics.csv without the column of times.
fn metrics(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("metrics.csv")).expect("metrics.csv");
    text.lines().map(|line| line.rsplit_once(',').expect("columns").0.to_owned()).collect()
}

#[test]
fn ctrl_c_keeps_a_checkpoint_and_resume_ends_with_the_same_adapter() {
    let home = Home::new();
    let arguments = ["--max-steps", "400", "--learning-rate", "1e-2"];
    let whole = home.train("whole", &arguments);
    assert!(whole.status.success(), "{}", stderr(&whole));

    let mut command = home.command("train", &["--data", "rows.jsonl", "--out", "broken"]);
    let mut process = command.args(arguments).stderr(Stdio::null()).spawn().expect("a process");
    let begin = Instant::now();
    let lines = || std::fs::read_to_string(home.path("broken/metrics.csv")).map_or(0, |text| text.lines().count());
    while lines() < 20 {
        assert!(begin.elapsed() < Duration::from_secs(120), "no step is done");
        std::thread::yield_now();
    }
    kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGINT).expect("a process of ours");
    let status = process.wait().expect("its end");
    assert_eq!(status.code(), Some(1), "it stopped before its end");

    let again = home.train("broken", &arguments);
    assert!(stderr(&again).contains("add --resume to go on from it"), "{}", stderr(&again));
    let resumed = home.train("broken", &[&arguments[..], &["--resume"]].concat());
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(!stderr(&resumed).contains("400 steps, 0 done"), "{}", stderr(&resumed));
    assert_eq!(home.adapter("broken"), home.adapter("whole"));
    assert_eq!(metrics(&home.path("broken")), metrics(&home.path("whole")));
}

#[test]
fn an_estimate_tells_the_bytes_that_a_run_leaves() {
    let home = Home::new();
    let arguments = ["--max-steps", "2", "--gguf", "q8_0", "--template", "alpaca"];
    let told = home.train("run", &[&arguments[..], &["--estimate"]].concat());
    assert!(told.status.success(), "{}", stderr(&told));
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let figure = |name: &str| {
        let line = told.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        line.unwrap_or_else(|| panic!("no {name} in {told}"))
    };
    assert_eq!(figure("total_steps "), 2);
    assert!(!home.path("run/model-q8_0.gguf").exists(), "an estimate makes nothing");

    let run = home.train("run", &arguments);
    assert!(run.status.success(), "{}", stderr(&run));
    let size = |name: &str| std::fs::metadata(home.path("run").join(name)).expect("a file").len();
    assert_eq!(size("model-q8_0.gguf"), figure("gguf_q8_0_bytes "));
    let header = size("adapter_model.safetensors") - figure("adapter_bytes ");
    assert!(header < 8192, "{header} bytes beside the values");
}

#[test]
fn a_run_stops_early_and_leaves_the_best_adapter() {
    let home = Home::new();
    let rows = std::fs::read_to_string(home.path("rows.jsonl")).expect("a data set");
    let held: String = rows.lines().take(12).map(|row| row.replace("They are", "zzz qqq") + "\n").collect();
    std::fs::write(home.path("held.jsonl"), held).expect("a data set");
    let options = "--validation held.jsonl --dropout 0.1 --optimizer adamw_8bit --lr-scheduler constant --packing false --eval-steps 2 \
                   --early-stopping-patience 2 --n-epochs 40 --learning-rate 1e-2 --save-steps 5";
    let arguments: Vec<&str> = options.split_whitespace().collect();
    let trained = home.train("early", &arguments);
    let told = stderr(&trained);
    assert!(trained.status.success(), "{told}");
    let (_, rest) = told.split_once("stopped early after step ").expect("an early stop");
    let stopped: usize = rest.split(';').next().and_then(|step| step.parse().ok()).expect("a step");
    let rows = metrics(&home.path("early"));
    assert_eq!(rows.len(), stopped + 1);
    let valid = |row: &String| row.split(',').nth(7).expect("valid_loss").parse::<f64>().ok();
    let losses: Vec<Option<f64>> = rows[1..].iter().map(valid).collect();
    assert!(losses.iter().enumerate().all(|(index, loss)| loss.is_some() == (index % 2 == 1)), "{losses:?}");
    let least = losses.iter().flatten().copied().fold(f64::INFINITY, f64::min);
    assert!(told.contains(&format!("the best validation loss, {least:.4}, is that of step {}", stopped - 4)), "{told}");

    let alone = home.train("alone", &["--early-stopping-min-delta", "0.1"]);
    assert!(stderr(&alone).contains("training.early_stopping needs a validation data set"), "{}", stderr(&alone));
}

#[test]
fn the_examples_can_be_trained_on() {
    let home = Home::new();
    for name in ["alpaca", "persona"] {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name).with_extension("jsonl");
        let data = data.to_str().expect("a path in UTF-8");
        let trained = home.command("train", &["--data", data, "--out", name, "--max-steps", "1"]).output();
        let trained = trained.expect("a process");
        assert!(trained.status.success(), "{name}: {}", stderr(&trained));
        assert!(!home.adapter(name).is_empty());
    }
}

#[test]
fn an_adapter_is_continued_merged_and_talked_to() {
    let home = Home::new();
    let first = home.train("first", &["--n-epochs", "8", "--r", "4", "--learning-rate", "1e-2", "--gguf", "f16"]);
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(
        stderr(&first).contains("merged model: first/model-f16.gguf: "),
        "with its certificate: {}",
        stderr(&first)
    );
    let there = home.train("first", &["--n-epochs", "8", "--gguf", "f16", "--resume"]);
    assert!(stderr(&there).contains("first/model-f16.gguf is there already: remove it"), "{}", stderr(&there));
    let second = home.train("second", &["--max-steps", "2", "--init-from", "first"]);
    assert!(second.status.success(), "{}", stderr(&second));
    let again = home.train("second", &["--max-steps", "2", "--init-from", "first", "--resume"]);
    assert!(again.status.success(), "the same command with --resume: {}", stderr(&again));
    let loss = |out: &str, line: usize| {
        let row = metrics(&home.path(out))[line].clone();
        row.split(',').nth(2).expect("a loss").parse::<f64>().expect("a number")
    };
    assert!(loss("second", 1) < loss("first", 1) - 0.5, "it goes on from where the first ended");

    let chat = |base: &str, adapter: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.args(["chat", "--base", base, "--prompt", "How many are 3 and 3?", "--max-tokens", "12"]);
        let output = command.args(adapter).current_dir(home.0.path()).output().expect("a process");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    let tuned = chat("tiny.gguf", &["--adapter", "first"]);
    assert!(tuned.starts_with("They are "), "{tuned}");
    assert_ne!(chat("tiny.gguf", &[]), tuned);
    assert_eq!(chat("first/model-f16.gguf", &[]), tuned);
}

#[test]
fn a_merged_model_prompts_as_it_was_trained() {
    let home = Home::new();
    let arguments = ["--n-epochs", "8", "--r", "4", "--learning-rate", "1e-2", "--template", "alpaca", "--gguf", "f16"];
    let trained = home.train("alpaca", &arguments);
    assert!(trained.status.success(), "{}", stderr(&trained));
    let chat = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.args(["chat", "--prompt", "How many are 3 and 3?", "--max-tokens", "12"]).args(arguments);
        let output = command.current_dir(home.0.path()).output().expect("a process");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    let tuned = chat(&["--base", "tiny.gguf", "--adapter", "alpaca", "--template", "alpaca"]);
    assert_eq!(chat(&["--base", "alpaca/model-f16.gguf"]), tuned, "the file's own template is the trained one");
    assert_ne!(chat(&["--base", "tiny.gguf", "--adapter", "alpaca"]), tuned, "the base's own is another");
}

#[test]
fn wrong_arguments_are_told_by_name() {
    let home = Home::new();
    std::fs::write(home.path("broken.jsonl"), "{\"messages\": [\n").expect("a file");
    std::fs::write(home.path("none.gguf"), "GGUF").expect("a file");
    let cases: [(&[&str], &str); 12] = [
        (&["--dropout", "1"], "lora.dropout must be in [0, 1), got `1`"),
        (&["--eval-steps", "3"], "training.eval_steps needs a validation data set, got `3` without one"),
        (&["--learning-rate", "NaN"], "training.learning_rate must be in (0, 1], got `NaN`"),
        (&["--learning-rate", "-1"], "training.learning_rate must be in (0, 1], got `-1`"),
        (&["--r", "0"], "lora.r must be from 1 to 1024, got `0`"),
        (&["--max-seq-length", "100000"], "at most the model's context length 512, got `100000`"),
        (&["--target-modules", "q_proj,lm_head"], "got `lm_head`"),
        (&["--resume"], "checkpoint.safetensors"),
        (&["--init-from", "nowhere"], "nowhere/adapter_config.json"),
        (&["--data", "broken.jsonl"], "broken.jsonl"),
        (&["--base", "none.gguf"], "none.gguf"),
        (&["--base", "nothing"], "lorad: `nothing` is no file here: the model `nothing` does not exist"),
    ];
    for (arguments, message) in cases {
        let mut all = vec!["train", "--out", "out"];
        for (name, value) in [("--base", "tiny.gguf"), ("--data", "rows.jsonl")] {
            if !arguments.contains(&name) {
                all.extend([name, value]);
            }
        }
        all.extend(arguments);
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        let output = command.args(&all).current_dir(home.0.path()).output().expect("a process");
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {told}");
        assert!(told.contains(message), "{arguments:?}: {told}");
        assert!(!told.contains("panicked"), "{arguments:?}: {told}");
    }
}
