//! `lorad dataset`: what a data set holds, and what the model will see of it; and what every command line says about one.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::{Args, Subcommand};
use lorad_engine::data::{self, DatasetError, MIN_ROWS, Preview, PreviewRow, Repeats, Report};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::{Config, untrained_tokens};
use lorad_engine::spec::{
    Columns, DatasetFormat, DatasetOptions, Template, TrainOn, TrainOptions, TrainSpec, TrainingOptions,
};
use lorad_engine::tokenizer::Tokenizer;
use serde_json::json;

use super::terminal::{in_line, printable};
use super::{ModelArgs, named};
use crate::memory::Bound;

/// Lines of repeated rows that a person is shown.
const SHOWN_LINES: usize = 10;
/// Characters of the histogram's longest bar.
const BAR: u64 = 40;

/// Looks at a data set before anything is trained on it.
#[derive(Debug, Args)]
pub struct DatasetCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Says what a data set holds: rows, tokens, what would be cut, repeated rows, and every row that cannot be used
    ///
    /// Fails where the data set cannot be trained on.
    Report(ReportArgs),
    /// Shows the first rows as the model will see them, with the tokens that have a loss marked
    Preview(PreviewArgs),
}

#[derive(Debug, Args)]
struct ReportArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Data set of a validation: reported too, and compared with --data
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct PreviewArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Rows to show
    #[arg(short, long, default_value_t = 3)]
    n: usize,
}

/// A data set, and the model that it is read for.
#[derive(Debug, Args)]
struct SourceArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Data set: JSON array or JSONL
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Tokens a row may have [default: 2048, or the model's context length]
    #[arg(long)]
    max_seq_length: Option<u32>,
    #[command(flatten)]
    dataset: DatasetArgs,
}

/// How the data set is read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data set")]
pub(super) struct DatasetArgs {
    /// Row layout: auto, alpaca, sharegpt, chat, completion, text [default: auto]
    #[arg(long, value_parser = named::<DatasetFormat>)]
    format: Option<DatasetFormat>,
    /// The file's names for fields of the format: instruction=question,output=answer or {"instruction": "question", …}
    #[arg(long, value_parser = columns)]
    columns: Option<Columns>,
    /// Prompt text: auto (the model's own chat template), alpaca, a Jinja text, or @FILE that holds one [default: auto]
    #[arg(long, value_parser = template)]
    template: Option<Template>,
    /// Which tokens have a loss: completions, all [default: completions]
    #[arg(long, value_parser = named::<TrainOn>)]
    train_on: Option<TrainOn>,
}

impl DatasetArgs {
    /// What was said, for the engine.
    pub(super) fn options(&self) -> DatasetOptions {
        let Self { format, columns, template, train_on } = self;
        DatasetOptions { format: *format, columns: columns.clone(), template: template.clone(), train_on: *train_on }
    }
}

fn columns(text: &str) -> Result<Columns, String> {
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    let mut columns = Columns::new();
    for pair in text.split(',') {
        let Some((field, column)) = pair.split_once('=') else {
            return Err(format!("expected field=column, got `{pair}`"));
        };
        if columns.insert(field.trim().to_owned(), column.trim().to_owned()).is_some() {
            return Err(format!("the field `{}` stands twice", field.trim()));
        }
    }
    Ok(columns)
}

/// Reads a template's name, its text, or the file that holds it.
pub(super) fn template(text: &str) -> Result<Template, String> {
    match text.strip_prefix('@') {
        None => named(text),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
            Ok(Template::Jinja(text))
        }
    }
}

/// Runs the command.
///
/// # Errors
/// A base model or data set that cannot be read; a report on a data set that cannot be trained on.
pub fn run(command: &DatasetCommand) -> anyhow::Result<()> {
    let _bound = Bound::begin();
    match &command.action {
        Action::Report(args) => report(args),
        Action::Preview(args) => preview(args),
    }
}

/// What reading a data set takes.
struct Base {
    file: GgufFile,
    tokenizer: Tokenizer,
    context_length: usize,
    spec: TrainSpec,
}

impl SourceArgs {
    fn open(&self) -> anyhow::Result<Base> {
        let training = TrainingOptions { max_seq_length: self.max_seq_length, ..TrainingOptions::default() };
        let dataset = self.dataset.options();
        let spec = TrainSpec::resolve(&TrainOptions { training, dataset, ..TrainOptions::default() })?;
        let (_, path) = self.model.resolve()?;
        let file = GgufFile::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let context_length = Config::from_gguf(&file)?.context_length;
        Ok(Base { file, tokenizer, context_length, spec })
    }
}

fn report(args: &ReportArgs) -> anyhow::Result<()> {
    let base = args.source.open()?;
    let survey = |path: &Path, training| {
        data::survey(path, &base.spec, &base.tokenizer, base.context_length, training, &mut || ())
            .map_err(about("cannot read", path))
    };
    let (training, hashes) = survey(&args.source.data, None)?;
    let validation = args.validation.as_deref().map(|path| survey(path, Some(&hashes))).transpose()?;
    let validation = validation.map(|(report, _)| report);
    let untrained = untrained_texts(&base.file, &base.tokenizer, &training)?;
    let training_verdict = training.clone().verdict(MIN_ROWS).err().map(|error| error.to_string());
    let validation_verdict =
        validation.clone().and_then(|report| report.verdict(1).err()).map(|error| error.to_string());
    let mut out = std::io::stdout().lock();
    if args.source.json {
        let report = json!({
            "training": training,
            "validation": validation,
            "untrained_tokens": untrained,
            "training_error": training_verdict,
            "validation_error": validation_verdict,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write_report(&mut out, &args.source.data, &training)?;
        if let (Some(path), Some(report)) = (&args.validation, &validation) {
            writeln!(out)?;
            write_report(&mut out, path, report)?;
        }
        write_untrained(&mut out, &untrained)?;
    }
    out.flush()?;
    if let Some(error) = training_verdict {
        bail!("cannot train on {}: {error}", args.source.data.display());
    }
    if let (Some(path), Some(error)) = (&args.validation, validation_verdict) {
        bail!("cannot validate on {}: {error}", path.display());
    }
    Ok(())
}

/// Says what failed with which file, which an error about the file itself says on its own.
pub(super) fn about<'a>(what: &'a str, path: &'a Path) -> impl FnOnce(lorad_engine::Error) -> anyhow::Error + 'a {
    move |error| {
        let names_it = matches!(&error, lorad_engine::Error::Dataset(DatasetError::Io { .. }));
        let context =
            if names_it { "cannot read the data set".to_owned() } else { format!("{what} {}", path.display()) };
        anyhow::Error::new(error).context(context)
    }
}

/// The texts of special tokens that the rows use and the base model never learnt.
pub(super) fn untrained_texts(file: &GgufFile, tokenizer: &Tokenizer, report: &Report) -> anyhow::Result<Vec<String>> {
    let untrained = untrained_tokens(file, &report.control_tokens)?;
    Ok(untrained.into_iter().filter_map(|id| tokenizer.token_text(id)).map(str::to_owned).collect())
}

/// Warns of tokens that the base model never learnt.
pub(super) fn write_untrained(out: &mut impl Write, untrained: &[String]) -> std::io::Result<()> {
    if untrained.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "warning: the base model never learnt {}, which the rows use: with a base that is no chat model, take --template alpaca",
        in_line(&untrained.join(", "))
    )
}

fn write_report(out: &mut impl Write, path: &Path, report: &Report) -> std::io::Result<()> {
    let Report { rows, tokens, trained_tokens, p50, p95, longest, truncated_rows, dropped_rows, .. } = report;
    let format = report.format.map_or("unknown", data::Format::name);
    writeln!(out, "{}", path.display())?;
    writeln!(out, "  format      {format}")?;
    writeln!(out, "  rows        {rows}")?;
    writeln!(out, "  tokens      {tokens}, {trained_tokens} of them trained")?;
    writeln!(out, "  row length  half up to {p50} tokens, 95% up to {p95}, longest {longest}")?;
    let most = report.histogram.iter().map(|bin| bin.rows).max().unwrap_or(0).max(1);
    for bin in &report.histogram {
        let bar = "█".repeat((bin.rows * BAR).div_ceil(most) as usize);
        writeln!(out, "    up to {:>7} {:>9} {bar}", bin.up_to, bin.rows)?;
    }
    if *truncated_rows > 0 {
        writeln!(out, "  truncated   {truncated_rows} rows are cut to max_seq_length")?;
    }
    if *dropped_rows > 0 {
        writeln!(out, "  dropped     {dropped_rows} rows: nothing to train on is left of them")?;
    }
    write_repeats(out, "duplicates", "rows repeat an earlier one", &report.duplicates)?;
    if let Some(overlap) = &report.overlap {
        write_repeats(out, "overlap", "rows stand in the training file too", overlap)?;
    }
    if report.lost_characters > 0 {
        writeln!(out, "  lost        {} characters, which the tokenizer has no token for", report.lost_characters)?;
    }
    for (field, rows) in &report.ignored_fields {
        writeln!(out, "  ignored     the field `{}` of {rows} rows", in_line(field))?;
    }
    if report.bad_row_count > 0 {
        writeln!(out, "  bad         {} rows cannot be used", report.bad_row_count)?;
        for row in &report.bad_rows {
            writeln!(out, "    {}", in_line(&row.to_string()))?;
        }
        let unlisted = report.bad_row_count - report.bad_rows.len() as u64;
        if unlisted > 0 {
            writeln!(out, "    … and {unlisted} more")?;
        }
    }
    Ok(())
}

fn write_repeats(out: &mut impl Write, name: &str, what: &str, repeats: &Repeats) -> std::io::Result<()> {
    if repeats.rows == 0 {
        return Ok(());
    }
    let shown: Vec<String> = repeats.lines.iter().take(SHOWN_LINES).map(u64::to_string).collect();
    let more = if repeats.rows > shown.len() as u64 { ", …" } else { "" };
    writeln!(out, "  {name:<11} {} {what}: lines {}{more}", repeats.rows, shown.join(", "))
}

fn preview(args: &PreviewArgs) -> anyhow::Result<()> {
    let Base { tokenizer, context_length, spec, .. } = args.source.open()?;
    let path = &args.source.data;
    let preview = data::preview(path, &spec, &tokenizer, context_length, args.n).map_err(about("cannot read", path))?;
    let colours = std::io::stdout().is_terminal();
    let mut out = std::io::stdout().lock();
    if args.source.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&preview)?)?;
    } else {
        let Preview { format, rows } = &preview;
        writeln!(
            out,
            "format {}; tokens with a loss are {}",
            format.map_or("unknown", data::Format::name),
            marks(colours)
        )?;
        for row in rows {
            write_row(&mut out, row, colours)?;
        }
    }
    Ok(out.flush()?)
}

fn marks(colours: bool) -> &'static str {
    if colours { "green, every second one underlined" } else { "in ⟦ ⟧, a | between them" }
}

fn write_row(out: &mut impl Write, row: &PreviewRow, colours: bool) -> std::io::Result<()> {
    let trained = row.tokens.iter().filter(|token| token.trained).count();
    let PreviewRow { line, row: number, tokens, cut_tokens, problem, .. } = row;
    if let Some(problem) = problem {
        return writeln!(out, "\n── row {number}, cannot be used: {}", in_line(&problem.to_string()));
    }
    let cut = if *cut_tokens > 0 { format!(", {cut_tokens} more are cut") } else { String::new() };
    writeln!(out, "\n── row {number}, line {line}: {} tokens, {trained} of them trained{cut}", tokens.len())?;
    let mut inside = false;
    for (index, token) in tokens.iter().enumerate() {
        let text = printable(&token.text);
        match (token.trained, colours) {
            (true, true) if index % 2 == 0 => write!(out, "\x1b[32;4m{text}\x1b[0m")?,
            (true, true) => write!(out, "\x1b[32m{text}\x1b[0m")?,
            (false, true) => write!(out, "{text}")?,
            (trained, false) => {
                let mark = match (inside, trained) {
                    (false, true) => "⟦",
                    (true, true) => "|",
                    (true, false) => "⟧",
                    (false, false) => "",
                };
                write!(out, "{mark}{text}")?;
            }
        }
        inside = token.trained;
    }
    writeln!(out, "{}", if inside && !colours { "⟧" } else { "" })
}

/// All that was found wrong with a data set, a line each: the error itself names the first row only.
pub(super) fn list_bad_rows(error: &lorad_engine::Error) {
    let lorad_engine::Error::Dataset(error) = error else { return };
    let Some(report) = error.report() else { return };
    for row in &report.bad_rows {
        eprintln!("{}", in_line(&row.to_string()));
    }
    let unlisted = report.bad_row_count - report.bad_rows.len() as u64;
    if unlisted > 0 {
        eprintln!("… and {unlisted} more");
    }
}

/// What was found in a data set, before it is trained on.
pub(super) fn describe(report: &Report) {
    eprintln!(
        "{} rows, {} tokens, {} of them trained, longest row {}",
        report.rows, report.tokens, report.trained_tokens, report.longest
    );
    if report.truncated_rows > 0 {
        eprintln!("warning: {} rows were cut to max_seq_length", report.truncated_rows);
    }
    if report.dropped_rows > 0 {
        eprintln!("warning: {} rows were left out: nothing to train on was left of them", report.dropped_rows);
    }
    if report.duplicates.rows > 0 {
        eprintln!("warning: {} rows repeat an earlier one", report.duplicates.rows);
    }
    if report.lost_characters > 0 {
        eprintln!("warning: {} characters are lost, which the tokenizer has no token for", report.lost_characters);
    }
    for (field, rows) in &report.ignored_fields {
        eprintln!("warning: the field `{}` of {rows} rows was not looked at", in_line(field));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_pairs_or_json() {
        let expected: Columns = [("instruction", "question"), ("output", "answer")]
            .map(|(field, column)| (field.to_owned(), column.to_owned()))
            .into();
        assert_eq!(columns("instruction=question,output=answer"), Ok(expected.clone()));
        assert_eq!(columns(r#"{"instruction": "question", "output": "answer"}"#), Ok(expected));
        for wrong in ["instruction", "a=b,a=c", "{\"a\": 1}"] {
            assert!(columns(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_template_is_a_name_a_text_or_a_file() {
        assert_eq!(template("alpaca"), Ok(Template::Alpaca));
        assert!(matches!(template("{{ messages }}"), Ok(Template::Jinja(_))));
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(b"{{ eos_token }}").expect("written");
        let path = format!("@{}", file.path().display());
        assert_eq!(template(&path), Ok(Template::Jinja("{{ eos_token }}".into())));
        assert!(template("@/nowhere/x.jinja").is_err_and(|error| error.contains("/nowhere/x.jinja")));
        assert!(template("llama3").is_err());
    }
}
