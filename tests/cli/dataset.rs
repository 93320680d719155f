//! `lorad dataset`, and training on every format.

use std::process::Output;

use serde_json::{Value, json};

use super::{Home, stderr};

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn write(home: &Home, name: &str, rows: &[Value]) {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(home.path(name), lines).expect("a data set");
}

fn run(home: &Home, role: &[&str], arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lorad"));
    command.args(role).args(["--base", "tiny.gguf"]).args(arguments).current_dir(home.0.path());
    command.output().expect("a process")
}

#[test]
fn a_report_counts_and_a_preview_marks() {
    let home = Home::new();
    let row = |index: u32| json!({"question": format!("What is {index}?"), "answer": format!("It is {index}.")});
    let mut rows: Vec<Value> = (0..20).map(row).collect();
    rows.push(row(3));
    write(&home, "data.jsonl", &rows);
    write(&home, "held.jsonl", &[row(100), row(7)]);
    let columns = ["--columns", "instruction=question,output=answer"];
    let report = |more: &[&str]| {
        let arguments = [&["--data", "data.jsonl", "--validation", "held.jsonl"], &columns[..], more].concat();
        let output = run(&home, &["dataset", "report"], &arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let text = report(&[]);
    for line in [
        "format      alpaca",
        "rows        21",
        "duplicates  1 rows repeat an earlier one: lines 21",
        "overlap     1 rows stand in the training file too: lines 2",
    ] {
        assert!(text.contains(line), "{text}");
    }
    let json: Value = serde_json::from_str(&report(&["--json"])).expect("JSON");
    assert_eq!((&json["training"]["rows"], &json["validation"]["overlap"]["rows"]), (&json!(21), &json!(1)));
    assert_eq!((&json["training_error"], &json["validation_error"]), (&Value::Null, &Value::Null));

    let arguments = [&["--data", "data.jsonl", "-n", "1"], &columns[..]].concat();
    let preview = run(&home, &["dataset", "preview"], &arguments);
    let text = stdout(&preview);
    assert!(preview.status.success() && text.contains("\n── row 1, line 1: ") && !text.contains("── row 2"), "{text}");
    let shown = text.split("── row 1").nth(1).expect("the first row");
    let marked = shown.split('⟦').nth(1).and_then(|rest| rest.split('⟧').next()).expect("a marked answer");
    // The end token's own bars go with those between tokens.
    assert_eq!(marked.replace('|', ""), "It is 0.<im_end>");
    let json = run(&home, &["dataset", "preview"], &[&arguments[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&stdout(&json)).expect("JSON");
    assert_eq!(json["rows"][0]["tokens"].as_array().map(Vec::len).map(|count| count > 20), Some(true));
}

#[test]
fn a_report_on_a_bad_file_is_printed_and_fails() {
    let home = Home::new();
    let mut rows =
        vec![json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}); 11];
    rows[4] = json!({"messages": [{"role": "user", "content": "q"}]});
    write(&home, "bad.jsonl", &rows);
    let output = run(&home, &["dataset", "report"], &["--data", "bad.jsonl"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("line 5: no message of the assistant is to be trained on"), "{}", stdout(&output));
    assert!(stderr(&output).contains("cannot train on bad.jsonl: 1 of 11 rows cannot be used"), "{}", stderr(&output));
    for (arguments, message) in [
        (["--columns", "question=q"], "dataset.columns must name fields of one format"),
        (["--template", "{% if %}"], "dataset.template is no Jinja template, line 1: "),
        (["--template", "llama3"], "expected auto, alpaca or a Jinja text"),
        (["--format", "dpo"], "unknown variant `dpo`"),
    ] {
        let output = run(&home, &["dataset", "report"], &[&["--data", "bad.jsonl"], &arguments[..]].concat());
        assert!(!output.status.success() && stderr(&output).contains(message), "{}", stderr(&output));
    }
}

#[test]
fn a_hostile_file_cannot_steer_the_terminal() {
    let home = Home::new();
    let mut rows = vec![
        json!({"instruction": "\u{1b}]0;title\u{7}q\u{9b}2J", "output": "a\u{1b}[8mb\rc", "\u{1b}[2Jid\n": 1});
        10
    ];
    write(&home, "good.jsonl", &rows);
    rows.push(json!({"instruction": "q", "output": "a", "chosen": "\u{1b}"}));
    rows.push(json!({"messages": [{"role": "\u{1b}[31m", "content": "q"}]}));
    write(&home, "bad.jsonl", &rows);
    std::fs::write(home.path("unknown.jsonl"), "{\"\\u001b[31mkey\": 1}\n").expect("a data set");
    let commands: [(&[&str], &str); 5] = [
        (&["dataset", "report", "--data", "good.jsonl"], "the field `\\u{1b}[2Jid\\u{a}` of 10 rows"),
        (&["dataset", "preview", "--data", "good.jsonl"], "\\u{1b}[8mb\\u{d}c"),
        (&["dataset", "report", "--data", "bad.jsonl", "--format", "chat"], "cannot be used"),
        (&["dataset", "report", "--data", "unknown.jsonl"], "keys `\\u{1b}[31mkey`"),
        (&["train", "--data", "bad.jsonl", "--out", "out"], "cannot train on bad.jsonl"),
    ];
    for (command, says) in commands {
        let output = run(&home, command, &[]);
        let text = (stdout(&output) + &stderr(&output)).replace('|', "");
        assert!(text.contains(says), "{command:?}: {text}");
        let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
        assert!(!text.contains(steers), "{command:?}: {text:?}");
    }
}

#[test]
fn a_missing_file_is_named_once() {
    let home = Home::new();
    for command in [&["train", "--out", "out"][..], &["dataset", "report"], &["dataset", "preview"]] {
        let output = run(&home, command, &["--data", "nowhere.jsonl"]);
        assert_eq!(stderr(&output).matches("nowhere.jsonl").count(), 1, "{}", stderr(&output));
        assert!(!output.status.success());
    }
}

#[test]
fn every_format_trains() {
    let home = Home::new();
    let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
    let call = json!({"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}});
    let rows = [
        (
            "chat",
            json!({"tools": [tool], "messages": [
                {"role": "user", "content": "1+0?"}, {"role": "assistant", "content": null, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "1"}, {"role": "assistant", "content": "One."},
            ]}),
        ),
        (
            "sharegpt",
            json!({"system": "Be brief.", "conversations": [
                {"from": "human", "value": "1+0?"}, {"from": "gpt", "value": "One."},
            ]}),
        ),
        ("alpaca", json!({"instruction": "Add.", "input": "1 0", "output": "One."})),
        ("completion", json!({"prompt": "1+0=", "completion": "1"})),
        ("text", json!({"text": "One and nothing are one."})),
    ];
    for (format, row) in rows {
        let array = Value::Array(vec![row; 10]);
        std::fs::write(home.path(format), array.to_string()).expect("a data set");
        let arguments = ["--data", format, "--format", format, "--out", &format!("out-{format}"), "--max-steps", "1"];
        let trained = run(&home, &["train"], &arguments);
        assert!(trained.status.success(), "{format}: {}", stderr(&trained));
        assert!(stderr(&trained).contains("warning: 9 rows repeat an earlier one"), "{}", stderr(&trained));
        assert!(!home.adapter(&format!("out-{format}")).is_empty());
    }
    let template = "{% for m in messages %}{{ '[' ~ m.role ~ '] ' ~ m.content ~ eos_token if m.role == 'assistant' else m.content }}{% endfor %}";
    std::fs::write(home.path("own.jinja"), template).expect("a template");
    let arguments = ["--data", "alpaca", "--template", "@own.jinja", "--out", "own", "--max-steps", "1"];
    let trained = run(&home, &["train"], &arguments);
    assert!(trained.status.success(), "{}", stderr(&trained));
}
