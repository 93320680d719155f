//! `lorad bench`: how fast the training is on a GPU, in figures that can be compared.

use std::io::Write;

use anyhow::bail;
use clap::{Args, Subcommand};
use lorad_engine::bench::{self, BenchQuantization, BenchShape, BenchSpec};
use lorad_engine::spec::GradientCheckpointing;

use super::devices::{WantedDevice, gpus};
use super::named;
use crate::types::device::Device;

/// Times the training on a GPU, on random weights that are made there: nothing is downloaded. Prints JSON, one object a line.
///
/// Give it the card for itself: whoever else uses it shows in the figures.
#[derive(Debug, Args)]
pub struct BenchCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Train(BenchTrainArgs),
    Ops(BenchOpsArgs),
}

/// Times micro-steps of a training with a LoRA on all seven projections, after a warm-up, an optimizer step after every fourth.
///
/// Prints trained tokens a second (median, by the GPU's clock and by the wall's), the peak of the GPU's memory, the share of what the card's
/// matrix rate allows, and the time of each family of kernels.
#[derive(Debug, Args)]
struct BenchTrainArgs {
    /// Model whose sizes the weights have: llama-3-8b, llama-3.2-1b, llama-3.2-3b, smollm2-135m, llama-3-70b
    #[arg(long, default_value = "llama-3-8b")]
    shape: BenchShape,
    /// How the frozen weights are stored: nf4 (double-quantized, as bitsandbytes), nf4_single (factors in f32), bf16, or a type of GGUF files (q4_k, q8_0 …)
    #[arg(long, value_name = "TYPE", default_value = "nf4")]
    quantization: BenchQuantization,
    /// Rank of the LoRA
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    rank: u32,
    /// Rows computed at once
    #[arg(long, value_name = "ROWS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    micro_batch_size: u32,
    /// Tokens of a row
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    max_seq_length: u32,
    /// Which activations are kept for the backward pass: auto, none (keep all), full (recompute)
    #[arg(long, value_name = "POLICY", default_value = "auto", value_parser = named::<GradientCheckpointing>)]
    gradient_checkpointing: GradientCheckpointing,
    /// The GPU, as `lorad devices` lists it: auto (the first one), cuda:0
    #[arg(long, default_value = "auto")]
    device: WantedDevice,
    /// Micro-steps that are timed
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    micro_steps: u32,
    /// Keep dequantized weights in the GPU's memory, where they have room and no activation is computed again
    #[arg(long)]
    dense_resident: bool,
    /// Most of the GPU's memory that the run may take; without it what is free
    #[arg(long, value_name = "GIB", value_parser = gibibytes)]
    max_memory_gib: Option<f64>,
}

/// Times each kernel against the least time that its bytes or operations take; one line a kernel and size.
#[derive(Debug, Args)]
struct BenchOpsArgs {
    /// The GPU, as `lorad devices` lists it: auto (the first one), cuda:0
    #[arg(long, default_value = "auto")]
    device: WantedDevice,
}

/// Runs the command.
///
/// # Errors
/// No GPU, a build without CUDA, too little memory on the card, an output that cannot be written.
pub fn run(command: &BenchCommand) -> anyhow::Result<()> {
    let figures = match &command.what {
        What::Train(args) => vec![bench::train(&BenchSpec {
            shape: args.shape,
            quantization: args.quantization,
            rank: args.rank,
            micro_batch_size: args.micro_batch_size,
            max_seq_length: args.max_seq_length,
            gradient_checkpointing: args.gradient_checkpointing,
            device: gpu(args.device)?,
            micro_steps: args.micro_steps,
            dense_resident: args.dense_resident,
            memory_bytes: args.max_memory_gib.map(|gib| (gib * f64::from(1 << 30)) as u64),
        })?],
        What::Ops(args) => bench::ops(gpu(args.device)?)?,
    };
    let mut out = std::io::stdout().lock();
    for figures in figures {
        writeln!(out, "{}", serde_json::to_string(&figures)?)?;
    }
    Ok(())
}

/// A size above 0.
fn gibibytes(text: &str) -> Result<f64, String> {
    let size = text.parse().ok().filter(|size: &f64| size.is_finite() && *size > 0.0);
    size.ok_or_else(|| format!("must be a number of GiB above 0, got `{text}`"))
}

/// The device, which is a GPU.
fn gpu(wanted: WantedDevice) -> anyhow::Result<Device> {
    match wanted.find()? {
        gpu @ Device::Cuda(_) => Ok(gpu),
        Device::Cpu => match gpus() {
            Err(reason) => bail!("this times a GPU, and there is none: {reason}"),
            Ok(_) => bail!("this times a GPU, got `cpu`"),
        },
    }
}
