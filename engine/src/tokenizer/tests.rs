//! Agreement with llama.cpp on golden ids (made by scripts/golden/tokenizer.py), and what metadata may and may not say.

use serde::Deserialize;
use std::collections::BTreeMap;

use super::*;

#[derive(Deserialize)]
struct Golden {
    tokens: Vec<String>,
    token_types: Vec<i32>,
    merges: Vec<String>,
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
    plain_ids: Vec<Vec<u32>>,
    with_bos: BTreeMap<String, Vec<u32>>,
}

#[derive(Deserialize)]
struct GoldenIds {
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/golden/tokenizer.json")).expect("the golden file")
}

fn metadata(golden: &Golden, pre: &str) -> Metadata {
    let id = |text: &str| golden.tokens.iter().position(|token| token == text).map(|id| id as u32);
    Metadata {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens: golden.tokens.clone(),
        token_types: golden.token_types.clone(),
        merges: golden.merges.clone(),
        bos: id("<|im_start|>"),
        eos: id("<|im_end|>"),
        ..Metadata::default()
    }
}

fn error(change: impl FnOnce(&mut Metadata)) -> String {
    let mut metadata = metadata(&golden(), "smollm");
    change(&mut metadata);
    Tokenizer::new(metadata).err().expect("an error").to_string()
}

fn assert_ids(tokenizer: &Tokenizer, texts: &[String], ids: &[Vec<u32>], parse_special: bool, what: &str) {
    for (text, ids) in texts.iter().zip(ids) {
        let got = tokenizer.encode(text, parse_special).expect("encodes");
        let shown = |ids: &[u32]| -> Vec<String> {
            ids.iter().map(|&id| tokenizer.token_text(id).unwrap_or("?").to_owned()).collect()
        };
        assert_eq!(shown(&got), shown(ids), "{what}: {text:?}");
        assert_eq!(&got, ids, "{what}: {text:?}");
    }
}

#[test]
fn every_pre_tokenizer_agrees_with_llama_cpp() {
    let golden = golden();
    assert_eq!(golden.ids.len(), 4);
    for (pre, ids) in &golden.ids {
        let tokenizer = Tokenizer::new(metadata(&golden, pre)).expect("a tokenizer");
        assert_ids(&tokenizer, &golden.texts, ids, true, pre);
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let with_bos: Vec<u32> = bos.into_iter().chain(tokenizer.encode("a", true).expect("encodes")).collect();
        assert_eq!(with_bos, golden.with_bos[pre], "{pre}");
    }
    let tokenizer = Tokenizer::new(metadata(&golden, "default")).expect("a tokenizer");
    assert_ids(&tokenizer, &golden.texts, &golden.plain_ids, false, "default, special tokens as text");
    // The pre-tokenizers differ, or the test above would prove little.
    assert_ne!(golden.ids["smollm"], golden.ids["gpt-2"]);
    assert_ne!(golden.ids["llama-bpe"], golden.ids["default"]);
}

#[test]
fn smollm2_agrees_with_llama_cpp() {
    let Some(path) = std::env::var_os("LORAD_SMOLLM2") else {
        eprintln!("skipped: LORAD_SMOLLM2 does not name SmolLM2's GGUF file");
        return;
    };
    let file = crate::gguf::GgufFile::open(path.as_ref()).expect("opens");
    let tokenizer = Tokenizer::from_gguf(&file).expect("a tokenizer");
    let golden: GoldenIds =
        serde_json::from_str(include_str!("../../tests/golden/tokenizer-smollm2.json")).expect("the golden file");
    assert_ids(&tokenizer, &golden.texts, &golden.ids, true, "SmolLM2");
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (49152, Some(1), Some(2)));
    assert_eq!((tokenizer.adds_bos(), tokenizer.stop_tokens()), (false, &[0, 2][..]));
    assert!(tokenizer.chat_template().is_some_and(|template| template.contains("add_generation_prompt")));
}

#[test]
fn decoding_gives_the_text_back_and_streams_whole_characters_only() {
    let golden = golden();
    let tokenizer = Tokenizer::new(metadata(&golden, "llama-bpe")).expect("a tokenizer");
    for text in &golden.texts {
        let ids = tokenizer.encode(text, false).expect("encodes");
        assert_eq!(&tokenizer.decode(&ids), text);
        let mut stream = TokenStream::new(&tokenizer);
        let pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert_eq!((&pieces.concat(), stream.finish()), (text, None));
        let replaced = pieces.iter().any(|piece| piece.contains('\u{fffd}'));
        assert!(!replaced || text.contains('\u{fffd}'), "{text:?} was cut within a character");
    }
}

#[test]
fn bytes_that_cannot_become_a_character_are_replaced_and_control_tokens_are_no_text() {
    let golden = golden();
    let tokenizer = Tokenizer::new(metadata(&golden, "smollm")).expect("a tokenizer");
    let byte = |byte: u8| {
        let text = byte_level::byte_to_char(byte).to_string();
        golden.tokens.iter().position(|token| *token == text).expect("a token for every byte") as u32
    };
    let mut stream = TokenStream::new(&tokenizer);
    assert_eq!(stream.push(byte(0xE2)), None);
    assert_eq!(stream.push(tokenizer.eos().expect("eos")), None);
    assert_eq!(stream.push(byte(0x82)), None);
    assert_eq!(stream.push(byte(0xAC)).as_deref(), Some("€"));
    assert_eq!(stream.push(byte(0xE2)), None);
    assert_eq!(stream.push(byte(b'a')).as_deref(), Some("\u{fffd}a"));
    assert_eq!(stream.push(byte(0xF0)), None);
    assert_eq!(stream.finish().as_deref(), Some("\u{fffd}"));
    assert_eq!(stream.push(u32::MAX), None);
}

#[test]
fn metadata_that_cannot_be_used_are_named() {
    let cases = [
        (error(|m| m.model = "llama".into()), "tokenizer.ggml.model `llama` is not supported"),
        (error(|m| m.pre = Some("qwen2".into())), "pre-tokenizer `qwen2` (tokenizer.ggml.pre) is not supported"),
        (error(|m| m.tokens.clear()), "tokenizer.ggml.tokens is empty"),
        (error(|m| m.merges.clear()), "tokenizer.ggml.merges is missing or empty"),
        (error(|m| m.merges.push("abc".into())), "`abc` is not two texts"),
        (error(|m| m.merges.push("é".into())), "`é` is not two texts"),
        (error(|m| m.merges.push(String::new())), "`` is not two texts"),
        (error(|m| m.merges.push("a <|im_start|>".into())), "needs the token `a<|im_start|>`"),
        (error(|m| m.token_types.truncate(3)), "tokenizer.ggml.token_type has 3 entries"),
        (error(|m| m.eos = Some(5000)), "tokenizer.ggml.eos_token_id is 5000"),
    ];
    for (error, message) in cases {
        assert!(error.contains(message), "`{error}` does not say `{message}`");
    }
}

#[test]
fn absent_keys_have_llama_cpp_s_defaults() {
    let golden = golden();
    let tokenizer = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = metadata(&golden, "llama-bpe");
        change(&mut metadata);
        Tokenizer::new(metadata).expect("a tokenizer")
    };
    assert!(tokenizer(&|_| {}).adds_bos());
    assert!(!tokenizer(&|m| m.add_bos = Some(false)).adds_bos());
    let without = tokenizer(&|m| (m.bos, m.eos) = (Some(u32::MAX), Some(u32::MAX)));
    assert_eq!((without.bos(), without.eos(), without.adds_bos()), (None, None, false));
    // Stop tokens are known by their text, also where the file calls them normal tokens.
    let untyped = tokenizer(&|m| m.token_types.clear());
    assert_eq!(untyped.stop_tokens().len(), 2);
    assert!(untyped.stop_tokens().iter().all(|&id| untyped.is_control(id)));
}
