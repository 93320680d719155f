//! Ollama's Modelfile for a GGUF file: prompt format, default system message and stop words.
//!
//! Ollama writes prompts with Go templates. A family's template is taken only where it writes what the model's own template
//! writes, which is tried on conversations; otherwise the Modelfile has none, and Ollama goes by the file's metadata.

use crate::data::{ChatTemplate, Message, Role};
use crate::tokenizer::Tokenizer;

/// How a family of chat templates writes a conversation: the text around each message, and what asks for an answer.
struct Family {
    name: &'static str,
    system: (&'static str, &'static str),
    user: (&'static str, &'static str),
    assistant: (&'static str, &'static str),
    answer: &'static str,
    /// Whether a system message stands inside the turn of the user's message after it, whose opening text it then has.
    system_opens_user: bool,
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "ChatML",
        system: ("<|im_start|>system\n", "<|im_end|>\n"),
        user: ("<|im_start|>user\n", "<|im_end|>\n"),
        assistant: ("<|im_start|>assistant\n", "<|im_end|>\n"),
        answer: "<|im_start|>assistant\n",
        system_opens_user: false,
    },
    Family {
        name: "Llama 3",
        system: ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user: ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant: ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        answer: "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system_opens_user: false,
    },
    Family {
        name: "Llama 2",
        system: ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
        user: ("[INST] ", " [/INST]"),
        assistant: (" ", " </s><s>"),
        answer: "",
        system_opens_user: true,
    },
    Family {
        name: "Mistral",
        system: ("[INST] ", "\n\n"),
        user: ("[INST] ", " [/INST]"),
        assistant: (" ", "</s>"),
        answer: "",
        system_opens_user: true,
    },
    Family {
        name: "Alpaca",
        system: ("", ""),
        user: ("\n\n### Instruction:\n", ""),
        assistant: ("\n\n### Response:\n", "</s>"),
        answer: "\n\n### Response:\n",
        system_opens_user: false,
    },
];

impl Family {
    /// The conversation as this family writes it, with the request for an answer.
    fn render(&self, messages: &[Message], eos: &str) -> String {
        let mut text = String::new();
        let mut open = false;
        for message in messages {
            let (before, after) = match message.role {
                Role::System => self.system,
                Role::User if open => ("", self.user.1),
                Role::User | Role::Tool => self.user,
                Role::Assistant => self.assistant,
            };
            open = self.system_opens_user && message.role == Role::System;
            text.extend([before, &message.content, &after.replace("</s>", eos)]);
        }
        text + self.answer
    }

    /// The same in Go's template language. `default_system` is what stands there where a conversation has no system message.
    fn go_template(&self, eos: &str) -> String {
        let with = |(before, after): (&str, &str)| {
            format!("{}{{{{ .Content }}}}{}", literal(before), literal(&after.replace("</s>", eos)))
        };
        let (system, user, assistant) = (with(self.system), with(self.user), with(self.assistant));
        let answer = literal(self.answer);
        if !self.system_opens_user {
            return format!(
                "{{{{- range .Messages }}}}{{{{ if eq .Role \"system\" }}}}{system}{{{{ else if eq .Role \"user\" }}}}{user}\
                 {{{{ else if eq .Role \"assistant\" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{answer}"
            );
        }
        let opening = literal(self.user.0);
        let rest = with(("", self.user.1));
        format!(
            "{{{{- $open := false }}}}{{{{ range .Messages }}}}{{{{ if eq .Role \"system\" }}}}{system}{{{{ $open = true }}}}\
             {{{{ else if eq .Role \"user\" }}}}{{{{ if not $open }}}}{opening}{{{{ end }}}}{{{{ $open = false }}}}{rest}\
             {{{{ else if eq .Role \"assistant\" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{answer}"
        )
    }
}

/// Text that stands in a template as it is.
fn literal(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

/// What a Modelfile needs to know of the template.
struct Found {
    family: &'static Family,
    default_system: Option<String>,
}

/// The Modelfile of a GGUF file of that name, which lies beside it.
pub(super) fn modelfile(gguf_name: &str, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> String {
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    // What Ollama puts before a prompt itself.
    let (bos, eos) = (text_of(tokenizer.bos().filter(|_| tokenizer.adds_bos())), text_of(tokenizer.eos()));
    let mut file = format!("FROM ./{gguf_name}\n\n");
    match template.and_then(|template| find_family(template, bos, eos)) {
        Some(Found { family, default_system }) => {
            file.push_str(&format!("# {}\nTEMPLATE \"\"\"{}\"\"\"\n\n", family.name, family.go_template(eos)));
            if let Some(system) = default_system {
                file.push_str(&format!("SYSTEM \"\"\"{system}\"\"\"\n\n"));
            }
        }
        None => file.push_str(
            "# No TEMPLATE: the model's chat template is of no family that is known here, and Ollama reads the one in the file.\n\n",
        ),
    }
    for &token in tokenizer.stop_tokens() {
        if let Some(text) = tokenizer.token_text(token) {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"");
            file.push_str(&format!("PARAMETER stop \"{text}\"\n"));
        }
    }
    file
}

/// The family that writes what the template writes, for conversations with and without a system message.
fn find_family(template: &ChatTemplate, bos: &str, eos: &str) -> Option<Found> {
    let (system, question) = (Message::new(Role::System, "Syst"), Message::new(Role::User, "Quest"));
    let turns = [question.clone(), Message::new(Role::Assistant, "Answ"), Message::new(Role::User, "More")];
    let render = |messages: &[Message]| {
        let text = template.render(messages, &[], true).ok()?;
        Some(text.strip_prefix(bos).map(str::to_owned).unwrap_or(text))
    };
    let plain = render(std::slice::from_ref(&question))?;
    FAMILIES.iter().find_map(|family| {
        let default_system = default_system(family, &plain, &question, eos)?;
        let with_default = |messages: &[Message]| -> Vec<Message> {
            let default = default_system.iter().map(|text| Message::new(Role::System, text.as_str()));
            default.chain(messages.iter().cloned()).collect()
        };
        let same = |messages: &[Message], as_given: &[Message]| {
            render(as_given).is_some_and(|text| text == family.render(messages, eos))
        };
        let asked = [system.clone(), question.clone()];
        // A template without a place for a system message may refuse one.
        let takes_system = render(&asked).is_none() || same(&asked, &asked);
        (takes_system && same(&with_default(&turns), &turns)).then_some(Found { family, default_system })
    })
}

/// The system message that stands before a lone question; `Some(None)`: none does, `None`: another family's text.
fn default_system(family: &Family, plain: &str, question: &Message, eos: &str) -> Option<Option<String>> {
    if plain == family.render(std::slice::from_ref(question), eos) {
        return Some(None);
    }
    let (before, after) = family.system;
    let rest = if family.system_opens_user { ("", family.user.1) } else { family.user };
    let end = format!("{after}{}{}{}{}", rest.0, question.content, rest.1.replace("</s>", eos), family.answer);
    let system = plain.strip_prefix(before)?.strip_suffix(&end)?;
    (!system.is_empty() && !system.contains("\"\"\"")).then(|| Some(system.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(source: &str, bos: &str, eos: &str) -> Option<(&'static str, Option<String>)> {
        let template = ChatTemplate::new(source, bos, eos).expect("it compiles");
        find_family(&template, bos, eos).map(|found| (found.family.name, found.default_system))
    }

    const CHATML: &str = "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    const LLAMA3: &str = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    const LLAMA2: &str = "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}\
        {% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}\
        {% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}\
        {% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}";
    const MISTRAL: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}\
        {% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";

    #[test]
    fn a_family_is_known_by_what_its_template_writes() {
        assert_eq!(found(CHATML, "<s>", "<|im_end|>"), Some(("ChatML", Some("Be kind.".to_owned()))));
        assert_eq!(found(LLAMA3, "<|begin|>", "<|eot_id|>"), Some(("Llama 3", None)));
        assert_eq!(found(LLAMA2, "<s>", "</s>"), Some(("Llama 2", None)));
        assert_eq!(found(MISTRAL, "<s>", "<|e|>"), Some(("Mistral", None)));
        assert_eq!(found("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "", "</s>"), None);
        assert_eq!(found(&CHATML.replace("<|im_end|>' + '\n", "<|im_end|>"), "", ""), None);
    }

    #[test]
    fn the_alpaca_prompt_has_its_preamble_as_system_message() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        crate::testing::TinyModel::default().write(&path).expect("written");
        let file = crate::gguf::GgufFile::open(&path).expect("our own file");
        let tokenizer = Tokenizer::from_gguf(&file).expect("a tokenizer");
        let alpaca = ChatTemplate::for_model(&crate::spec::Template::Alpaca, &tokenizer).expect("it has an EOS");
        let text = modelfile("model.gguf", &tokenizer, Some(&alpaca));
        assert!(text.contains("### Response:\n{{ .Content }}<|im_end|>{{ end }}"), "{text}");
        assert!(text.contains("SYSTEM \"\"\"Below is an instruction that describes a task."), "{text}");

        let own = ChatTemplate::for_model(&crate::spec::Template::Auto, &tokenizer).expect("its own");
        let text = modelfile("model.gguf", &tokenizer, Some(&own));
        let expected = "FROM ./model.gguf\n\n# ChatML\nTEMPLATE \"\"\"{{- range .Messages }}{{ if eq .Role \"system\" }}<|im_start|>system\n\
            {{ .Content }}<|im_end|>\n{{ else if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n\
            {{ else if eq .Role \"assistant\" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n\"\"\"\n\n\
            PARAMETER stop \"<|endoftext|>\"\nPARAMETER stop \"<|im_end|>\"\n";
        assert_eq!(text, expected);
        assert!(modelfile("model.gguf", &tokenizer, None).contains("# No TEMPLATE"));
    }
}
