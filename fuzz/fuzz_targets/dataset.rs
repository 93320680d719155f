//! A data set: read, reported, shown and kept in tokens, in every format and layout, under every kind of template.
//!
//! The first two bytes of an input say how it is read; where they ask for a template in Jinja, its text stands before the rows
//! and ends in a zero byte.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use lorad_engine::Error;
use lorad_engine::data::{self, MIN_ROWS};
use lorad_engine::spec::{
    Columns, DatasetFormat, DatasetOptions, Template, TrainOn, TrainOptions, TrainSpec, TrainingOptions,
};
use lorad_engine::tokenizer::Tokenizer;
use lorad_fuzz::{file, folder, seeds};

/// Rows that a template of the input is rendered for: each may take a rendering's whole fuel.
const TEMPLATE_ROWS: usize = 2;

static TOKENIZERS: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| [false, true].map(lorad_fuzz::tokenizer));

fuzz_target!(init: lorad_fuzz::begin(seeds::dataset), |data: &[u8]| {
    let [first, second, rest @ ..] = data else { return };
    let Some((options, rows)) = options(*first, *second, rest) else { return };
    let Ok(spec) = TrainSpec::resolve(&options) else { return };
    let path = file("rows", rows);
    check(&path, &spec, &TOKENIZERS[usize::from(first & 1)]);
});

/// How the rows are read, and the rows.
fn options(first: u8, second: u8, rest: &[u8]) -> Option<(TrainOptions, &[u8])> {
    let (template, rows) = match first >> 1 & 3 {
        0 => (None, rest),
        1 => (Some(Template::Alpaca), rest),
        _ => {
            let end = rest.iter().position(|&byte| byte == 0)?;
            let text = std::str::from_utf8(&rest[..end]).ok()?;
            (Some(Template::Jinja(text.to_owned())), first_lines(&rest[end + 1..]))
        }
    };
    let formats = DatasetFormat::ALL;
    let format = (first >> 4).checked_sub(1).map(|format| formats[usize::from(format) % formats.len()]);
    let columns = (second & 4 != 0)
        .then(|| Columns::from([("output".into(), "input".into()), ("instruction".into(), "q~/".into())]));
    let train_on = (second & 1 != 0).then_some(TrainOn::All);
    let training = TrainingOptions { max_seq_length: (second & 8 != 0).then_some(16), ..TrainingOptions::default() };
    let dataset = DatasetOptions { format, columns, template, train_on };
    Some((TrainOptions { training, dataset, ..TrainOptions::default() }, rows))
}

fn first_lines(rows: &[u8]) -> &[u8] {
    let end = rows.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(TEMPLATE_ROWS - 1);
    end.map_or(rows, |(end, _)| &rows[..end])
}

/// Reads the rows in every way and compares what is said of them.
fn check(path: &Path, spec: &TrainSpec, tokenizer: &Tokenizer) {
    let context_length = 512;
    let preview = data::preview(path, spec, tokenizer, context_length, 3);
    if let Ok(preview) = &preview {
        assert!(preview.rows.len() <= 3);
        serde_json::to_string(preview).expect("a preview is JSON");
    }
    let (report, hashes) = match data::survey(path, spec, tokenizer, context_length, None, &mut || ()) {
        Ok(survey) => survey,
        Err(Error::Dataset(_) | Error::Template(_) | Error::Tokenizer(_) | Error::Spec(_)) => return,
        Err(error) => panic!("an input is no reason for {error}"),
    };
    serde_json::to_string(&report).expect("a report is JSON");
    report.bad_rows.iter().for_each(|row| assert!(!row.to_string().is_empty()));
    assert_eq!(report.rows, report.bad_row_count + report.histogram.iter().map(|bin| bin.rows).sum::<u64>());
    let (again, _) =
        data::survey(path, spec, tokenizer, context_length, Some(&hashes), &mut || ()).expect("the same file");
    let overlap = again.overlap.as_ref().map_or(0, |overlap| overlap.rows);
    assert_eq!((again.tokens, overlap), (report.tokens, report.rows - report.bad_row_count));
    let verdict = report.clone().verdict(MIN_ROWS);
    match data::prepare(path, spec, tokenizer, context_length, folder(), &mut || ()) {
        Err(error) => assert!(verdict.is_err(), "{error}"),
        Ok(dataset) => {
            verdict.expect("the same rows");
            assert_eq!(dataset.rows.len() as u64, report.rows - report.dropped_rows);
            let rows: Vec<data::Row> = dataset.rows.iter().collect::<Result<_, _>>().expect("kept rows");
            let all = rows.iter().flat_map(|row| &row.tokens);
            assert!(all.clone().all(|&token| (token as usize) < tokenizer.vocab_size()));
            assert_eq!(all.count() as u64, report.tokens);
            assert_eq!(rows.iter().map(data::Row::trained_tokens).sum::<usize>() as u64, report.trained_tokens);
        }
    }
}
