//! Times the gradient of one micro-batch on a real model: `cargo bench --bench train_step -- FILE.gguf [ROWS TOKENS RANK REPEATS bf16]`.
//!
//! Prints wall time and processor time of each repeat; the latter tells something on a busy machine too. Without a file it
//! says so and ends, so that `cargo bench` and `cargo test --benches` work everywhere.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::path::Path;
use std::time::Instant;

use lorad_engine::adapter::{LoraLayout, LoraParams};
use lorad_engine::data::MicroBatch;
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::{Llama, MicroStep};
use lorad_engine::ops::matmul::Compute;
use lorad_engine::spec::{LoraSpec, TrainSpec};

fn main() -> lorad_engine::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let Some(path) = arguments.first().filter(|path| !path.starts_with("--")) else {
        println!("SKIPPED: no GGUF file was named");
        return Ok(());
    };
    let number = |at: usize, default: usize| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    let (rows, tokens, rank, repeats) = (number(1, 4), number(2, 256), number(3, 16), number(4, 5));
    lorad_engine::allocator::keep_freed_memory();
    let model = Llama::load(&GgufFile::open(Path::new(path))?)?;
    let bf16 = arguments.last().is_some_and(|last| last == "bf16");
    let compute = if bf16 { Compute::bf16().expect("a processor with products of bf16") } else { Compute::F32 };
    let lora = LoraSpec { r: rank as u32, ..TrainSpec::default().lora };
    let layout = LoraLayout::new(&lora, &model.config().shape);
    let (params, gradient) = (LoraParams::zeros(layout.clone())?, LoraParams::zeros(layout)?);
    params.initialise(1)?;

    let batch = batch(rows, tokens, model.config().shape.vocabulary);
    let scale = 1.0 / batch.trained_tokens() as f32;
    let step = MicroStep { scale, kept_layers: usize::MAX, dropout: None, compute };
    for _ in 0..repeats {
        let (began, processor) = (Instant::now(), processor_seconds());
        let loss = model.forward_backward(&batch, &params, &gradient, step)?;
        let (wall, processor) = (began.elapsed().as_secs_f64(), processor_seconds() - processor);
        let speed = (rows * tokens) as f64 / wall;
        println!(
            "loss {:.4}: {wall:.3} s, {processor:.2} s of processor, {speed:.0} tokens/s",
            loss.sum / loss.tokens as f64
        );
    }
    Ok(())
}

fn batch(rows: usize, tokens: usize, vocabulary: usize) -> MicroBatch {
    let row = |row: usize| (0..tokens).map(move |at| ((row * 7919 + at * 104_729) % vocabulary) as u32);
    let tokens_of = |at| row(at).collect::<Vec<u32>>();
    let labels_of =
        |at| row(at).skip(1).map(u32::cast_signed).chain([lorad_engine::data::NO_LABEL]).collect::<Vec<i32>>();
    MicroBatch {
        tokens: (0..rows).flat_map(tokens_of).collect(),
        positions: (0..rows).flat_map(|_| 0..tokens as u32).collect(),
        labels: (0..rows).flat_map(labels_of).collect(),
        cu_seqlens: (0..=rows).map(|row| row * tokens).collect(),
    }
}

/// Processor time of all threads so far; 0 where /proc does not tell.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / 100.0
}
