//! `lorad export` as a user runs it.

use std::process::Command;

use serde_json::Value;

use super::{Home, stderr};

/// Names in a folder, sorted.
fn names(home: &Home, folder: &str) -> Vec<String> {
    let items = std::fs::read_dir(home.path(folder)).expect("a folder");
    let mut names: Vec<_> =
        items.map(|item| item.expect("an item").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Runs the command and gives what it printed, a JSON value a line.
fn export(home: &Home, arguments: &[&str]) -> Vec<Value> {
    let output = home.command("export", arguments).output().expect("a process");
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn refused(home: &Home, arguments: &[&str]) -> String {
    let output = home.command("export", arguments).output().expect("a process");
    assert!(!output.status.success(), "{arguments:?}");
    stderr(&output)
}

#[test]
fn every_type_is_exported_at_once_and_says_what_was_trained() {
    let home = Home::new();
    let trained = home.train("pirate", &["--n-epochs", "8", "--r", "4", "--use-rslora", "--learning-rate", "1e-2"]);
    assert!(trained.status.success(), "{}", stderr(&trained));
    let card = std::fs::read_to_string(home.path("pirate/README.md")).expect("a model card");
    assert!(
        card.contains("# pirate\n") && card.contains("| loss of the last step | ") && card.contains("rsLoRA"),
        "{card}"
    );

    let types = ["adapter", "gguf", "gguf_lora", "merged", "ollama"].map(|kind| ["--type", kind]).concat();
    let mut arguments =
        vec!["--adapter", "pirate", "--output", "out", "--quantization", "q8_0", "--quantization", "f16"];
    arguments.extend(types);
    let made = export(&home, &arguments);
    assert_eq!(
        names(&home, "out"),
        ["adapter", "lora.gguf", "merged", "model-f16.gguf", "model-q8_0.gguf", "ollama-f16", "ollama-q8_0",]
    );
    assert_eq!(made.len(), 7);
    for made in &made {
        let agreement = made["parity"]["greedy_agreement"].as_f64().expect("a number");
        assert!(agreement > 0.8, "{made}");
    }
    let adapter = |name: &str| std::fs::read(home.path(name).join("adapter_model.safetensors")).expect("there");
    assert_eq!(adapter("out/adapter"), adapter("pirate"), "the same values are the same bytes");

    let answer = |base: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
        command.args(["chat", "--base", base, "--prompt", "How many are 3 and 3?", "--max-tokens", "12"]);
        let output = command.args(more).current_dir(home.path("")).output().expect("a process");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    let tuned = answer("tiny.gguf", &["--adapter", "pirate"]);
    assert!(tuned.starts_with("They are "), "{tuned}");
    for file in ["out/model-f16.gguf", "out/ollama-f16/model-f16.gguf"] {
        assert_eq!(answer(file, &[]), tuned, "{file}");
    }
    assert_eq!(answer("tiny.gguf", &["--adapter", "out/adapter"]), tuned);

    let again = refused(&home, &arguments);
    assert!(again.contains("out/adapter: is there already"), "{again}");
}

#[test]
fn lm_studios_folders_and_wrong_arguments() {
    let home = Home::new();
    let trained = home.train("first", &["--max-steps", "1", "--r", "4"]);
    assert!(trained.status.success(), "{}", stderr(&trained));
    let usual = ["--adapter", "first", "--output", "models"];
    let with = |more: &[&'static str]| [&usual[..], more].concat();
    let made = export(&home, &with(&["--lmstudio", "me/tiny-first"]));
    assert_eq!(made[0]["path"], "models/me/tiny-first/tiny-first-q4_k_m.gguf");
    assert_eq!(names(&home, "models/me/tiny-first"), ["tiny-first-q4_k_m.gguf"]);

    for (more, says) in [
        (&["--lmstudio", "me"][..], "must be PUBLISHER/MODEL"),
        (&["--lmstudio", "me/x", "--type", "merged"], "--lmstudio is for the type gguf"),
        (&["--type", "merged", "--quantization", "f16"], "--quantization f16 is for the types gguf and ollama"),
        (&["--type", "onnx"], "must be one of adapter, gguf, gguf_lora, merged, ollama, got `onnx`"),
        (&["--quantization", "q9"], "expected one of"),
    ] {
        let told = refused(&home, &with(more));
        assert!(told.contains(says), "{more:?}: {told}");
    }
    let config = home.path("first/adapter_config.json");
    let text = std::fs::read_to_string(&config).expect("a config");
    std::fs::write(&config, text.replace("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 2}"))
        .expect("written");
    let told = refused(&home, &usual);
    assert!(told.contains("cannot export first") && told.contains("`rank_pattern` that is not supported"), "{told}");
    assert_eq!(names(&home, "models"), ["me"], "nothing half is left");
}
