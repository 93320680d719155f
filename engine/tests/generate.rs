//! Generation: why a text ends, what is drawn, and what is refused.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::ops::ControlFlow;

use lorad_engine::generate::{FinishReason, GenerateSpec, Generated, generate};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::testing::TinyModel;
use lorad_engine::tokenizer::Tokenizer;
use support::tiny;

const GREEDY: GenerateSpec = GenerateSpec { max_tokens: 8, temperature: 0.0, top_p: 1.0, seed: 1 };

struct Setup {
    model: Llama,
    tokenizer: Tokenizer,
}

impl Setup {
    fn new() -> Self {
        let (file, model): (GgufFile, Llama) = tiny(&TinyModel { context_length: 32, ..TinyModel::default() });
        Self { model, tokenizer: Tokenizer::from_gguf(&file).unwrap() }
    }

    fn generate(&self, prompt: &[u32], spec: &GenerateSpec) -> lorad_engine::Result<Generated> {
        generate(&self.model, &self.tokenizer, None, prompt, spec, &mut |_| ControlFlow::Continue(()))
    }
}

#[test]
fn greedy_text_is_the_most_likely_token_each_time() {
    let setup = Setup::new();
    let prompt = [40, 41, 42];
    let generated = setup.generate(&prompt, &GREEDY).unwrap();
    let mut tokens = prompt.to_vec();
    for &token in &generated.tokens {
        let logits: Vec<Vec<f32>> = setup.model.logits(&tokens, None).unwrap().to_vec2().unwrap();
        let last = logits.last().unwrap();
        assert!(last.iter().all(|&logit| logit <= last[token as usize]));
        tokens.push(token);
    }
    assert_eq!(generated.text, setup.tokenizer.decode(&generated.tokens));
}

#[test]
fn draws_repeat_with_their_seed() {
    let setup = Setup::new();
    let drawn = |seed, top_p| {
        let spec = GenerateSpec { max_tokens: 16, temperature: 1.0, top_p, seed };
        setup.generate(&[40, 41], &spec).unwrap().tokens
    };
    assert_eq!(drawn(1, 1.0), drawn(1, 1.0));
    assert_ne!(drawn(1, 1.0), drawn(2, 1.0));
    let greedy = setup.generate(&[40, 41], &GenerateSpec { max_tokens: 16, ..GREEDY }).unwrap().tokens;
    assert_eq!(drawn(3, 1e-6), greedy, "so small a share is the most likely token alone");
}

#[test]
fn a_text_ends_at_max_tokens_the_context_or_the_receiver() {
    let setup = Setup::new();
    let end = |prompt: &[u32], max_tokens| {
        let generated = setup.generate(prompt, &GenerateSpec { max_tokens, ..GREEDY }).unwrap();
        (generated.tokens.len(), generated.finish_reason)
    };
    assert_eq!(end(&[40, 41], 5), (5, FinishReason::Length));
    assert_eq!(end(&[40; 30], 5), (2, FinishReason::Length), "the context has room for two more");
    let mut pieces = 0;
    let mut receive = |_: &str| {
        pieces += 1;
        ControlFlow::Break(())
    };
    let broken = generate(&setup.model, &setup.tokenizer, None, &[40], &GREEDY, &mut receive).unwrap();
    assert_eq!((broken.finish_reason, pieces), (FinishReason::Broken, 1));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let setup = Setup::new();
    let cases: [(&[u32], GenerateSpec, &str); 7] = [
        (&[], GREEDY, "empty prompt"),
        (&[40; 32], GREEDY, "fills the model's context length 32"),
        (&[9999], GREEDY, "token 9999"),
        (&[40], GenerateSpec { max_tokens: 0, ..GREEDY }, "max_tokens must be at least 1, got `0`"),
        (&[40], GenerateSpec { temperature: -1.0, ..GREEDY }, "temperature must be in [0, 10], got `-1`"),
        (&[40], GenerateSpec { temperature: f64::NAN, ..GREEDY }, "temperature"),
        (&[40], GenerateSpec { top_p: 0.0, ..GREEDY }, "top_p must be in (0, 1], got `0`"),
    ];
    for (prompt, spec, message) in cases {
        let error = setup.generate(prompt, &spec).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
