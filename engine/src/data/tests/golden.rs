//! Templates in the styles of well-known models, rendered as transformers renders them (scripts/golden/templates.py), and what
//! hostile ones are kept from.

use std::time::Instant;

use serde::Deserialize;

use super::*;
use crate::spec::Template;

#[derive(Deserialize)]
struct Golden {
    bos_token: String,
    eos_token: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    add_generation_prompt: bool,
    /// `None` where the template refuses.
    text: Option<String>,
}

fn source(name: &str) -> &'static str {
    match name {
        "chatml" => include_str!("../../../tests/golden/templates/chatml.jinja"),
        "chatml_tools" => include_str!("../../../tests/golden/templates/chatml_tools.jinja"),
        "filters" => include_str!("../../../tests/golden/templates/filters.jinja"),
        "headers" => include_str!("../../../tests/golden/templates/headers.jinja"),
        "inst" => include_str!("../../../tests/golden/templates/inst.jinja"),
        "inst_tools" => include_str!("../../../tests/golden/templates/inst_tools.jinja"),
        "lines" => include_str!("../../../tests/golden/templates/lines.jinja"),
        "one_line" => include_str!("../../../tests/golden/templates/one_line.jinja"),
        other => panic!("no template {other}"),
    }
}

fn message(value: &Value) -> Message {
    let role = match value["role"].as_str().expect("a role") {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        other => panic!("no role {other}"),
    };
    Message {
        tool_calls: value["tool_calls"].as_array().cloned().unwrap_or_default(),
        tool_call_id: value["tool_call_id"].as_str().map(str::to_owned),
        ..Message::new(role, value["content"].as_str().expect("a text"))
    }
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden: Golden =
        serde_json::from_str(include_str!("../../../tests/golden/templates.json")).expect("golden file");
    assert_eq!(golden.cases.len(), 52);
    for (index, case) in golden.cases.iter().enumerate() {
        let template =
            ChatTemplate::new(source(&case.template), &golden.bos_token, &golden.eos_token).expect("compiles");
        let messages: Vec<Message> = case.messages.iter().map(message).collect();
        let tools = case.tools.as_deref().unwrap_or_default();
        let text = template.render(&messages, tools, case.add_generation_prompt);
        match (&case.text, text) {
            (Some(expected), Ok(text)) => assert_eq!(&text, expected, "case {index} of {}", case.template),
            (None, Err(Error::Template(message))) => {
                assert!(message.starts_with("it refuses the conversation: "), "{}: {message}", case.template);
            }
            (expected, got) => panic!("case {index} of {}: {expected:?}, {got:?}", case.template),
        }
    }
}

/// A conversation under one of the golden templates, in the test vocabulary's tokens: trained ones in brackets.
fn masked(name: &str, train_on: TrainOn) -> Result<String, EncodeError> {
    let tokenizer = tokenizer(Some(source(name)), false);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let turns = [(Role::User, "q1"), (Role::Assistant, "a1"), (Role::User, "q2"), (Role::Assistant, "a2")];
    let messages: Vec<Message> = turns.iter().map(|&(role, content)| Message::new(role, content)).collect();
    encode_messages(&messages, &template, &tokenizer, train_on, 4096).map(|row| marked(&tokenizer, &row))
}

#[test]
fn the_mask_is_found_in_every_style() {
    let completions = |name| masked(name, TrainOn::Completions).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    assert!(completions("chatml").contains("<|im_start|>assistant\n[a1<|im_end|>]\n<|im_start|>user\nq2<|im_end|>\n"));
    assert_eq!(
        completions("inst"),
        "<|im_start|>[INST] q1 [/INST][ a1 <|im_end|>]<|im_start|>[INST] q2 [/INST][ a2 <|im_end|>]"
    );
    assert_eq!(completions("inst_tools"), "<|im_start|>[INST] q1[/INST][ a1<|im_end|>][INST] q2[/INST][ a2<|im_end|>]");
    // The tags of the turns' ends are no tokens of this vocabulary, so these two would teach the model never to stop.
    for name in ["headers", "one_line"] {
        let error = masked(name, TrainOn::Completions).expect_err("no end");
        assert!(
            matches!(&error, EncodeError::Fatal(Error::Template(message)) if message.contains("never to stop")),
            "{error:?}"
        );
    }
    let lines = completions("lines");
    let end = "<|assistant|>\n[a1<|im_end|>]\n<|user|>\nq2<|im_end|>\n<|assistant|>\n[a2<|im_end|>]";
    assert!(lines.ends_with(end), "{lines}");
}

#[test]
fn a_template_without_a_mask_can_train_on_all() {
    // It numbers the messages that are left, so that nothing that it writes is the beginning of what it writes later.
    let counted = "{% for m in messages %}{{ loop.revindex ~ m.content + eos_token }}{% endfor %}";
    let tokenizer = tokenizer(Some(counted), true);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let mut messages = vec![Message::new(Role::User, "q"), Message::new(Role::Assistant, "a")];
    let encode = |messages: &[Message], train_on| {
        encode_messages(messages, &template, &tokenizer, train_on, 4096).map(|row| marked(&tokenizer, &row))
    };
    assert_eq!(encode(&messages, TrainOn::All).expect("encodes"), "<|im_start|>[2q<|im_end|>1a<|im_end|>]");
    let why = |error| match error {
        EncodeError::Fatal(Error::Template(message)) => message,
        other => panic!("{other:?}"),
    };
    let message = why(encode(&messages, TrainOn::Completions).expect_err("no mask"));
    assert!(message.contains("cannot be told; give another dataset.template, or train on every token"), "{message}");
    messages[1].trained = false;
    messages.extend([Message::new(Role::User, "r"), Message::new(Role::Assistant, "b")]);
    assert!(why(encode(&messages, TrainOn::All).expect_err("a turn of weight 0")).contains("cannot be told"));
    let prompt = chat_prompt(&messages[..1], &template, &tokenizer).expect("a prompt");
    assert_eq!(tokenizer.decode(&prompt), "1q");
}

#[test]
fn a_hostile_template_is_stopped_early() {
    let started = Instant::now();
    for source in [
        "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 1000000000000 }}",
        "{{ ('x' * 100000) | replace('x', 'x' * 100000) }}",
        "{{ ('x' * 100000).replace('x', 'x' * 100000) }}",
        "{{ (['x' * 100000] * 100000) | join }}",
        "{{ 'x'.join(['x' * 100000] * 100000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ range(100000) | list | tojson(indent=16) }}{{ range(1000000000000) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n ~ n) }}{% endmacro %}{{ f('xx') }}",
        "{% set ns = namespace(x={}) %}{% for i in range(100) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
        "{{ range(1000000000000) | list }}",
    ] {
        let template = ChatTemplate::new(source, "", "").expect("compiles");
        let rendered = template.render(&[Message::new(Role::User, "q")], &[], true);
        assert!(rendered.is_err(), "{source}: {} bytes", rendered.map_or(0, |text| text.len()));
    }
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
    let long = ChatTemplate::new(&"a".repeat(65_537), "", "").err().expect("too long").to_string();
    assert!(long.contains("it has 65537 bytes, at most 65536 are supported"), "{long}");
    let deep = format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(ChatTemplate::new(&format!("{{{{ {deep} }}}}"), "", "").is_err());
}
