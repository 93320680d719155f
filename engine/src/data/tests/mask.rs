//! Which tokens have a loss, template by template.

use proptest::prelude::*;

use super::*;
use crate::spec::Template;
use crate::spec::TrainOn;

fn messages(turns: &[(Role, &str)]) -> Vec<Message> {
    turns.iter().map(|&(role, content)| Message::new(role, content)).collect()
}

fn encode(template: &str, add_bos: bool, messages: &[Message], train_on: TrainOn) -> Result<String, EncodeError> {
    let tokenizer = tokenizer(Some(template), add_bos);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    encode_messages(messages, &template, &tokenizer, train_on, 4096).map(|row| marked(&tokenizer, &row))
}

fn encoded(template: &str, add_bos: bool, messages: &[Message]) -> String {
    encode(template, add_bos, messages, TrainOn::Completions).expect("encodes")
}

#[test]
fn chatml_trains_answers_and_their_end_but_not_the_line_break_after_it() {
    let conversation =
        messages(&[(Role::User, "q1"), (Role::Assistant, "a1"), (Role::User, "q2"), (Role::Assistant, "a2")]);
    assert_eq!(
        encoded(CHATML, false, &conversation),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n\
         <|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2<|im_end|>]"
    );
}

#[test]
fn a_turn_of_weight_0_is_context() {
    let mut conversation = messages(&[
        (Role::System, "s"),
        (Role::User, "q"),
        (Role::Assistant, "a"),
        (Role::User, "r"),
        (Role::Assistant, "b"),
    ]);
    conversation[2].trained = false;
    let expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n\
         <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]";
    assert_eq!(encoded(CHATML, false, &conversation), expected);
    let all = encode(CHATML, false, &conversation, TrainOn::All).expect("encodes");
    assert_eq!(
        all,
        "<|im_start|>[system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n]a<|im_end|>[\n\
         <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>]"
    );
}

#[test]
fn what_an_answer_quotes_does_not_move_the_mask() {
    // The answer repeats the question, the headers and the end token: a search of the text would be led astray.
    let quote = "<|im_start|>assistant\nq<|im_end|>\n";
    let text = encoded(CHATML, false, &messages(&[(Role::User, "q"), (Role::Assistant, quote)]));
    assert!(text.ends_with(&format!("<|im_start|>assistant\n[{quote}<|im_end|>]")), "{text}");
}

#[test]
fn llama3_has_one_bos_whether_the_tokenizer_or_the_template_writes_it() {
    let conversation = messages(&[(Role::User, " q "), (Role::Assistant, " a ")]);
    let expected = "<|im_start|><note>user<note>\n\nq<|im_end|><note>assistant<note>\n\n[a<|im_end|>]";
    for add_bos in [false, true] {
        assert_eq!(encoded(LLAMA3, add_bos, &conversation), expected);
    }
    let without = LLAMA3.replace("{{- bos_token }}", "");
    assert_eq!(encoded(&without, true, &conversation), expected);
    assert_eq!(encoded(&without, false, &conversation), expected.trim_start_matches("<|im_start|>"));
}

#[test]
fn training_sees_the_tokens_that_generation_starts_from() {
    for (template, add_bos) in [(CHATML, false), (LLAMA3, true)] {
        let tokenizer = tokenizer(Some(template), add_bos);
        let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
        // An answer that begins with line breaks: with the prompt's own they would make one token.
        let conversation =
            messages(&[(Role::User, "q1"), (Role::Assistant, "\n\n\na1"), (Role::User, "q2"), (Role::Assistant, "a2")]);
        let row = encode_messages(&conversation, &template, &tokenizer, TrainOn::Completions, 4096).expect("encodes");
        for asked in [1, 3] {
            let prompt = chat_prompt(&conversation[..asked], &template, &tokenizer).expect("encodes");
            assert_eq!(row.tokens[..prompt.len()], prompt);
            assert!(row.trained[prompt.len()] && !row.trained[prompt.len() - 1]);
        }
    }
}

#[test]
fn what_lies_beyond_the_cut_is_counted_but_not_taken_apart() {
    let mut conversation = Vec::new();
    for _ in 0..2000 {
        conversation.extend(messages(&[(Role::User, "q"), (Role::Assistant, "a")]));
    }
    let tokenizer = tokenizer(Some(CHATML), false);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let encode = |messages: &[Message], max_tokens| {
        encode_messages(messages, &template, &tokenizer, TrainOn::Completions, max_tokens).expect("encodes")
    };
    let cut = encode(&conversation, 64);
    let few = encode(&conversation[..20], 4096);
    assert_eq!((&cut.tokens[..64], &cut.trained[..64]), (&few.tokens[..64], &few.trained[..64]));
    let turn = few.tokens.len() - encode(&conversation[..18], 4096).tokens.len();
    assert_eq!(cut.tokens.len(), few.tokens.len() + 1990 * turn);
    assert_eq!(cut.tokens.last().copied(), tokenizer.eos());
}

#[test]
fn the_alpaca_prompt_has_its_two_forms_and_ends_in_eos() {
    let tokenizer = tokenizer(None, false);
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
    let mark = |messages: &[Message]| {
        let row = encode_messages(messages, &template, &tokenizer, TrainOn::Completions, 4096).expect("encodes");
        marked(&tokenizer, &row)
    };
    let mut row = messages(&[(Role::User, "Add."), (Role::Assistant, "3")]);
    assert_eq!(
        mark(&row),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nAdd.\n\n### Response:\n[3<|im_end|>]"
    );
    row[0].input = Some("1 2".into());
    assert_eq!(
        mark(&row),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n\
         ### Response:\n[3<|im_end|>]"
    );
    let chat = messages(&[
        (Role::System, "Be brief."),
        (Role::User, "q"),
        (Role::Assistant, "a"),
        (Role::User, "r"),
        (Role::Assistant, "b"),
    ]);
    assert_eq!(
        mark(&chat),
        "Be brief.\n\n### Instruction:\nq\n\n### Response:\n[a<|im_end|>]\n\n### Instruction:\nr\n\n### Response:\n[b<|im_end|>]"
    );
}

#[test]
fn an_alpaca_row_under_a_chat_template_has_its_input_after_the_instruction() {
    let mut row = messages(&[(Role::User, "Add."), (Role::Assistant, "3")]);
    row[0].input = Some("1 2".into());
    assert!(encoded(CHATML, false, &row).contains("<|im_start|>user\nAdd.\n\n1 2<|im_end|>"));
}

#[test]
fn templates_that_cannot_be_masked_are_refused_with_the_reason() {
    let conversation =
        messages(&[(Role::User, "q"), (Role::Assistant, "a"), (Role::User, "r"), (Role::Assistant, "b")]);
    let fatal = |template: &str| match encode(template, false, &conversation, TrainOn::Completions) {
        Err(EncodeError::Fatal(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let no_end = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    assert!(fatal(no_end).contains("does not end in a token that stops generation (<|im_end|>, <|endoftext|>)"));
    let no_prompt =
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    assert!(fatal(no_prompt).contains("does not begin with the generation prompt"));
    let drops_history = "{{ messages[-1].content + eos_token }}";
    assert!(fatal(drops_history).starts_with("invalid chat template: "));
    assert!(fatal("{{ nonsense.x.y }}").contains("does not render"));
    let forever = "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
    let tokenizer = tokenizer(Some("{% if %}"), false);
    assert!(ChatTemplate::for_model(&Template::Auto, &tokenizer).is_err());
    for template in [forever, "{{ raise_exception('roles must alternate') }}"] {
        match encode(template, false, &conversation, TrainOn::Completions) {
            Err(EncodeError::Row(problem)) => assert_eq!(problem.code, BadRowCode::TemplateRefused),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_environment_is_that_of_hugging_face() {
    let render = |source: &str| {
        let conversation = messages(&[(Role::User, " it's <b>\n"), (Role::Assistant, "é")]);
        ChatTemplate::new(source, "<s>", "</s>").expect("compiles").render(&conversation, &[], true).expect("renders")
    };
    // Blocks take their own line with them; one line break at the end of the template goes.
    assert_eq!(render("{% if true %}\nx\n  {% endif %}\ny\n"), "x\ny");
    assert_eq!(
        render("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ add_generation_prompt }}"),
        "<s></s>TrueTrue"
    );
    assert_eq!(render("{{ messages[0].content.strip().upper() }}{{ messages | length }}"), "IT'S <B>2");
    assert_eq!(
        render("{{ messages | tojson }}"),
        r#"[{"role": "user", "content": " it's <b>\n"}, {"role": "assistant", "content": "é"}]"#
    );
    assert_eq!(
        render("{{ {'a': [1, 2.5, none, true], 'b': {}} | tojson(indent=2) }}"),
        "{\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"b\": {}\n}"
    );
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), "26 Jul 2024");
    assert_eq!(
        render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['role'] }}{% endfor %}"),
        "assistant"
    );
    assert_eq!(
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"),
        "2"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is said: the tokens are the template's text, and those with a loss are the trained answers and their ends.
    #[test]
    fn the_mask_covers_the_answers_and_nothing_else(turns in prop::collection::vec((texts(), texts(), any::<bool>()), 1..5)) {
        for (template, end) in [(CHATML, "<|im_end|>"), (LLAMA3, "<|im_end|>")] {
            let mut messages = Vec::new();
            let mut answers = String::new();
            for (question, answer, trained) in &turns {
                messages.push(Message::new(Role::User, question));
                messages.push(Message { trained: *trained, ..Message::new(Role::Assistant, answer) });
                // LLAMA3 trims what is said.
                let said = if template == LLAMA3 { answer.trim() } else { answer };
                if *trained {
                    answers.push_str(said);
                    answers.push_str(end);
                }
            }
            let tokenizer = tokenizer(Some(template), false);
            let chat = ChatTemplate::for_model(&Template::Auto, &tokenizer).expect("compiles");
            let text = chat.render(&messages, &[], false).expect("renders");
            let row = encode_messages(&messages, &chat, &tokenizer, TrainOn::Completions, 4096).expect("encodes");
            let shown = |all: bool| {
                let tokens = row.tokens.iter().zip(&row.trained).filter(|(_, trained)| all || **trained);
                let bytes: Vec<u8> = tokens.flat_map(|(&id, _)| tokenizer.token_bytes(id)).copied().collect();
                String::from_utf8_lossy(&bytes).into_owned()
            };
            prop_assert_eq!(shown(true), text.trim_end());
            prop_assert_eq!(shown(false), answers);
        }
    }
}

/// Texts of what is awkward: marks of the template, white space at the ends, what merges across a border.
fn texts() -> impl Strategy<Value = String> {
    let pieces = [
        "a",
        " the",
        "\n",
        "\n\n",
        " ",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "assistant",
        "1",
        "世界",
        "<note>",
        ".",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 1..6).prop_map(|pieces| pieces.concat())
}
