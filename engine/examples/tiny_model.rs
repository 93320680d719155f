//! Writes the seeded tiny model that the golden files are made from:
//! `tiny_model OUT.gguf [SEED] [F32|F16|Q8_0|Q4_0] [llama]`, with `llama` for SentencePiece's tokenizer.

use std::path::Path;

use lorad_engine::quant::BlockType;
use lorad_engine::testing::TinyModel;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: tiny_model OUT.gguf [SEED] [F32|F16|Q8_0|Q4_0] [llama]")?;
    let mut model = TinyModel::default();
    if let Some(seed) = arguments.get(1) {
        model.seed = seed.parse()?;
    }
    if let Some(name) = arguments.get(2) {
        let dtype = match name.as_str() {
            "F32" => BlockType::F32,
            "F16" => BlockType::F16,
            "Q8_0" => BlockType::Q8_0,
            "Q4_0" => BlockType::Q4_0,
            other => return Err(format!("the type must be F32, F16, Q8_0 or Q4_0, got `{other}`").into()),
        };
        model.dtypes = vec![dtype];
    }
    model.sentence_piece = match arguments.get(3).map(String::as_str) {
        None => false,
        Some("llama") => true,
        Some(other) => return Err(format!("the tokenizer must be llama, got `{other}`").into()),
    };
    model.write(Path::new(path))?;
    Ok(())
}
