//! `lorad devices`, `--device` and `lorad bench`, as far as a machine without a GPU can tell.

use std::process::{Command, Output};

use serde_json::Value;

use crate::{Home, stderr};

fn lorad(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lorad")).args(arguments).output().expect("a process")
}

fn found() -> Value {
    let output = lorad(&["devices", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn devices_are_listed_for_people_and_for_programs() {
    let found = found();
    let devices = found["devices"].as_array().expect("a list");
    let cpu = devices.last().expect("a device");
    assert_eq!(cpu["device"], "cpu");
    assert!(cpu["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 28), "{cpu}");
    assert_eq!(found["no_gpu"].is_string(), devices.len() == 1, "{found}");

    let output = lorad(&["devices"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text.lines().count(), devices.len(), "{text}");
    assert!(text.lines().last().is_some_and(|line| line.starts_with("cpu ") && line.contains(" GiB ")), "{text}");
    assert_eq!(stderr(&output).contains("no GPU: "), devices.len() == 1);
}

#[test]
fn a_device_that_is_not_there_is_refused_before_anything_is_made() {
    let home = Home::new();
    for (device, words) in [("cuda:997", "there is no `cuda:997`"), ("gpu", "a GPU like `cuda:0`")] {
        let output = home.train("run", &["--device", device, "--max-steps", "1"]);
        assert!(!output.status.success() && stderr(&output).contains(words), "{}", stderr(&output));
        assert!(!home.path("run").exists());
    }
    let output = home.train("run", &["--device", "cpu", "--max-steps", "1"]);
    assert!(output.status.success() && stderr(&output).contains("training on cpu"), "{}", stderr(&output));
}

#[test]
fn a_bench_refuses_what_it_does_not_know_and_a_machine_without_a_gpu() {
    for (arguments, words) in [
        (&["--shape", "llama-4"][..], &["llama-3-8b, llama-3.2-1b, llama-3.2-3b, smollm2-135m, llama-3-70b"][..]),
        (&["--quantization", "int4"], &["nf4", "bf16", "q4_k", "`int4`"]),
        (&["--gradient-checkpointing", "some"], &["auto", "none", "full"]),
        (&["--micro-steps", "0"], &["--micro-steps"]),
        (&["--device", "cpu"], &["this times a GPU"]),
        (&["--device", "cuda:997"], &["there is no `cuda:997`"]),
    ] {
        let output = lorad(&[&["bench", "train"], arguments].concat());
        let told = stderr(&output);
        assert!(!output.status.success() && words.iter().all(|word| told.contains(word)), "{told}");
    }
    if found()["no_gpu"].is_string() {
        for what in ["train", "ops"] {
            let output = lorad(&["bench", what]);
            assert!(!output.status.success() && stderr(&output).contains("there is none: "), "{}", stderr(&output));
            assert!(output.stdout.is_empty());
        }
    }
}
