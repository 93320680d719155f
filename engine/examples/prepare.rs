//! Times the reading of a data set: `prepare MODEL.gguf DATA [SCRATCH]` writes rows, tokens, seconds and the most memory that was
//! resident, as a line of JSON.

use std::path::Path;
use std::time::Instant;

use lorad_engine::data;
use lorad_engine::gguf::GgufFile;
use lorad_engine::spec::{TrainOptions, TrainSpec};
use lorad_engine::tokenizer::Tokenizer;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, data) = match arguments.as_slice() {
        [model, data, ..] => (Path::new(model), Path::new(data)),
        _ => return Err("usage: prepare MODEL.gguf DATA [SCRATCH]".into()),
    };
    let scratch = arguments.get(2).map_or_else(std::env::temp_dir, Into::into);
    // A copy of the metadata is made, and the file is closed: what is measured is the reading.
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(model)?)?;
    let spec = TrainSpec::resolve(&TrainOptions::default())?;
    let before = peak_mb()?;
    let began = Instant::now();
    let dataset = data::prepare(data, &spec, &tokenizer, 2048, &scratch, &mut || ())?;
    let read = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let tokens = dataset.rows.iter().try_fold(0, |sum, row| row.map(|row| sum + row.tokens.len()))?;
    let line = serde_json::json!({
        "rows": dataset.rows.len(), "tokens": tokens, "read_seconds": read, "all_rows_again_seconds": began.elapsed().as_secs_f64(),
        "file_mb": std::fs::metadata(data)?.len() / 1_000_000, "peak_mb_before": before, "peak_mb": peak_mb()?,
    });
    Ok(serde_json::to_writer(std::io::stdout().lock(), &line)?)
}

/// The most memory that was resident so far (VmHWM), in megabytes.
fn peak_mb() -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("/proc/self/status has no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1000)
}
