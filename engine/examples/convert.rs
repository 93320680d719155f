//! Stores a GGUF model in other types, with the values of a random LoRA merged in if a rank is given: the export's own code, for
//! measurements. `convert BASE.gguf TYPE=OUT.gguf… [RANK]`

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use lorad_engine::export::{Delta, Merge, Quantization, merged_gguf};
use lorad_engine::gguf::GgufFile;
use lorad_engine::spec::{LoraSpec, Target};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const USAGE: &str = "usage: convert BASE.gguf TYPE=OUT.gguf… [RANK]";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (base, rest) = arguments.split_first().ok_or(USAGE)?;
    let mut outputs: Vec<(Quantization, PathBuf)> = Vec::new();
    let mut rank = 0;
    for argument in rest {
        match argument.split_once('=') {
            Some((name, path)) => {
                let quantization = Quantization::from_name(name).ok_or_else(|| format!("no type `{name}`"))?;
                outputs.push((quantization, path.into()));
            }
            None => rank = argument.parse().map_err(|_| USAGE)?,
        }
    }
    let base = GgufFile::open(Path::new(base))?;
    let target_modules = Target::ALL.to_vec();
    let lora = LoraSpec { r: rank.max(1) as u32, alpha: 16.0, use_rslora: false, dropout: 0.0, target_modules };
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut some = |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-0.01..0.01)).collect() };
    let mut deltas = std::collections::HashMap::new();
    if rank > 0 {
        for tensor in base.tensors() {
            if let Some(projection) = projection(&tensor.name) {
                deltas.insert(projection, (some(rank * tensor.columns()), some(tensor.rows() * rank)));
            }
        }
    }
    let delta = |layer, target| {
        let (a, b): &(Vec<f32>, Vec<f32>) = deltas.get(&(layer, target))?;
        Some(Delta { lora_a: Cow::Borrowed(a), lora_b: Cow::Borrowed(b) })
    };
    let outputs: Vec<(Quantization, &Path)> = outputs.iter().map(|(how, path)| (*how, path.as_path())).collect();
    let merge = Merge { base: &base, lora: (rank > 0).then_some(&lora), name_suffix: None, chat_template: None };
    let started = Instant::now();
    let mut written = None;
    let tensors = base.tensors().len();
    merged_gguf(&merge, &delta, &outputs, &mut |progress| {
        if progress.done >= tensors {
            written.get_or_insert_with(|| started.elapsed());
        }
        ControlFlow::Continue(())
    })?;
    let written = written.unwrap_or_default();
    eprintln!("written after {:.2} s, read back after {:.2} s", written.as_secs_f64(), started.elapsed().as_secs_f64());
    Ok(())
}

fn projection(name: &str) -> Option<(usize, Target)> {
    let (layer, part) = name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let place = names.iter().position(|&name| name == part)?;
    Some((layer.parse().ok()?, Target::ALL[place]))
}
