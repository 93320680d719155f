//! Published data sets, where they are at hand: in the folder that LORAD_SHARED_DATA names, or beside the repository.

use std::path::PathBuf;

use super::*;
use crate::spec::{DatasetFormat, Template};

fn shared(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LORAD_SHARED_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there", path.display());
    None
}

fn read_shared(name: &str, template: Template) -> Option<Result<Dataset>> {
    let mut spec = TrainSpec::default();
    spec.dataset.template = template;
    shared(name)
        .map(|path| prepare(&path, &spec, &tokenizer(Some(CHATML), false), 2048, &std::env::temp_dir(), &mut || ()))
}

#[test]
fn published_sets_are_read_to_the_last_row() {
    let table = [
        ("alpaca_en_demo.json", Format::Alpaca, 999),
        ("alpaca_zh_demo.json", Format::Alpaca, 1000),
        ("identity.json", Format::Alpaca, 91),
        ("conversations.jsonl", Format::Chat, 128),
        ("glaive_toolcall_en_demo.json", Format::Sharegpt, 300),
        ("c4_demo.jsonl", Format::Text, 300),
    ];
    for (name, format, rows) in table {
        for template in [Template::Auto, Template::Alpaca] {
            let Some(dataset) = read_shared(name, template.clone()) else { continue };
            let dataset = dataset.unwrap_or_else(|error| panic!("{name}: {error}"));
            let report = &dataset.report;
            assert_eq!((report.format, report.rows, report.bad_row_count), (Some(format), rows, 0), "{name}");
            assert_eq!(dataset.rows.len() as u64 + report.dropped_rows, rows, "{name}");
            let tokenizer = tokenizer(None, false);
            for row in dataset.rows.iter().map(|row| row.expect("reads")).filter(|row| row.tokens.len() < 2048) {
                assert_eq!(row.tokens.last().copied(), tokenizer.eos(), "{name}");
                assert_eq!((row.trained[0], row.trained.last()), (false, Some(&true)), "{name}");
            }
        }
    }
}

#[test]
fn columns_of_a_published_set_are_named() {
    let Some(path) = shared("gsm8k_test.jsonl") else { return };
    let read = |columns: [(&str, &str); 2]| {
        let mut spec = TrainSpec::default();
        spec.dataset.columns = columns.map(|(field, column)| (field.to_owned(), column.to_owned())).into();
        spec.dataset.format = DatasetFormat::Alpaca;
        prepare(&path, &spec, &tokenizer(Some(CHATML), false), 2048, &std::env::temp_dir(), &mut || ())
    };
    let report = read([("instruction", "question"), ("output", "answer")]).expect("two columns").report;
    assert_eq!((report.rows, report.bad_row_count, report.ignored_fields.len()), (1319, 0, 0));
    let error = dataset_error(read([("instruction", "question"), ("output", "anwser")])).to_string();
    assert!(error.contains("1319 of 1319 rows cannot be used, first: line 1: /anwser is missing"), "{error}");
}

#[test]
fn published_sets_of_other_kinds_are_refused_by_name() {
    let table = [
        ("toy_chat_fine_tuning.jsonl", "Training file has 5 example(s), but must have at least 10 examples"),
        ("dpo_en_demo.first60.json", "(this looks like preference data, which is not supported)"),
        (
            "gsm8k_test.jsonl",
            r#"the first has keys `question`, `answer` (name them: dataset.columns {"instruction": "question", "output": "answer"})"#,
        ),
        ("seed_tasks.jsonl", "175 of 175 rows cannot be used, first: line 1: /instances holds examples within the row"),
    ];
    for (name, message) in table {
        let Some(dataset) = read_shared(name, Template::Auto) else { continue };
        let error = dataset_error(dataset).to_string();
        assert!(error.contains(message), "{name}: {error}");
    }
}
