//! A base model with SentencePiece's tokenizer is trained like any other: rows, mask, steps, and an answer.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::io::Write;
use std::ops::ControlFlow;

use lorad_engine::data::{ChatTemplate, Message, Role, chat_prompt, prepare};
use lorad_engine::generate::{GenerateSpec, generate};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::spec::{Template, TrainOptions, TrainSpec, TrainingOptions};
use lorad_engine::testing::{TinyModel, shared_data};
use lorad_engine::tokenizer::Tokenizer;
use lorad_engine::train::{Outcome, Start, TrainEvent, train};

/// Trains that model on one answer to ten questions; the losses of the steps come with it.
fn trained(file: &GgufFile, model: &Llama, template: Template) -> (Outcome, Vec<f64>) {
    let tokenizer = Tokenizer::from_gguf(file).unwrap();
    let training = TrainingOptions { max_steps: Some(12), learning_rate: Some(0.02), ..TrainingOptions::default() };
    let mut spec = TrainSpec::resolve(&TrainOptions { training, ..TrainOptions::default() }).unwrap();
    spec.dataset.template = template;
    let mut data = tempfile::NamedTempFile::new().unwrap();
    for name in ["ann", "ben", "lia", "tom", "sue", "ron", "ned", "ida", "lou", "dan"] {
        writeln!(data, r#"{{"instruction": "tell {name} a thing", "output": "there he sat and ate the hat"}}"#)
            .unwrap();
    }
    let (scratch, context_length) = (std::env::temp_dir(), model.config().context_length);
    let dataset = prepare(data.path(), &spec, &tokenizer, context_length, &scratch, &mut || ()).unwrap();
    let mut losses = Vec::new();
    let outcome = train(&spec, model, &dataset, Start::default(), &mut |event| {
        if let TrainEvent::Step(step) = event {
            losses.push(step.loss);
        }
        ControlFlow::Continue(())
    });
    (outcome.unwrap(), losses)
}

#[test]
fn a_sentence_piece_model_learns_and_answers_without_a_stray_space() {
    let (file, model) = support::tiny(&TinyModel { sentence_piece: true, ..TinyModel::default() });
    let (outcome, losses) = trained(&file, &model, Template::Auto);
    assert!(losses[11] < 0.7 * losses[0], "{losses:?}");
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).unwrap();
    let prompt = chat_prompt(&[Message::new(Role::User, "tell ann a thing")], &template, &tokenizer).unwrap();
    assert_eq!(prompt.iter().filter(|&&id| id == tokenizer.bos().unwrap()).count(), 1);
    let spec = GenerateSpec { max_tokens: 20, temperature: 0.0, top_p: 1.0, seed: 1 };
    let answer =
        generate(&model, &tokenizer, Some(&outcome.lora), &prompt, &spec, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(answer.text.starts_with(" th"), "the template's own space, and no other: {:?}", answer.text);
}

#[test]
fn stories260k_takes_training_steps() {
    let Some(folder) = shared_data() else { return };
    let file = GgufFile::open(&folder.join("stories260K.gguf")).unwrap();
    let model = Llama::load(&file).unwrap();
    let (_, losses) = trained(&file, &model, Template::Alpaca);
    assert!(losses[11] < 0.7 * losses[0], "{losses:?}");
}
