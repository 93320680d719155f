//! How the data set is read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::SpecError;
use crate::files::shorten;
use crate::jinja::{self, MAX_TEMPLATE_BYTES};

/// Characters of a column's name.
const MAX_COLUMN_NAME: usize = 256;

/// How a row of the data set is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetFormat {
    /// Found out from the first rows.
    #[default]
    Auto,
    /// `instruction`, optional `input` and `system`, `output`.
    Alpaca,
    /// `conversations: [{from, value}]`, optional `system` and `tools`.
    Sharegpt,
    /// OpenAI's `messages: [{role, content}]`, optional `tools`.
    Chat,
    /// `prompt`, `completion`; no template.
    Completion,
    /// `text`; no template, every token is trained.
    Text,
}

impl DatasetFormat {
    /// The formats that a file can have.
    pub const ALL: [Self; 5] = [Self::Alpaca, Self::Sharegpt, Self::Chat, Self::Completion, Self::Text];

    /// The fields of a row that `dataset.columns` may give another name to.
    pub fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Auto => &[],
            Self::Alpaca => &["instruction", "input", "output", "system"],
            Self::Sharegpt => &["conversations", "system", "tools"],
            Self::Chat => &["messages", "tools"],
            Self::Completion => &["prompt", "completion"],
            Self::Text => &["text"],
        }
    }
}

/// Names that a file's columns have in place of the format's own: the format's name of a field, and the file's.
pub type Columns = BTreeMap<String, String>;

/// Which prompt text surrounds the messages. Spelt `auto`, `alpaca`, or as the Jinja text itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Template {
    /// The model's own chat template; the Alpaca prompt where it has none.
    #[default]
    Auto,
    /// The Alpaca prompt.
    Alpaca,
    /// A chat template in Jinja, as `tokenizer_config.json` files hold it.
    Jinja(String),
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "alpaca" => Ok(Self::Alpaca),
            other if other.contains("{{") || other.contains("{%") => Ok(Self::Jinja(text)),
            other => Err(format!("expected auto, alpaca or a Jinja text, got `{}`", shorten(other))),
        }
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        match template {
            Template::Auto => "auto".to_owned(),
            Template::Alpaca => "alpaca".to_owned(),
            Template::Jinja(text) => text,
        }
    }
}

/// Which tokens have a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// The assistant's turns, their end token included.
    #[default]
    Completions,
    /// Every token but the first of a row.
    All,
}

/// What a caller said about the data set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DatasetOptions {
    /// Row layout.
    pub format: Option<DatasetFormat>,
    /// Names of the file's columns.
    pub columns: Option<Columns>,
    /// Prompt text.
    pub template: Option<Template>,
    /// Which tokens have a loss.
    pub train_on: Option<TrainOn>,
}

/// The data set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// Row layout. Default auto; where columns are named, the format whose fields they are.
    pub format: DatasetFormat,
    /// Names of the file's columns. Default: the format's own.
    #[serde(default, skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Prompt text. Default auto.
    pub template: Template,
    /// Which tokens have a loss. Default completions.
    pub train_on: TrainOn,
}

pub(super) fn resolve(options: &DatasetOptions) -> Result<DatasetSpec, SpecError> {
    let columns = options.columns.clone().unwrap_or_default();
    let format = format_of(options.format.unwrap_or_default(), &columns)?;
    let template = options.template.clone().unwrap_or_default();
    check_template(&template)?;
    Ok(DatasetSpec { format, columns, template, train_on: options.train_on.unwrap_or_default() })
}

fn check_template(template: &Template) -> Result<(), SpecError> {
    let Template::Jinja(text) = template else { return Ok(()) };
    let error = |message| Err(SpecError { field: "dataset.template", message });
    if text.len() > MAX_TEMPLATE_BYTES {
        return error(format!("dataset.template must have at most {MAX_TEMPLATE_BYTES} bytes, got `{}`", text.len()));
    }
    jinja::check(text).or_else(|what| error(format!("dataset.template is no Jinja template, {what}")))
}

/// The format that the named columns leave.
fn format_of(format: DatasetFormat, columns: &Columns) -> Result<DatasetFormat, SpecError> {
    if columns.is_empty() {
        return Ok(format);
    }
    let mut taken: Vec<&str> = Vec::new();
    for (field, column) in columns {
        if column.is_empty() || column.chars().count() > MAX_COLUMN_NAME {
            return Err(columns_error(format!(
                "dataset.columns.{field} must be a name of 1 to {MAX_COLUMN_NAME} characters"
            )));
        }
        if taken.contains(&column.as_str()) {
            return Err(columns_error(format!("dataset.columns gives the column `{column}` to two fields")));
        }
        taken.push(column);
    }
    let named = match format {
        DatasetFormat::Auto => &DatasetFormat::ALL[..],
        _ => std::slice::from_ref(&format),
    };
    let fits = |format: &&DatasetFormat| columns.keys().all(|field| format.fields().contains(&field.as_str()));
    let fitting: Vec<DatasetFormat> = named.iter().filter(fits).copied().collect();
    match fitting[..] {
        [format] => Ok(format),
        [] => {
            let known: Vec<String> = named.iter().map(|format| format.fields().join(", ")).collect();
            let fields = columns.keys().cloned().collect::<Vec<_>>().join(", ");
            let known = known.join("; or ");
            Err(columns_error(format!("dataset.columns must name fields of one format ({known}), got `{fields}`")))
        }
        _ => Err(columns_error("dataset.columns names fields of several formats: give dataset.format too".into())),
    }
}

fn columns_error(message: String) -> SpecError {
    SpecError { field: "dataset.columns", message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(format: DatasetFormat, columns: &[(&str, &str)]) -> Result<DatasetSpec, String> {
        let columns = columns.iter().map(|&(field, column)| (field.to_owned(), column.to_owned())).collect();
        let options = DatasetOptions { format: Some(format), columns: Some(columns), ..DatasetOptions::default() };
        resolve(&options).map_err(|error| error.message)
    }

    #[test]
    fn a_template_is_a_name_or_a_text_that_compiles() {
        let read = |text: &str| serde_json::from_value::<Template>(text.into());
        assert_eq!(read("auto").expect("a name"), Template::Auto);
        assert!(
            read("llama3")
                .expect_err("no name")
                .to_string()
                .contains("expected auto, alpaca or a Jinja text, got `llama3`")
        );
        let good = read("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}");
        let good = good.expect("a text");
        let resolved = |template| resolve(&DatasetOptions { template: Some(template), ..DatasetOptions::default() });
        assert_eq!(resolved(good.clone()).expect("it compiles").template, good);
        assert_eq!(serde_json::to_value(&good).expect("a string").as_str().map(str::len), Some(85));
        let broken = Template::Jinja("{{ messages }}\n{% for m in messages %}\n{% endif %}\n".into());
        let error = resolved(broken).expect_err("it does not compile");
        assert_eq!(error.field, "dataset.template");
        assert!(error.message.starts_with("dataset.template is no Jinja template, line 3: "), "{}", error.message);
        let long = Template::Jinja("{{ 1 }}".repeat(10_000));
        assert!(resolved(long).expect_err("too long").message.contains("at most 65536 bytes"));
    }

    #[test]
    fn named_columns_tell_the_format() {
        use DatasetFormat::{Alpaca, Auto, Chat, Completion, Sharegpt, Text};
        let format = |format, columns: &[(&str, &str)]| resolved(format, columns).map(|spec| spec.format);
        assert_eq!(format(Auto, &[]), Ok(Auto));
        assert_eq!(format(Auto, &[("instruction", "question"), ("output", "answer")]), Ok(Alpaca));
        assert_eq!(format(Auto, &[("prompt", "question"), ("completion", "answer")]), Ok(Completion));
        assert_eq!(format(Auto, &[("messages", "conversations")]), Ok(Chat));
        assert_eq!(format(Auto, &[("conversations", "c"), ("tools", "t")]), Ok(Sharegpt));
        assert_eq!(format(Auto, &[("text", "body")]), Ok(Text));
        assert_eq!(format(Chat, &[("tools", "functions")]), Ok(Chat));
        for (format, columns, message) in [
            (Auto, &[("tools", "x")][..], "give dataset.format too"),
            (Auto, &[("question", "x")], "must name fields of one format"),
            (Auto, &[("instruction", "x"), ("text", "y")], "got `instruction, text`"),
            (Text, &[("instruction", "x")], "(text), got `instruction`"),
            (Auto, &[("instruction", "x"), ("output", "x")], "gives the column `x` to two fields"),
            (Auto, &[("text", "")], "dataset.columns.text must be a name"),
        ] {
            let error = resolved(format, columns).expect_err("must be refused");
            assert!(error.contains(message), "{error}");
        }
    }
}
