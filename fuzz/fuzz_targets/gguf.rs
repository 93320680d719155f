//! A stranger's GGUF file, through all that is made of it before training: header, shape, tokenizer, chat template, weights, and
//! what an export would write of it.
//!
//! An input that begins as a GGUF file does is one; any other stands for a vocabulary, of which a file is made that is whole
//! but for what it says.

#![no_main]

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use lorad_engine::data::{ChatTemplate, Message, Role, chat_prompt};
use lorad_engine::export::{ExportKind, check_exportable, read_gguf_lora};
use lorad_engine::gguf::{Array, GgufFile, TensorSpec, Value, Writer};
use lorad_engine::model::weights::{MappedFile, vector};
use lorad_engine::model::{Config, Llama, untrained_tokens};
use lorad_engine::ops::rope::RopeLayout;
use lorad_engine::quant::BlockType;
use lorad_engine::spec::Template;
use lorad_engine::tokenizer::{TokenStream, Tokenizer};
use lorad_fuzz::{folder, seeds};

/// Values of a tensor that is dequantized, and of a model that computes.
const MAX_VALUES: usize = 1 << 16;
const TEXT: &str = "The owl's 12345 n\u{e9}\u{4f60}\u{1f600}\t\r\n  <s>a</s> <|im_start|>x<|im_end|>\u{2581}\u{0}";

fuzz_target!(init: lorad_fuzz::begin(seeds::gguf), |data: &[u8]| {
    if data.starts_with(b"GGUF") {
        let file = MappedFile::from_bytes(data).and_then(|file| GgufFile::from_mapped(file.into()));
        if let Ok(file) = file {
            exercise(&file, TEXT);
        }
    } else if let Ok(text) = vocabulary(&mut Unstructured::new(data)) {
        let file = GgufFile::open(&folder().join("vocabulary.gguf")).expect("a file of our own is whole");
        exercise(&file, &text);
    }
});

fn exercise(file: &GgufFile, text: &str) {
    for (key, _) in file.metadata() {
        let _ = (file.string(key), file.u32(key), file.u64(key), file.f32(key), file.bool(key));
        let _ = (file.strings(key), file.u32s(key), file.i32s(key), file.f32s(key));
    }
    for tensor in file.tensors() {
        if let (Ok(dtype), Some(values)) = (tensor.dtype(), tensor.rows().checked_mul(tensor.columns())) {
            let bytes = file.data(tensor).expect("a tensor of this file");
            assert_eq!(bytes.len(), dtype.row_bytes(tensor.columns()) * tensor.rows());
            if values <= MAX_VALUES {
                vector(file, &tensor.name, values).expect("a tensor of this file");
            }
        }
    }
    let _ = read_gguf_lora(file, &seeds::shape(RopeLayout::Interleaved));
    let _ = untrained_tokens(file, &[0, 1, 2, u32::MAX]);
    let config = Config::from_gguf(file);
    if let Ok(tokenizer) = Tokenizer::from_gguf(file) {
        tokens(&tokenizer, text);
        for kind in [ExportKind::Merged, ExportKind::Adapter] {
            let _ = check_exportable(kind, file, &tokenizer);
        }
    }
    if let Ok(model) = Llama::load(file) {
        let shape = &config.expect("a model has a config").shape;
        if shape.layers * shape.hidden * shape.intermediate.max(shape.heads * shape.head_dim) <= MAX_VALUES {
            let _ = model.logits(&[0], None);
        }
    }
}

fn tokens(tokenizer: &Tokenizer, text: &str) {
    for parse_special in [false, true] {
        let ids = tokenizer.encode(text, parse_special).expect("a short text");
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        let mut stream = TokenStream::new(tokenizer);
        let mut streamed: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        streamed.extend(stream.finish());
        assert_eq!(streamed, tokenizer.decode(&ids));
    }
    let messages = [(Role::System, "s"), (Role::User, text), (Role::Assistant, "a"), (Role::User, "b")];
    let messages = messages.map(|(role, content)| Message::new(role, content));
    let Ok(template) = ChatTemplate::for_model(&Template::Auto, tokenizer) else { return };
    let tool = serde_json::json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let _ = template.render(&messages, &[tool], false);
    let _ = chat_prompt(&messages, &template, tokenizer);
}

/// Writes a file with a vocabulary that the input describes, and gives the text that is to be encoded with it.
fn vocabulary(input: &mut Unstructured<'_>) -> Result<String> {
    let byte_level = input.arbitrary()?;
    let text: String = input.arbitrary()?;
    let template: Option<String> = input.arbitrary()?;
    let mut tokens: Vec<String> = (0..input.int_in_range(1..=24)?).map(|_| input.arbitrary()).collect::<Result<_>>()?;
    let mut merges = Vec::new();
    if byte_level {
        for _ in 0..input.int_in_range(0..=12)? {
            let (left, right) = (input.choose(&tokens)?, input.choose(&tokens)?);
            let merged = format!("{left}{right}");
            merges.push(format!("{left} {right}"));
            tokens.push(merged);
        }
    }
    let count = tokens.len();
    let per_token = |input: &mut Unstructured<'_>| -> Result<bool> { input.ratio(7, 8) };
    let mut metadata: Vec<(String, Value)> = Vec::new();
    let mut put = |key: &str, value: Value| metadata.push((format!("tokenizer.{key}"), value));
    put("ggml.model", Value::from(if byte_level { "gpt2" } else { "llama" }));
    if byte_level {
        let names = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "bloom"];
        put("ggml.pre", Value::from(*input.choose(&names)?));
        put("ggml.merges", strings(&merges));
    } else if per_token(input)? {
        let scores = (0..count).map(|_| input.arbitrary()).collect::<Result<_>>()?;
        put("ggml.scores", Value::Array(Array::F32(scores)));
    }
    if per_token(input)? {
        let types = (0..count).map(|_| input.int_in_range(0..=7)).collect::<Result<_>>()?;
        put("ggml.token_type", Value::Array(Array::I32(types)));
    }
    for key in ["bos", "eos", "eot", "unknown", "padding"] {
        if input.arbitrary()? {
            put(&format!("ggml.{key}_token_id"), Value::U32(input.int_in_range(0..=count as u32)?));
        }
    }
    for key in ["add_bos_token", "add_space_prefix"] {
        if input.arbitrary()? {
            put(&format!("ggml.{key}"), Value::Bool(input.arbitrary()?));
        }
    }
    if let Some(template) = &template {
        put("chat_template", Value::from(template.as_str()));
    }
    put("ggml.tokens", strings(&tokens));
    write(&metadata, count);
    Ok(text)
}

fn strings(texts: &[String]) -> Value {
    Value::Array(Array::String(texts.iter().map(|text| text.as_bytes().to_vec()).collect()))
}

fn write(metadata: &[(String, Value)], tokens: usize) {
    let table = TensorSpec { name: "token_embd.weight".into(), shape: vec![tokens, 8], dtype: BlockType::F32 };
    let mut writer = Writer::create(&folder().join("vocabulary.gguf"), metadata, &[table]).expect("a file in memory");
    writer.write("token_embd.weight", &vec![0; tokens * 32]).expect("a file in memory");
    writer.finish().expect("a file in memory");
}
