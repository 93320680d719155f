//! What a file becomes, from its bytes to its rows in tokens.

mod formats;
mod golden;
mod mask;
mod real_files;
mod report;
mod rows;
mod tool_use;

use std::io::Write;

use serde_json::Value;

use super::encode::EncodeError;
use super::*;
use crate::Error;
use crate::spec::TrainOn;
use crate::tokenizer::Metadata;
use format::Content;

/// ChatML with a default system message, which is what SmolLM2 has.
pub(super) const CHATML: &str = "{% for m in messages %}\
    {% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}\
    {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Llama 3's headers, written for the tokens of the test vocabulary: BOS from the template, content trimmed, nothing after
/// the end of a turn.
pub(super) const LLAMA3: &str = "{%- set offset = 0 %}{{- bos_token }}\n\
    {%- for message in messages %}\n\
    {{- '<note>' + message['role'] + '<note>\n\n' + message['content'] | trim + '<|im_end|>' }}\n\
    {%- endfor %}\n\
    {%- if add_generation_prompt %}{{- '<note>assistant<note>\n\n' }}{%- endif %}";

/// The tokenizer of the golden file: 1,000 tokens, `<|im_start|>` its BOS and `<|im_end|>` its EOS.
pub(super) fn tokenizer(template: Option<&str>, add_bos: bool) -> Tokenizer {
    Tokenizer::new(metadata(template, add_bos)).expect("a tokenizer")
}

/// What that tokenizer is made of.
pub(super) fn metadata(template: Option<&str>, add_bos: bool) -> Metadata {
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/golden/tokenizer.json")).expect("golden file");
    let strings = |key: &str| -> Vec<String> { serde_json::from_value(golden[key].clone()).expect("strings") };
    let tokens = strings("tokens");
    let id = |text: &str| tokens.iter().position(|token| token == text).map(|id| id as u32);
    let (bos, eos) = (id("<|im_start|>"), id("<|im_end|>"));
    Metadata {
        model: "gpt2".into(),
        pre: Some("smollm".into()),
        token_types: serde_json::from_value(golden["token_types"].clone()).expect("numbers"),
        merges: strings("merges"),
        bos,
        eos,
        add_bos: Some(add_bos),
        chat_template: template.map(str::to_owned),
        tokens,
        ..Metadata::default()
    }
}

/// Reads a file of that content with ChatML and a context of 512 tokens.
pub(super) fn read_text(content: impl AsRef<[u8]>, spec: &TrainSpec) -> Result<Dataset> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(content.as_ref()).expect("written");
    let tokenizer = tokenizer(Some(CHATML), false);
    let dataset = prepare(file.path(), spec, &tokenizer, 512, &std::env::temp_dir(), &mut || ());
    if let Ok(dataset) = &dataset {
        let report = validate(file.path(), spec, &tokenizer, 512, &mut || ()).expect("what can be prepared is valid");
        assert_eq!(report, dataset.report);
    }
    dataset
}

/// The error of a data set that cannot be trained on.
pub(super) fn dataset_error(result: Result<Dataset>) -> DatasetError {
    match result {
        Err(Error::Dataset(error)) => error,
        Err(error) => panic!("another error: {error}"),
        Ok(dataset) => panic!("no error: {:?}", dataset.report),
    }
}

/// The tokens of a conversation under a template.
pub(super) fn encode_messages(
    messages: &[Message],
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    train_on: TrainOn,
    max_tokens: usize,
) -> Result<Row, EncodeError> {
    let content = Content::Conversation { pointer: "/messages".into(), messages: messages.to_vec(), tools: Vec::new() };
    encode::Encoder { template, tokenizer, train_on, max_tokens }.encode(&content)
}

/// The row as text, trained tokens in brackets.
pub(super) fn marked(tokenizer: &Tokenizer, row: &Row) -> String {
    let mut text = Vec::new();
    let mut inside = false;
    for (&id, &trained) in row.tokens.iter().zip(&row.trained) {
        if trained != inside {
            text.push(if trained { b'[' } else { b']' });
            inside = trained;
        }
        text.extend_from_slice(tokenizer.token_bytes(id));
    }
    if inside {
        text.push(b']');
    }
    String::from_utf8(text).expect("UTF-8 in these tests")
}
