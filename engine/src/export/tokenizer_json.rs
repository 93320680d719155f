//! A GGUF file's tokenizer as Hugging Face's files: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::data::{ChatTemplate, Message, Role};
use crate::files::shorten;
use crate::gguf::GgufFile;
use crate::tokenizer::{Metadata, Tokenizer};
use crate::{Error, Result};

/// The three files' contents.
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: Value,
    pub(super) config: Value,
    pub(super) special_tokens: Value,
}

impl TokenizerFiles {
    /// Reads them off the base; `template` is the one that was trained with.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an algorithm that cannot be told in these files.
    pub(super) fn new(
        base: &GgufFile,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        context_length: usize,
    ) -> Result<Self> {
        let metadata = Metadata::from_gguf(base)?;
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
        let other = |key: &str| -> Result<Option<&str>> { Ok(text(base.u32(key)?)) };
        let specials = [
            ("bos_token", text(tokenizer.bos())),
            ("eos_token", text(tokenizer.eos())),
            ("unk_token", other("tokenizer.ggml.unknown_token_id")?),
            ("pad_token", other("tokenizer.ggml.padding_token_id")?),
        ];
        let named = specials.into_iter().filter_map(|(name, text)| Some((name.to_owned(), Value::from(text?))));
        let special_tokens: Map<String, Value> = named.collect();
        let mut config = special_tokens.clone();
        let rest = [
            ("tokenizer_class", "PreTrainedTokenizerFast".into()),
            ("model_max_length", context_length.into()),
            ("clean_up_tokenization_spaces", false.into()),
            ("add_bos_token", tokenizer.adds_bos().into()),
            ("add_eos_token", false.into()),
        ];
        config.extend(rest.map(|(name, value): (&str, Value)| (name.to_owned(), value)));
        if let Some(template) = chat_template(tokenizer, template) {
            config.insert("chat_template".to_owned(), template.into());
        }
        Ok(Self {
            tokenizer: match metadata.model.as_str() {
                "llama" => sentence_piece(base, &metadata, tokenizer)?,
                _ => byte_level(&metadata, tokenizer)?,
            },
            config: config.into(),
            special_tokens: special_tokens.into(),
        })
    }
}

/// The chat template: the model's own, or the one that took its place in training. transformers puts no BOS before what a template
/// writes, where llama.cpp and lorad do if the model expects it, so that a template of its own writes it here.
fn chat_template(tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Option<String> {
    let own = || tokenizer.chat_template().map(str::to_owned);
    let Some((template, text)) = template.and_then(|template| Some((template, template.replacement()?))) else {
        return own();
    };
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos()).and_then(|id| tokenizer.token_text(id));
    let written = template.render(&[Message::new(Role::User, "Hello")], &[], true);
    match (bos, written) {
        (Some(bos), Ok(written)) if !written.starts_with(bos) => Some(format!("{{{{ bos_token }}}}{text}")),
        _ => Some(text.to_owned()),
    }
}

/// How text is cut into words before BPE, by the name in `tokenizer.ggml.pre`: expressions, and whether a word that is a token is
/// that token whatever the merges say. Source: the `tokenizer.json` of each family.
fn words(name: Option<&str>) -> Result<(&'static [&'static str], bool)> {
    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    match name.unwrap_or("default") {
        "smollm" | "starcoder" | "minerva-7b" => Ok((&[r"\p{N}", GPT2], false)),
        "gpt-2" => Ok((&[GPT2], false)),
        "default" => Ok((&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], false)),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => Ok((&[LLAMA3], true)),
        "smaug-bpe" | "dbrx" => Ok((&[LLAMA3], false)),
        "qwen2" | "deepseek-r1-qwen" | "megrez" => Ok((&[QWEN2], false)),
        other => Err(Error::Tokenizer(format!(
            "pre-tokenizer `{}` (tokenizer.ggml.pre) cannot be written as tokenizer.json, those that can: llama-bpe, smollm, gpt-2, \
             default, qwen2, smaug-bpe, dbrx, starcoder, minerva-7b, falcon3, pixtral, megrez",
            shorten(other)
        ))),
    }
}

/// Byte-level BPE.
fn byte_level(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Value> {
    let (expressions, ignore_merges) = words(metadata.pre.as_deref())?;
    let split = |expression: &&str| json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
    let mut steps: Vec<Value> = expressions.iter().map(split).collect();
    steps.push(json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}));
    let merges: Vec<Value> = metadata.merges.iter().filter_map(|merge| pair(merge)).collect();
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges, "vocab": vocabulary(metadata), "merges": merges,
    });
    let decoder = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let steps = json!({"type": "Sequence", "pretokenizers": steps});
    Ok(whole(tokenizer, Value::Null, steps, decoder, model))
}

/// Bytes of a token that is put together from others, at most; the longest in use have some 100. Every way to cut a token in two
/// is looked up, so that time grows with the square of its length.
const MAX_TOKEN_BYTES: usize = 512;
/// Merges that are written at most; Gemma's vocabulary, the largest in use, has some 600,000.
const MAX_MERGES: usize = 1 << 22;

/// A merge for each way to make a token of two others, in the order of the tokens' scores.
///
/// # Errors
/// [`Error::Tokenizer`] for a token or a list of merges longer than any vocabulary needs.
fn sentence_piece_merges(metadata: &Metadata) -> Result<Vec<Value>> {
    let ids: HashMap<&str, usize> = metadata.tokens.iter().map(String::as_str).zip(0..).collect();
    let is_normal = |id: usize| metadata.token_types.get(id).is_none_or(|&kind| kind == NORMAL);
    // Of two tokens with one text, the later is the one that text becomes.
    let mut made: Vec<(usize, &str)> =
        ids.iter().map(|(&text, &id)| (id, text)).filter(|&(id, _)| is_normal(id)).collect();
    let score = |id: usize| metadata.scores.get(id).copied().unwrap_or(0.0);
    made.sort_by(|&(a, _), &(b, _)| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    let is_token = |text: &str| ids.get(text).is_some_and(|&id| is_normal(id));
    let mut merges = Vec::new();
    for (id, text) in made {
        if text.len() > MAX_TOKEN_BYTES {
            let length = text.len();
            let message = format!(
                "tokenizer.ggml.tokens: token {id} has {length} bytes, a tokenizer.json takes at most {MAX_TOKEN_BYTES}"
            );
            return Err(Error::Tokenizer(message));
        }
        let halves = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        merges.extend(
            halves.filter(|(left, right)| is_token(left) && is_token(right)).map(|(left, right)| json!([left, right])),
        );
        if merges.len() > MAX_MERGES {
            let message = format!(
                "tokenizer.ggml.tokens: more than {MAX_MERGES} merges would make them, too many for a tokenizer.json"
            );
            return Err(Error::Tokenizer(message));
        }
    }
    Ok(merges)
}

/// SentencePiece as BPE over characters with a byte for what is no token.
fn sentence_piece(base: &GgufFile, metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Value> {
    let prefix = metadata.add_space_prefix.unwrap_or(true);
    let merges = sentence_piece_merges(metadata)?;
    let unknown = base.u32("tokenizer.ggml.unknown_token_id")?.and_then(|id| tokenizer.token_text(id));
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary(metadata), "merges": merges,
    });
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    Ok(whole(tokenizer, normalizer, Value::Null, decoder, model))
}

/// What stands for a space in SentencePiece's tokens.
const SPACE: &str = "\u{2581}";
/// GGUF's number for a token that is text.
const NORMAL: i32 = 1;

fn vocabulary(metadata: &Metadata) -> Map<String, Value> {
    metadata.tokens.iter().zip(0u32..).map(|(text, id)| (text.clone(), id.into())).collect()
}

fn whole(tokenizer: &Tokenizer, normalizer: Value, pre_tokenizer: Value, decoder: Value, model: Value) -> Value {
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(tokenizer),
        "decoder": decoder,
        "model": model,
    })
}

/// The two texts of a merge. The space between them is not the first character.
fn pair(merge: &str) -> Option<Value> {
    let first = merge.chars().next()?.len_utf8();
    let space = merge[first..].find(' ')? + first;
    Some(json!([merge[..space], merge[space + 1..]]))
}

/// The tokens that are found by their text before words are cut.
fn added_tokens(tokenizer: &Tokenizer) -> Vec<Value> {
    let entry = |id: u32, text: &str, special: bool| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special});
    (0..tokenizer.vocab_size() as u32)
        .filter(|&id| tokenizer.is_special(id))
        .filter_map(|id| Some(entry(id, tokenizer.token_text(id)?, tokenizer.is_control(id))))
        .collect()
}

/// What puts BOS before a text, where the model expects it.
fn post_processor(tokenizer: &Tokenizer) -> Value {
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let Some((id, text)) = bos.and_then(|id| Some((id, tokenizer.token_text(id)?))) else { return Value::Null };
    let special = |type_id: u32| json!({"SpecialToken": {"id": text, "type_id": type_id}});
    let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let mut tokens = Map::new();
    tokens.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": tokens,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::spec::Template;
    use crate::testing::TinyModel;

    const TEXTS: [&str; 9] = [
        "The owl and the otter ate 1234567 berries.",
        " two  spaces\tand\r\n\n lines ",
        "don't WE'LL I'm",
        "naïve Größe 東京 🦉👩‍👩‍👧 e\u{301}",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
        "x=1;//!!?? $+<=>^~| ...",
        "a\u{0}b\u{7f}c\u{a0}d",
        "",
        " ",
    ];

    /// Both tokenizers on every text: the `tokenizers` crate on our file, and ours.
    fn assert_same(path: &Path) {
        let base = GgufFile::open(path).expect("a good file");
        let ours = Tokenizer::from_gguf(&base).expect("a tokenizer");
        let files = TokenizerFiles::new(&base, &ours, None, 512).expect("it can be told");
        let theirs = tokenizers::Tokenizer::from_bytes(files.tokenizer.to_string()).expect("a tokenizer.json");
        let bos = ours.bos().filter(|_| ours.adds_bos());
        for text in TEXTS {
            let found = theirs.encode(text, true).expect("encoded");
            let expected: Vec<u32> = bos.into_iter().chain(ours.encode(text, true).expect("encoded")).collect();
            assert_eq!(found.get_ids(), expected, "{text:?}");
            let decoded = theirs.decode(found.get_ids(), true).expect("decoded");
            assert_eq!(decoded, ours.decode(&expected), "{text:?}");
        }
    }

    #[test]
    fn hugging_faces_tokenizer_gives_our_tokens() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        TinyModel::default().write(&path).expect("written");
        assert_same(&path);
        if let Some(data) = crate::testing::shared_data() {
            assert_same(&data.join("stories260K.gguf"));
        }
        match std::env::var_os("LORAD_SMOLLM2") {
            Some(path) => assert_same(Path::new(&path)),
            None => eprintln!("SKIPPED: LORAD_SMOLLM2 names no file"),
        }
    }

    #[test]
    fn a_vocabulary_cannot_make_more_merges_than_any_needs() {
        let metadata = |tokens: Vec<String>| Metadata { tokens, ..Metadata::default() };
        let repeated = |count: usize| (1..=count).map(|length| "a".repeat(length)).collect();
        let began = std::time::Instant::now();
        let merges = sentence_piece_merges(&metadata(repeated(MAX_TOKEN_BYTES))).expect("short enough");
        assert_eq!(merges.len(), MAX_TOKEN_BYTES * (MAX_TOKEN_BYTES - 1) / 2);
        let twice = [vec!["a".to_owned(); 3], vec!["aa".to_owned(); 100_000]].concat();
        assert_eq!(sentence_piece_merges(&metadata(twice)).expect("one merge"), [json!(["a", "a"])]);
        let refused = |tokens| sentence_piece_merges(&metadata(tokens)).expect_err("refused").to_string();
        let long = refused(vec!["b".into(), "\u{2581}".repeat(1 << 20)]);
        assert!(long.contains("token 1 has 3145728 bytes, a tokenizer.json takes at most 512"), "{long}");
        // Every text of up to 18 letters a and b: each way to cut one gives two tokens.
        let binary = |length: u32| {
            (0..1u32 << length)
                .map(move |bits| (0..length).map(|at| if bits >> at & 1 == 0 { 'a' } else { 'b' }).collect())
        };
        let many = refused((1..=18).flat_map(binary).collect());
        assert!(many.contains("more than 4194304 merges"), "{many}");
        assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
    }

    #[test]
    fn special_tokens_and_template_stand_in_the_config() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        TinyModel::default().write(&path).expect("written");
        let base = GgufFile::open(&path).expect("our own file");
        let tokenizer = Tokenizer::from_gguf(&base).expect("ours");
        let files = TokenizerFiles::new(&base, &tokenizer, None, 512).expect("told");
        let specials = json!({
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
        });
        assert_eq!(files.special_tokens, specials);
        assert_eq!(files.config["eos_token"], "<|im_end|>");
        assert_eq!(files.config["model_max_length"], 512);
        assert_eq!(files.config["chat_template"].as_str(), tokenizer.chat_template());
        let config = |choice: &str| {
            let choice = Template::try_from(choice.to_owned()).expect("a template");
            let template = ChatTemplate::for_model(&choice, &tokenizer).expect("it compiles");
            TokenizerFiles::new(&base, &tokenizer, Some(&template), 512).expect("told").config["chat_template"].clone()
        };
        assert_eq!(config("auto").as_str(), tokenizer.chat_template());
        assert_eq!(config("{{ messages[0].content }}"), "{{ messages[0].content }}");
        assert!(config("alpaca").as_str().is_some_and(|text| text.contains("### Response:")));
    }

    #[test]
    fn a_template_of_its_own_writes_the_bos_that_the_model_expects() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        TinyModel { sentence_piece: true, ..TinyModel::default() }.write(&path).expect("written");
        let base = GgufFile::open(&path).expect("our own file");
        let tokenizer = Tokenizer::from_gguf(&base).expect("ours");
        for (text, expected) in [
            ("{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"),
            ("{{ bos_token + messages[0].content }}", "{{ bos_token + messages[0].content }}"),
        ] {
            let template = ChatTemplate::for_model(&Template::Jinja(text.into()), &tokenizer).expect("it compiles");
            let files = TokenizerFiles::new(&base, &tokenizer, Some(&template), 512).expect("told");
            assert_eq!(files.config["chat_template"], expected);
        }
    }
}
