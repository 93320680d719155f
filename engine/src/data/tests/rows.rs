//! Layouts, formats and bad rows.

use proptest::prelude::*;

use super::*;
use crate::spec::DatasetFormat;

const GOOD: &str = r#"{"instruction": "Say a.", "output": "a"}"#;

fn lines(row: &str, count: usize) -> String {
    format!("{row}\n").repeat(count)
}

/// Twelve rows, of which the seventh is this one.
fn bad_row(row: &str, good: &str) -> BadRow {
    let content = format!("{}{row}\n{}", lines(good, 6), lines(good, 5));
    match dataset_error(read_text(content, &TrainSpec::default())) {
        DatasetError::BadRows(report) => {
            assert_eq!((report.rows, report.bad_row_count, report.bad_rows.len()), (12, 1, 1), "{row}");
            report.bad_rows[0].clone()
        }
        other => panic!("{row}: {other}"),
    }
}

#[test]
fn an_array_and_lines_give_the_same_rows() {
    let rows: Vec<String> =
        (0..12).map(|i| format!(r#"{{"instruction": "Count to {i}.", "input": "", "output": "{i} 世界"}}"#)).collect();
    let spec = TrainSpec::default();
    let from_lines = read_text(rows.join("\n"), &spec).expect("lines");
    let windows = read_text(format!("\u{feff}{}\r\n\r\n", rows.join("\r\n")), &spec).expect("Windows lines");
    let array = read_text(format!("[\n{}\n]", rows.join(",\n")), &spec).expect("an array");
    assert_eq!(from_lines.report.format, Some(Format::Alpaca));
    assert_eq!((from_lines.rows.len(), from_lines.report.rows, from_lines.report.truncated_rows), (12, 12, 0));
    let rows: Vec<Row> = from_lines.rows.iter().collect::<Result<_>>().expect("reads");
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
    let trained: usize = rows.iter().map(Row::trained_tokens).sum();
    assert_eq!((from_lines.report.tokens, from_lines.report.trained_tokens), (tokens as u64, trained as u64));
    for other in [&windows, &array] {
        assert_eq!((other.rows.digest(), &other.report), (from_lines.rows.digest(), &from_lines.report));
    }
}

#[test]
fn bad_alpaca_rows_say_where_and_what() {
    use BadRowCode::*;
    let table = [
        (r#"{"instruction": "x", "output": 5}"#, "/output", WrongType, "/output must be a string, got a number"),
        (r#"{"instruction": "x", "output": ["a"]}"#, "/output", WrongType, "/output must be a string, got an array"),
        (
            r#"{"instruction": "x", "input": 1, "output": "y"}"#,
            "/input",
            WrongType,
            "/input must be a string, got a number",
        ),
        (r#"{"output": "y"}"#, "/instruction", MissingField, "/instruction is missing"),
        (r#"{"instruction": "x"}"#, "/output", MissingField, "/output is missing"),
        (r#"{"instruction": " ", "output": "y"}"#, "/instruction", EmptyField, "/instruction is empty"),
        (r#"{"instruction": "x", "output": ""}"#, "/output", EmptyField, "/output is empty"),
        (
            r#"{"messages": []}"#,
            "",
            MixedFormat,
            "the row has the key `messages`, but the format of this file is alpaca",
        ),
        (r#"["x"]"#, "", NotAnObject, "the row is an array, not an object"),
        ("7", "", NotAnObject, "the row is a number, not an object"),
        (
            r#"{"instruction": "x", "output": "y""#,
            "",
            InvalidJson,
            "invalid JSON at column 34: EOF while parsing an object",
        ),
        (r#"{"instruction": "\ud800", "output": "y"}"#, "", InvalidJson, "invalid JSON at column 24: "),
    ];
    for (row, pointer, code, message) in table {
        let bad = bad_row(row, GOOD);
        assert_eq!((bad.line, bad.row, bad.pointer.as_str(), bad.code), (7, 7, pointer, code), "{row}");
        assert!(bad.message.starts_with(message), "{row}: {}", bad.message);
    }
}

#[test]
fn bad_chat_rows_say_where_and_what() {
    use BadRowCode::*;
    let user = r#"{"role": "user", "content": "q"}"#;
    let answer = r#"{"role": "assistant", "content": "a"}"#;
    let chat = |messages: &[&str]| format!(r#"{{"messages": [{}]}}"#, messages.join(", "));
    let good = chat(&[user, answer]);
    let table = [
        (chat(&[user]), "/messages", NoAssistantMessage),
        (chat(&[]), "/messages", NoAssistantMessage),
        (chat(&[user, answer, user]), "/messages", LastMessageNotAssistant),
        (chat(&[answer]), "/messages", NoPrompt),
        (chat(&[user, r#"{"role": "assistant", "content": "a", "weight": 0}"#]), "/messages", NoAssistantMessage),
        (chat(&[user, r#"{"role": "assistant", "content": "a", "weight": 2}"#]), "/messages/1/weight", InvalidValue),
        (chat(&[user, r#"{"role": "assistant", "content": "a", "weight": "1"}"#]), "/messages/1/weight", InvalidValue),
        (chat(&[r#"{"role": "user", "content": "q", "weight": 1}"#, answer]), "/messages/0/weight", InvalidValue),
        (chat(&[user, r#"{"role": "assistant", "content": ""}"#]), "/messages/1/content", EmptyField),
        (chat(&[user, r#"{"role": "assistant", "content": null}"#]), "/messages/1/content", WrongType),
        (chat(&[user, r#"{"role": "assistant"}"#]), "/messages/1/content", MissingField),
        (
            chat(&[r#"{"role": "user", "content": [{"type": "image_url"}]}"#, answer]),
            "/messages/0/content/0",
            UnsupportedField,
        ),
        (
            chat(&[r#"{"role": "user", "content": [{"type": "text"}]}"#, answer]),
            "/messages/0/content/0/text",
            MissingField,
        ),
        (chat(&[user, r#"{"role": "critic", "content": "x"}"#, answer]), "/messages/1/role", UnknownRole),
        (chat(&[user, r#"{"role": 1, "content": "x"}"#, answer]), "/messages/1/role", WrongType),
        (chat(&[r#"{"content": "x"}"#, answer]), "/messages/0/role", MissingField),
        (
            chat(&[r#"{"role": "user", "content": "q", "tool_calls": [{}]}"#, answer]),
            "/messages/0/tool_calls",
            InvalidValue,
        ),
        (
            chat(&[user, r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}"#]),
            "/messages/1/tool_calls/0/function/arguments",
            InvalidValue,
        ),
        (
            chat(&[user, r#"{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}"#]),
            "/messages/1/tool_calls/0/function/arguments",
            InvalidValue,
        ),
        (
            chat(&[user, r#"{"role": "assistant", "tool_calls": [{"function": {}}]}"#]),
            "/messages/1/tool_calls/0/function/name",
            MissingField,
        ),
        (chat(&[r#""q""#, answer]), "/messages/0", WrongType),
        (r#"{"messages": "hi"}"#.to_owned(), "/messages", WrongType),
        (r#"{"prompt": "hi"}"#.to_owned(), "/messages", MissingField),
        (format!(r#"{{"tools": [{{}}], {}"#, &good[1..]), "/tools/0/name", MissingField),
        (format!(r#"{{"tools": "[", {}"#, &good[1..]), "/tools", InvalidValue),
        (format!(r#"{{"functions": 5, {}"#, &good[1..]), "/functions", WrongType),
        (GOOD.to_owned(), "", MixedFormat),
    ];
    for (row, pointer, code) in table {
        let bad = bad_row(&row, &good);
        assert_eq!((bad.line, bad.pointer.as_str(), bad.code), (7, pointer, code), "{row}: {}", bad.message);
    }
}

#[test]
fn broken_json_in_an_array_names_its_own_line() {
    let rows = [GOOD; 12].map(str::to_owned);
    let broken = |at: usize, row: &str| {
        let mut rows = rows.clone();
        rows[at] = row.to_owned();
        match dataset_error(read_text(format!("[\n{}\n]\n", rows.join(",\n")), &TrainSpec::default())) {
            DatasetError::BadRows(report) => *report,
            other => panic!("{other}"),
        }
    };
    let report = broken(5, "{\"instruction\": \"x\",\n \"output\" \"y\"}");
    assert_eq!((report.rows, report.bad_row_count), (12, 1));
    assert_eq!((report.bad_rows[0].line, report.bad_rows[0].row), (8, 6));
    // A string that swallows the rows after it: what follows cannot be told apart.
    let report = broken(5, "{\"instruction\": \"x, \"output\": \"y\"}");
    assert_eq!((report.bad_row_count, report.bad_rows[0].row), (1, 6));
    assert!(dataset_error(read_text(format!("[{GOOD},\n"), &TrainSpec::default())).report().is_some());
}

#[test]
fn a_report_lists_a_hundred_bad_rows_and_counts_all() {
    let content = format!("{}{}", lines(GOOD, 300), lines("{\"instruction\": \"x\"}", 250));
    let error = dataset_error(read_text(content, &TrainSpec::default()));
    assert_eq!(error.to_string(), "250 of 550 rows cannot be used, first: line 301: /output is missing");
    let report = error.report().expect("a report");
    assert_eq!((report.bad_rows.len(), report.bad_rows[99].line), (LISTED_BAD_ROWS, 400));
    let json = serde_json::to_string(report).expect("serializes");
    assert_eq!(&serde_json::from_str::<Report>(&json).expect("parses"), report);
    assert!(json.contains(r#""code":"missing_field""#), "{json}");
}

#[test]
fn files_that_are_no_data_set_are_refused_by_name() {
    let spec = TrainSpec::default();
    let of = |content: &[u8]| dataset_error(read_text(content, &spec));
    for empty in ["", "\n \n", "[]", "\u{feff}"] {
        let error = of(empty.as_bytes());
        assert_eq!((error.code(), error.to_string().as_str()), ("invalid_training_file", "the file is empty"));
    }
    let few = of(lines(GOOD, 3).as_bytes());
    assert_eq!(few.code(), "invalid_n_examples");
    assert_eq!(few.to_string(), "Training file has 3 example(s), but must have at least 10 examples");
    let unknown = of(lines(r#"{"question": "x", "answer": "y"}"#, 12).as_bytes()).to_string();
    assert!(unknown.contains("keys `question`, `answer`") && unknown.contains("supported: chat"), "{unknown}");
    assert!(
        matches!(of(b"\xff\xfe{\x00"), DatasetError::BadRows(report) if report.bad_rows[0].code == BadRowCode::InvalidUtf8)
    );
    let (path, scratch) = (Path::new("/nowhere/data.jsonl"), std::env::temp_dir());
    let missing = dataset_error(prepare(path, &spec, &tokenizer(None, false), 512, &scratch, &mut || ()));
    assert!(matches!(&missing, DatasetError::Io { .. }) && missing.to_string().contains("/nowhere/data.jsonl"));
}

#[test]
fn a_format_that_is_named_is_not_guessed() {
    let mut spec = TrainSpec::default();
    spec.dataset.format = DatasetFormat::Chat;
    let error = dataset_error(read_text(lines(GOOD, 12), &spec));
    assert_eq!(error.report().map(|report| report.bad_row_count), Some(12));
}

#[test]
fn unknown_fields_are_tolerated_and_counted() {
    let row = r#"{"id": 1, "messages": [{"role": "user", "content": "q", "name": "Ann"},
        {"role": "assistant", "content": "a"}]}"#
        .replace('\n', " ");
    let report = read_text(lines(&row, 12), &TrainSpec::default()).expect("fine").report;
    let ignored: Vec<(&str, u64)> = report.ignored_fields.iter().map(|(name, &rows)| (name.as_str(), rows)).collect();
    assert_eq!(ignored, [("id", 12), ("messages.name", 12)]);
}

#[test]
fn rows_are_cut_at_max_seq_length_and_those_without_an_answer_left_out() {
    let mut spec = TrainSpec::default();
    let long = format!(r#"{{"instruction": "{}", "output": "a"}}"#, "x ".repeat(200));
    let content = format!("{}{}\n", lines(GOOD, 11), long);
    spec.training.max_seq_length = Some(100);
    let cut = read_text(&content, &spec).expect("eleven rows are left");
    assert_eq!((cut.rows.len(), cut.report.truncated_rows, cut.report.dropped_rows), (11, 1, 1));
    assert!(cut.report.longest > 200);
    spec.training.max_seq_length = Some(8);
    let error = dataset_error(read_text(&content, &spec));
    assert!(matches!(error, DatasetError::NothingToTrain(_)), "{error}");
    spec.training.max_seq_length = Some(4096);
    assert!(matches!(read_text(&content, &spec), Err(Error::Spec(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Pieces of JSON in any order, some of them broken: always an answer, and every row accounted for.
    #[test]
    fn no_file_makes_the_reader_fail(pieces in prop::collection::vec(prop::sample::select(vec![
        "[", "]", "{", "}", ",", "\n", "\"", "\\", ":", " ", "\"messages\"", "\"instruction\": \"x\"", "\"output\": \"y\"",
        "{\"instruction\": \"x\", \"output\": \"y\"}\n", "{\"instruction\": \"x\", \"output\": \"y\"},", "\u{feff}", "é", "7",
    ]), 0..40)) {
        match read_text(pieces.concat(), &TrainSpec::default()) {
            Ok(dataset) => prop_assert_eq!(dataset.rows.len() as u64, dataset.report.rows),
            Err(Error::Dataset(error)) => {
                if let Some(report) = error.report() {
                    prop_assert!(report.bad_row_count <= report.rows && report.bad_rows.len() as u64 <= report.bad_row_count);
                }
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[test]
fn a_million_spaces_are_a_row_like_any_other() {
    let began = std::time::Instant::now();
    let spaces = " ".repeat(1_000_000);
    let row = format!("{{\"instruction\": \"a{spaces}b\", \"output\": \"c{spaces}d\"}}\n");
    let mut spec = TrainSpec::default();
    spec.training.max_seq_length = Some(512);
    let read = read_text(row + &lines(GOOD, 11), &spec).expect("reads");
    assert_eq!((read.report.rows, read.report.truncated_rows, read.report.dropped_rows), (12, 1, 1));
    assert!(read.report.longest > 1000, "{}", read.report.longest);
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}
