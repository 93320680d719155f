//! Agreement with llama.cpp on golden ids (made by scripts/golden/tokenizer.py and scripts/compare-tokenizer.sh), and what
//! metadata may and may not say.

use proptest::prelude::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::LazyLock;

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

#[derive(Deserialize)]
struct GoldenLlama {
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    plain_ids: Vec<Vec<u32>>,
}

/// SentencePiece's tokenizer of the tiny model.
fn sentence_piece(change: impl FnOnce(&mut Metadata)) -> Result<Tokenizer> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    crate::testing::TinyModel { sentence_piece: true, ..Default::default() }.write(&path).expect("writes");
    let mut metadata = Metadata::from_gguf(&GgufFile::open(&path)?)?;
    change(&mut metadata);
    Tokenizer::new(metadata)
}

#[test]
fn sentence_piece_agrees_with_llama_cpp() {
    let golden: GoldenLlama =
        serde_json::from_str(include_str!("../../tests/golden/tokenizer-llama.json")).expect("the golden file");
    let tokenizer = sentence_piece(|_| {}).expect("a tokenizer");
    assert!(tokenizer.adds_bos() && golden.texts.len() > 100);
    // Every text of the file begins with BOS.
    let without_bos = |ids: &[Vec<u32>]| -> Vec<Vec<u32>> { ids.iter().map(|ids| ids[1..].to_vec()).collect() };
    assert_ids(&tokenizer, &golden.texts, &without_bos(&golden.ids), true, "llama");
    assert_ids(&tokenizer, &golden.texts, &without_bos(&golden.plain_ids), false, "llama, special tokens as text");
}

#[test]
fn a_space_is_put_before_a_text_and_after_special_tokens_and_taken_off_again() {
    let tokenizer = sentence_piece(|_| {}).expect("a tokenizer");
    let (bos, eos) = (tokenizer.bos().expect("BOS"), tokenizer.eos().expect("EOS"));
    let shown = |ids: Vec<u32>| ids.iter().filter_map(|&id| tokenizer.token_text(id)).collect::<Vec<_>>().join("|");
    let after = |last| shown(tokenizer.encode_after(last, "hello", true).expect("encodes"));
    let plain = tokenizer.encode("a", false).expect("encodes").last().copied();
    assert_eq!((after(None), after(Some(bos))), ("▁he|llo".into(), "▁he|llo".into()));
    assert_eq!(after(plain), "he|llo");
    assert_eq!(shown(tokenizer.encode("a<s>b <note>c", true).expect("encodes")), "▁a|<s>|▁|b|▁|<note>|▁|c");
    assert_eq!(tokenizer.decode(&tokenizer.encode("a<note>b</s> c", true).expect("encodes")), "a<note>b c");
    let mut stream = TokenStream::after(&tokenizer, plain);
    let ids = tokenizer.encode(" the", true).expect("encodes");
    assert_eq!(ids.iter().filter_map(|&id| stream.push(id)).collect::<String>(), "  the");
    assert_eq!((stream.push(eos), stream.finish()), (None, None));
    let unprefixed = sentence_piece(|m| m.add_space_prefix = Some(false)).expect("a tokenizer");
    let ids = unprefixed.encode("hello", true).expect("encodes");
    assert_eq!((ids.len(), unprefixed.decode(&ids).as_str()), (2, "hello"));
}

#[test]
fn characters_that_are_no_token_are_bytes() {
    let tokenizer = sentence_piece(|m| m.add_space_prefix = Some(false)).expect("a tokenizer");
    let ids = tokenizer.encode("Ω\n", true).expect("encodes");
    let texts: Vec<&str> = ids.iter().filter_map(|&id| tokenizer.token_text(id)).collect();
    assert_eq!(texts, ["<0xCE>", "<0xA9>", "<0x0A>"]);
    let mut stream = TokenStream::new(&tokenizer);
    let pieces: Vec<Option<String>> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(pieces, [None, Some("Ω".into()), Some("\n".into())]);
    // Without tokens for bytes they are what is unknown, and without that the file is refused.
    let without = |m: &mut Metadata| m.tokens[13] = "x".into();
    let unknown = sentence_piece(without).expect("a tokenizer").encode("\n", true).expect("encodes");
    assert_eq!(unknown.last(), Some(&0));
    let refused = sentence_piece(|m| {
        without(m);
        m.unknown = None;
    });
    assert!(refused.err().expect("refused").to_string().contains("neither `<0x0A>`"));
}

#[test]
fn a_megabyte_of_one_character_is_encoded_in_moments() {
    let golden = golden();
    let families = [
        sentence_piece(|_| {}).expect("a tokenizer"),
        Tokenizer::new(metadata(&golden, "smollm")).expect("a tokenizer"),
        Tokenizer::new(metadata(&golden, "llama-bpe")).expect("a tokenizer"),
    ];
    for tokenizer in &families {
        for character in ["a", " ", "\n", "你", "\u{1f600}"] {
            let text = character.repeat((1 << 20) / character.len());
            let ids = tokenizer.encode(&text, true).expect("encodes");
            assert_eq!(tokenizer.decode(&ids), text, "{character:?}");
        }
    }
}

/// Byte-level BPE under each way to cut words.
static BYTE_LEVEL: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let golden = golden();
    let tokenizer = |pre| Tokenizer::new(metadata(&golden, pre)).expect("a tokenizer");
    ["smollm", "llama-bpe", "gpt-2", "default", "tekken", "qwen2"].map(tokenizer).into()
});

static SENTENCE_PIECE: LazyLock<Tokenizer> = LazyLock::new(|| sentence_piece(|_| {}).expect("a tokenizer"));

proptest! {
    #[test]
    fn any_text_comes_back_from_byte_level_bpe(text: String, words in "[a-z0-9 '\r\n\t.é日]{0,200}") {
        for tokenizer in BYTE_LEVEL.iter() {
            for text in [&text, &words] {
                let ids = tokenizer.encode(text, false).expect("encodes");
                prop_assert_eq!(&tokenizer.decode(&ids), text);
            }
        }
    }

    #[test]
    fn any_text_without_its_own_marks_comes_back_from_sentence_piece(
        text in "[^<▁]{0,60}",
        words in "[a-z0-9 '\r\n\t.é日]{0,200}",
    ) {
        for text in [&text, &words] {
            let ids = SENTENCE_PIECE.encode(text, false).expect("encodes");
            prop_assert_eq!(&SENTENCE_PIECE.decode(&ids), text);
        }
    }
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
        (error(|m| m.model = "bert".into()), "tokenizer.ggml.model `bert` is not supported"),
        (error(|m| m.pre = Some("bloom".into())), "pre-tokenizer `bloom` (tokenizer.ggml.pre) is not supported"),
        (error(|m| m.tokens.clear()), "tokenizer.ggml.tokens is empty"),
        (error(|m| m.merges.clear()), "tokenizer.ggml.merges is missing or empty"),
        (error(|m| m.merges.push("abc".into())), "`abc` is not two texts"),
        (error(|m| m.merges.push("é".into())), "`é` is not two texts"),
        (error(|m| m.merges.push(String::new())), "`` is not two texts"),
        (error(|m| m.merges.push("a <|im_start|>".into())), "needs the token `a<|im_start|>`"),
        (error(|m| m.token_types.truncate(3)), "tokenizer.ggml.token_type has 3 entries"),
        (error(|m| m.eos = Some(5000)), "tokenizer.ggml.eos_token_id is 5000"),
    ];
    let of_scores = |change: fn(&mut Metadata)| sentence_piece(change).err().expect("an error").to_string();
    let of_scores = [
        (of_scores(|m| m.scores.truncate(3)), "tokenizer.ggml.scores has 3 entries"),
        (of_scores(|m| m.scores[7] = f32::NAN), "the score of token 7 is no number"),
        (of_scores(|m| m.unknown = Some(5000)), "tokenizer.ggml.unknown_token_id is 5000"),
    ];
    for (error, message) in cases.into_iter().chain(of_scores) {
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
