//! Writes the tokens of texts as a model's own tokenizer makes them, for comparison with other programs:
//! `tokenize MODEL.gguf TEXTS.json [plain]`, where the texts are a JSON array of strings, as are the tokens of each on standard
//! output. With `plain` the text of a control token is text like any other. BOS is added where the model has it so.

use std::path::Path;

use lorad_engine::gguf::GgufFile;
use lorad_engine::tokenizer::{Metadata, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, texts, plain) = match arguments.as_slice() {
        [model, texts] => (model, texts, false),
        [model, texts, plain] if plain == "plain" => (model, texts, true),
        _ => return Err("usage: tokenize MODEL.gguf TEXTS.json [plain]".into()),
    };
    // The metadata alone: a file without a model is enough.
    let tokenizer = Tokenizer::new(Metadata::from_gguf(&GgufFile::open(Path::new(model))?)?)?;
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let mut rows = Vec::with_capacity(texts.len());
    for text in &texts {
        let mut ids: Vec<u32> = tokenizer.bos().filter(|_| tokenizer.adds_bos()).into_iter().collect();
        ids.extend(tokenizer.encode(text, !plain)?);
        rows.push(ids);
    }
    Ok(serde_json::to_writer(std::io::stdout().lock(), &rows)?)
}
