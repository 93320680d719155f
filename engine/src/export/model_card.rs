//! The README.md of an adapter's folder: what it is, how it was trained, how to use it. Never a word of the training text.

use std::fmt::Write;
use std::path::Path;

use crate::adapter::LoraParams;
use crate::data::Report;
use crate::files::write_atomically;
use crate::spec::{LoraSpec, Target, TrainSpec};
use crate::train::Best;
use crate::{Error, Result};

const CARD_FILE: &str = "README.md";

/// What a model card tells.
#[derive(Debug, Clone)]
pub struct ModelCard<'a> {
    /// The adapter's name.
    pub name: &'a str,
    /// The base, as adapter_config.json names it.
    pub base_model: &'a str,
    /// The LoRA.
    pub lora: &'a LoraSpec,
    /// How it was trained, where that is known.
    pub training: Option<TrainingFacts<'a>>,
}

/// How an adapter was trained; the same for the same run, however often that was interrupted.
#[derive(Debug, Clone)]
pub struct TrainingFacts<'a> {
    /// Every hyperparameter.
    pub spec: &'a TrainSpec,
    /// What was found in the data set.
    pub report: &'a Report,
    /// Optimizer steps.
    pub steps: u32,
    /// Tokens with a loss, over all epochs.
    pub trained_tokens: u64,
    /// Loss of the last step, where it is known.
    pub train_loss: Option<f64>,
    /// The evaluation whose LoRA this is, where early stopping chose it.
    pub best: Option<Best>,
}

impl ModelCard<'_> {
    /// Writes the LoRA's PEFT folder with this card in it.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn save_adapter(&self, lora: &LoraParams, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        write_atomically(&folder.join(CARD_FILE), self.markdown().as_bytes())?;
        lora.save_peft(folder, self.base_model)
    }

    /// The card in Markdown, with the front matter that model hubs read.
    pub fn markdown(&self) -> String {
        let Self { name, base_model, lora, training } = self;
        let base = quoted(base_model);
        let targets = lora.target_modules.iter().map(|&target| Target::name(target)).collect::<Vec<_>>().join(", ");
        let mut card = format!(
            "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- lorad\n---\n\n\
             # {}\n\nA LoRA adapter for `{}`, written by lorad.\n\n## LoRA\n\n\
             | | |\n|---|---|\n| rank | {} |\n| alpha | {} |\n| scale | {} |\n| projections | {targets} |\n",
            in_one_line(name),
            in_one_line(base_model),
            lora.r,
            lora.alpha,
            if lora.use_rslora { "alpha / √rank (rsLoRA)" } else { "alpha / rank" },
        );
        if let Some(facts) = training {
            facts.write(&mut card);
        }
        let _ = write!(
            card,
            "\n## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
             base = AutoModelForCausalLM.from_pretrained(\"…\")  # the weights of the base above\n\
             model = PeftModel.from_pretrained(base, \"path/of/this/folder\")\n```\n"
        );
        card
    }
}

impl TrainingFacts<'_> {
    fn write(&self, card: &mut String) {
        let Self { spec, report, steps, trained_tokens, train_loss, best } = self;
        let training = &spec.training;
        let mut rows = vec![
            ("steps", steps.to_string()),
            ("rows a step", training.batch_size.to_string()),
            ("peak learning rate", format!("{:e}", training.learning_rate)),
            ("schedule", word(&training.lr_scheduler)),
            ("warm-up steps", training.warmup_steps.to_string()),
            ("optimizer", word(&training.optimizer)),
            ("weight decay", training.weight_decay.to_string()),
            ("largest gradient norm", training.max_grad_norm.to_string()),
            ("dropout before the LoRA", spec.lora.dropout.to_string()),
            ("seed", spec.seed.to_string()),
            ("trained on", word(&spec.dataset.train_on)),
            ("tokens with a loss", trained_tokens.to_string()),
        ];
        if let Some(loss) = train_loss {
            rows.push(("loss of the last step", format!("{loss:.4}")));
        }
        if let Some(Best { loss, step, .. }) = best {
            rows.push(("validation loss, the best", format!("{loss:.4} after step {step}")));
        }
        table(card, "Training", &rows);
        let mut rows = vec![
            ("rows", report.rows.to_string()),
            ("tokens", report.tokens.to_string()),
            ("longest row, in tokens", report.longest.to_string()),
            ("rows that were cut", report.truncated_rows.to_string()),
            ("rows that were left out", report.dropped_rows.to_string()),
        ];
        if let Some(format) = report.format {
            rows.insert(0, ("format", format.name().to_owned()));
        }
        table(card, "Data", &rows);
    }
}

fn table(card: &mut String, title: &str, rows: &[(&str, String)]) {
    let _ = write!(card, "\n## {title}\n\n| | |\n|---|---|\n");
    for (name, value) in rows {
        let _ = writeln!(card, "| {name} | {value} |");
    }
}

/// An enum's name in the API.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// A JSON string, which is a YAML string too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn in_one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control() || c == '`', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_has_front_matter_and_what_is_known() {
        let spec = TrainSpec::default();
        let report = Report { rows: 120, tokens: 3456, ..Report::default() };
        let (train_loss, best) = (Some(0.12345), None);
        let facts = TrainingFacts { spec: &spec, report: &report, steps: 45, trained_tokens: 9876, train_loss, best };
        let mut card = ModelCard { name: "pirate", base_model: "org/re:po", lora: &spec.lora, training: Some(facts) };
        let text = card.markdown();
        let front = "---\nbase_model: \"org/re:po\"\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- lorad\n---\n";
        assert!(text.starts_with(front), "{text}");
        for line in [
            "# pirate",
            "| rank | 16 |",
            "| projections | q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj |",
            "| peak learning rate | 2e-4 |",
            "| schedule | linear |",
            "| loss of the last step | 0.1235 |",
            "| tokens with a loss | 9876 |",
            "| rows | 120 |",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` in {text}");
        }
        card.training = None;
        let text = card.markdown();
        assert!(text.contains("| alpha | 16 |") && !text.contains("## Training"), "{text}");
    }

    #[test]
    fn a_name_cannot_break_out_of_its_place() {
        let spec = TrainSpec::default();
        let card = ModelCard { name: "a\n---\nb", base_model: "x\"\nlicense: y", lora: &spec.lora, training: None };
        let text = card.markdown();
        assert!(text.contains("base_model: \"x\\\"\\nlicense: y\"\n"), "{text}");
        assert!(text.contains("# a --- b\n"), "{text}");
    }
}
