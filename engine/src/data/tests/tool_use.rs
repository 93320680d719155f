//! Functions, calls and results: under templates that have a place for them, and under those that have none.

use serde_json::json;

use super::*;
use crate::spec::Template;

/// A template in the style of Hermes' and Qwen's, for the tokens of the test vocabulary.
const WITH_TOOLS: &str = "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}\
    {%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}\
    {%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn row() -> Value {
    let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
    json!({"tools": [tool], "messages": [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1, \"b\": 2}"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]})
}

fn sharegpt_row() -> Value {
    json!({"tools": "[{\"name\": \"add\", \"parameters\": {\"type\": \"object\"}}]", "conversations": [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": "{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]})
}

fn encode(row: &Value, template: &str, format: Format) -> Result<String, EncodeError> {
    let tokenizer = tokenizer(Some(template), false);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let columns = crate::spec::Columns::new();
    let object = row.as_object().expect("an object");
    let content = format::parse_row(object, format, &columns).expect("a good row").content;
    let train_on = TrainOn::Completions;
    let encoder = encode::Encoder { template: &template, tokenizer: &tokenizer, train_on, max_tokens: 4096 };
    encoder.encode(&content).map(|row| marked(&tokenizer, &row))
}

#[test]
fn a_template_with_a_place_for_tools_gets_them_as_objects() {
    let expected = "<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": {\"type\": \"object\"}}}\n<|im_end|>\n\
         <|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n\
         [<call>{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}</call><|im_end|>]\n\
         <|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n[It is 3.<|im_end|>]";
    assert_eq!(encode(&row(), WITH_TOOLS, Format::Chat).expect("encodes"), expected);
    assert_eq!(encode(&sharegpt_row(), WITH_TOOLS, Format::Sharegpt).expect("encodes"), expected);
}

#[test]
fn a_template_without_a_place_for_tools_gets_them_as_text() {
    let text = encode(&row(), CHATML, Format::Chat).expect("encodes");
    assert!(
        text.starts_with("<|im_start|>system\nThese functions can be called:\n<tools>\n{\"type\": \"function\", "),
        "{text}"
    );
    let rest = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n\
         [<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call><|im_end|>]\n\
         <|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n[It is 3.<|im_end|>]";
    assert!(text.ends_with(rest), "{text}");
    assert_eq!(encode(&sharegpt_row(), CHATML, Format::Sharegpt).expect("encodes"), text);
    // Results that follow each other are one message, after the system message's own text.
    let mut row = row();
    let messages = row["messages"].as_array_mut().expect("a list");
    messages.insert(3, json!({"role": "tool", "content": "4"}));
    messages.insert(0, json!({"role": "system", "content": "Be brief."}));
    let text = encode(&row, CHATML, Format::Chat).expect("encodes");
    assert!(text.contains("3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>"), "{text}");
    assert!(text.starts_with("<|im_start|>system\nBe brief.\n\nThese functions can be called:"), "{text}");
}

#[test]
fn the_models_own_template_for_tools_is_taken_where_there_are_tools() {
    let mut metadata = metadata(Some(CHATML), false);
    metadata.tool_use_template = Some(WITH_TOOLS.into());
    let tokenizer = Tokenizer::new(metadata).expect("a tokenizer");
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let messages = [Message::new(Role::User, "q")];
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let render = |tools: &[Value]| template.render(&messages, tools, true).expect("renders");
    assert!(render(&[tool]).starts_with("<|im_start|>system\n{\"type\": \"function\""));
    assert!(render(&[]).starts_with("<|im_start|>system\nBe kind."));
}

#[test]
fn what_a_template_leaves_out_is_not_left_out_in_silence() {
    let refused = |row: &Value, template: &str| match encode(row, template, Format::Chat) {
        Err(EncodeError::Row(problem)) => {
            assert_eq!((problem.code, problem.pointer.as_str()), (BadRowCode::TemplateRefused, "/messages"));
            problem.message
        }
        other => panic!("{other:?}"),
    };
    // It mentions tools, but writes neither them nor the calls.
    let no_tools = format!("{{# tools, tool_calls #}}{CHATML}");
    assert_eq!(refused(&row(), &no_tools), "the chat template leaves out the function `add`");
    let mut without = row();
    without["tools"] = Value::Null;
    assert_eq!(refused(&without, &no_tools), "the chat template leaves out the call of `add`");
    // A chain of ifs without an else.
    let roles = "{% for m in messages %}{% if m.role == 'user' %}{{ 'U' + m.content }}{% elif m.role == 'assistant' %}\
         {{ 'A' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}";
    let system = json!({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
    ]});
    assert_eq!(refused(&system, roles), "the chat template leaves out a message of role system");
}
