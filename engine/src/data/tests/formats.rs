//! What each format makes of its rows.

use serde_json::json;

use super::*;
use crate::spec::{DatasetFormat, Template};

/// Twelve rows of that kind under ChatML: the first as text, trained tokens in brackets, and the report.
fn read(row: &Value, change: impl FnOnce(&mut TrainSpec)) -> Result<(String, Report)> {
    let mut spec = TrainSpec::default();
    change(&mut spec);
    let dataset = read_text(format!("{row}\n").repeat(12), &spec)?;
    Ok((marked(&tokenizer(None, false), &dataset.rows.row(0)?), dataset.report))
}

fn text_of(row: &Value) -> String {
    read(row, |_| ()).unwrap_or_else(|error| panic!("{row}: {error}")).0
}

fn error_of(row: &Value) -> BadRow {
    match read(row, |_| ()) {
        Err(Error::Dataset(DatasetError::BadRows(report))) => report.bad_rows[0].clone(),
        other => panic!("{row}: {:?}", other.map(|(text, _)| text)),
    }
}

#[test]
fn formats_are_told_by_their_keys() {
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    let turns = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    for (row, format) in [
        (json!({"messages": messages, "text": "x"}), Format::Chat),
        (json!({"conversations": turns, "id": 1}), Format::Sharegpt),
        (json!({"instruction": "q", "output": "a", "text": "both"}), Format::Alpaca),
        (json!({"prompt": "q", "completion": "a"}), Format::Completion),
        (json!({"input": "q", "output": "a"}), Format::Completion),
        (json!({"text": "a text", "url": "x"}), Format::Text),
    ] {
        let (_, report) = read(&row, |_| ()).unwrap_or_else(|error| panic!("{row}: {error}"));
        assert_eq!(report.format, Some(format), "{row}");
    }
}

#[test]
fn rows_of_preferences_are_no_examples() {
    let turns = json!([{"from": "human", "value": "q"}]);
    for row in [
        json!({"conversations": turns, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
        json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
        json!({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}),
        json!({"prompt": "q", "completion": "a", "label": false}),
    ] {
        let error = dataset_error(read(&row, |_| ()).map(|_| panic!("{row}"))).to_string();
        assert!(error.contains("preference data, which is not supported"), "{error}");
    }
}

#[test]
fn completion_and_text_have_no_template() {
    let completion = json!({"prompt": "Q: 1+1?\nA:", "completion": " 2"});
    assert_eq!(text_of(&completion), "Q: 1+1?\nA:[ 2<|im_end|>]");
    assert_eq!(
        read(&completion, |spec| spec.dataset.train_on = TrainOn::All).expect("reads").0,
        "Q[: 1+1?\nA: 2<|im_end|>]"
    );
    assert_eq!(text_of(&json!({"input": "q", "output": "a"})), "q[a<|im_end|>]");
    // An end that the file writes itself is not written twice.
    assert_eq!(text_of(&json!({"prompt": "<|im_start|>q", "completion": "a<|im_end|>"})), "<|im_start|>q[a<|im_end|>]");
    assert_eq!(text_of(&json!({"text": "once upon"})), "o[nce upon<|im_end|>]");
    let bad = error_of(&json!({"prompt": "q", "completion": " "}));
    assert_eq!((bad.pointer.as_str(), bad.code), ("/completion", BadRowCode::EmptyField));
    let bad = error_of(&json!({"prompt": [{"role": "user", "content": "q"}], "completion": []}));
    assert_eq!((bad.pointer.as_str(), bad.code), ("/prompt", BadRowCode::WrongType));
    let with_bos = tokenizer(None, true);
    let template = ChatTemplate::for_model(&Template::Auto, &with_bos).expect("compiles");
    let encoder =
        encode::Encoder { template: &template, tokenizer: &with_bos, train_on: TrainOn::Completions, max_tokens: 64 };
    let text = |text: &str| marked(&with_bos, &encoder.encode(&Content::Text(text.into())).expect("encodes"));
    assert_eq!(
        (text("a").as_str(), text("<|im_start|>a").as_str()),
        ("<|im_start|>[a<|im_end|>]", "<|im_start|>[a<|im_end|>]")
    );
}

#[test]
fn sharegpt_has_its_roles_a_system_text_and_weights() {
    let row = json!({"system": "s", "conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0},
        {"from": "user", "value": "r"}, {"from": "bard", "value": "b"},
    ]});
    assert_eq!(
        text_of(&row),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n\
         <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]"
    );
    for (row, pointer, code) in [
        (json!({"conversations": [{"from": "alien", "value": "q"}]}), "/conversations/0/from", BadRowCode::UnknownRole),
        (json!({"conversations": [{"from": "human"}]}), "/conversations/0/value", BadRowCode::MissingField),
        (json!({"conversations": [{"from": "human", "value": "q"}]}), "/conversations", BadRowCode::NoAssistantMessage),
        (
            json!({"conversations": [{"role": "user", "content": "q"}]}),
            "/conversations/0/from",
            BadRowCode::MissingField,
        ),
        (
            json!({"conversations": [{"from": "function_call", "value": "f()"}]}),
            "/conversations/0/value",
            BadRowCode::InvalidValue,
        ),
        (json!({"conversations": [], "tools": "{"}), "/tools", BadRowCode::InvalidValue),
    ] {
        let bad = error_of(&row);
        assert_eq!((bad.pointer.as_str(), bad.code), (pointer, code), "{row}: {}", bad.message);
    }
}

#[test]
fn columns_go_by_the_names_of_the_file() {
    let row = json!({"question": "q", "answer": "a", "output": "not this", "a/b": "Be brief."});
    let named = |columns: &[(&str, &str)]| {
        let columns = columns.iter().map(|&(field, column)| (field.to_owned(), column.to_owned())).collect();
        move |spec: &mut TrainSpec| {
            spec.dataset.format = DatasetFormat::Alpaca;
            spec.dataset.columns = columns;
        }
    };
    let (text, report) =
        read(&row, named(&[("instruction", "question"), ("output", "answer"), ("system", "a/b")])).expect("reads");
    assert!(text.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>"), "{text}");
    assert_eq!(report.ignored_fields.keys().collect::<Vec<_>>(), ["output"]);
    let typo = named(&[("instruction", "question"), ("output", "answer"), ("input", "contxt")]);
    let error = dataset_error(read(&row, typo).map(|_| panic!("no such column"))).to_string();
    assert_eq!(error, "dataset.columns names the column `contxt` for input, but no row has it");
    match read(&row, named(&[("instruction", "question"), ("output", "x/y")])) {
        Err(Error::Dataset(DatasetError::BadRows(report))) => {
            assert_eq!(report.bad_rows[0].message, "/x~1y is missing");
        }
        other => panic!("{:?}", other.map(|(text, _)| text)),
    }
}

#[test]
fn chat_content_may_be_parts_and_developers_are_the_system() {
    let row = json!({"messages": [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "a", "refusal": null},
    ]});
    let (text, report) = read(&row, |_| ()).expect("reads");
    assert!(text.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>"), "{text}");
    assert!(report.ignored_fields.is_empty());
}
