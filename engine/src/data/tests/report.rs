//! What a report says of good files, and what a preview shows.

use serde_json::json;

use super::*;

fn survey_text(content: &str, spec: &TrainSpec, training: Option<&RowHashes>) -> Result<(Report, RowHashes)> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(content.as_bytes()).expect("written");
    survey(file.path(), spec, &tokenizer(Some(CHATML), false), 512, training, &mut || ())
}

fn row(question: &str, answer: &str) -> String {
    json!({"instruction": question, "output": answer}).to_string() + "\n"
}

#[test]
fn lengths_and_repeated_rows_are_counted() {
    let mut content: String = (0..30).map(|i| row(&format!("Count to {i}."), "one")).collect();
    content.push_str(&row("Count to 3.", "one"));
    // The same to the model, though not in the file.
    content.push_str("{\"id\": 7, \"output\": \"one\", \"input\": \"\", \"instruction\": \"Count to 3.\"}\n");
    content.push_str(&row(&"long ".repeat(100), "one"));
    let mut spec = TrainSpec::default();
    spec.training.max_seq_length = Some(64);
    let (report, hashes) = survey_text(&content, &spec, None).expect("reads");
    assert_eq!((report.rows, report.duplicates.rows, &report.duplicates.lines[..]), (33, 2, &[31, 32][..]));
    assert_eq!((report.truncated_rows, report.dropped_rows), (1, 1));
    assert_eq!(report.histogram.iter().map(|bin| bin.rows).sum::<u64>(), 33);
    let last = report.histogram.last().expect("a bin");
    assert!(last.rows == 1 && (last.up_to / 2..=last.up_to).contains(&report.longest), "{report:?}");
    assert!(report.p50 <= report.p95 && report.p95 < report.longest, "{report:?}");
    let control: Vec<&str> = ["<|im_start|>", "<|im_end|>"].into();
    let tokenizer = tokenizer(None, false);
    let seen: Vec<&str> = report.control_tokens.iter().filter_map(|&id| tokenizer.token_text(id)).collect();
    assert_eq!(seen.len(), 2);
    assert!(control.iter().all(|text| seen.contains(text)), "{seen:?}");
    assert_eq!(report.overlap, None);

    let validation = row("Count to 99.", "one") + &row("Count to 5.", "one") + &row("Count to 5.", "two");
    let (report, _) = survey_text(&validation, &spec, Some(&hashes)).expect("reads");
    assert_eq!(report.overlap, Some(Repeats { rows: 1, lines: vec![2] }));
    assert!(report.clone().verdict(1).is_ok());
    assert!(matches!(report.verdict(MIN_ROWS), Err(DatasetError::TooFewRows { rows: 3, needed: 10 })));
}

#[test]
fn a_report_is_there_for_a_file_that_cannot_be_trained_on() {
    let content = row("q", "a").repeat(3) + "{\"instruction\": 1}\n" + &row("q", "b");
    let (report, _) = survey_text(&content, &TrainSpec::default(), None).expect("reads");
    assert_eq!((report.rows, report.bad_row_count, report.duplicates.rows), (5, 1, 2));
    assert_eq!(report.bad_rows[0].line, 4);
    assert!(matches!(report.verdict(1), Err(DatasetError::BadRows(_))));
    let (empty, _) = survey_text("", &TrainSpec::default(), None).expect("reads");
    assert_eq!(empty, Report::default());
    assert!(matches!(empty.verdict(1), Err(DatasetError::Empty)));
}

#[test]
fn a_preview_shows_rows_token_by_token() {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    let content =
        row("Say 世界.", "世界") + "{\"instruction\": 5}\n" + &row(&"long ".repeat(100), "a") + &row("q", "a");
    file.write_all(content.as_bytes()).expect("written");
    let mut spec = TrainSpec::default();
    spec.training.max_seq_length = Some(60);
    let tokenizer = tokenizer(Some(CHATML), false);
    let preview = preview(file.path(), &spec, &tokenizer, 512, 3).expect("reads");
    assert_eq!((preview.format, preview.rows.len()), (Some(Format::Alpaca), 3));
    let [good, bad, cut] = &preview.rows[..] else { panic!("three rows") };
    assert!(good.text.ends_with("<|im_start|>assistant\n世界<|im_end|>"), "{}", good.text);
    let trained: Vec<u8> = good
        .tokens
        .iter()
        .filter(|token| token.trained)
        .flat_map(|token| tokenizer.token_bytes(token.id))
        .copied()
        .collect();
    assert_eq!(String::from_utf8_lossy(&trained), "世界<|im_end|>");
    assert_eq!((good.line, good.cut_tokens, good.problem.is_none()), (1, 0, true));
    assert_eq!(bad.problem.as_ref().map(|problem| (problem.line, problem.code)), Some((2, BadRowCode::WrongType)));
    assert_eq!((cut.tokens.len(), cut.cut_tokens > 30), (60, true));
    let json = serde_json::to_string(&preview).expect("JSON");
    assert_eq!(serde_json::from_str::<Preview>(&json).expect("and back"), preview);
}

#[test]
fn a_template_of_the_callers_is_blamed_by_its_field() {
    let mut spec = TrainSpec::default();
    spec.dataset.template = crate::spec::Template::Jinja("{{ nothing.at.all }}".into());
    match survey_text(&row("q", "a"), &spec, None) {
        Err(Error::Spec(error)) => {
            assert_eq!(error.field, "dataset.template");
            assert!(error.message.starts_with("dataset.template: it does not render: "), "{}", error.message);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn characters_without_a_token_are_counted() {
    let mut metadata = metadata(Some(CHATML), false);
    // The characters that stand for the bytes of U+0004 and of a half of the é in byte-level vocabularies.
    for byte in ["\u{104}", "\u{a9}"] {
        let token = metadata.tokens.iter_mut().find(|token| *token == byte).expect("a token of that byte");
        *token = format!("<gone {byte}>");
    }
    metadata.merges.retain(|merge| !merge.contains('\u{104}') && !merge.contains('\u{a9}'));
    let tokenizer = Tokenizer::new(metadata).expect("a tokenizer");
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    let content =
        row("caf\u{e9}\u{4}", "one") + &row("q", "\u{e9}\u{e9}") + "{\"instruction\": 1, \"output\": \"\u{e9}\"}\n";
    file.write_all(content.as_bytes()).expect("written");
    let (report, _) = survey(file.path(), &TrainSpec::default(), &tokenizer, 512, None, &mut || ()).expect("reads");
    assert_eq!((report.lost_characters, report.bad_row_count), (4, 1));
    let (whole, _) = survey_text(&content, &TrainSpec::default(), None).expect("reads");
    assert_eq!(whole.lost_characters, 0);
}
