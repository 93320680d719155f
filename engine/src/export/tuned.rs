//! Several exports of one tuned model: each is written aside, read back, compared with what was trained, and only then gets its
//! name. A stop or an error leaves nothing half.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tempfile::TempDir;

use super::merged::{bound_of_merged, check_merged, read_merged, write_merged};
use super::ollama::modelfile;
use super::parity::{ADAPTER_BOUND, Certificate, Reference, bound_of};
use super::{Delta, Merge, ModelCard, Progress, Quantization, gguf_lora, merged_gguf, read_gguf_lora};
use crate::adapter::LoraParams;
use crate::data::ChatTemplate;
use crate::gguf::GgufFile;
use crate::model::Llama;
use crate::ops::host;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// What can be made of a tuned model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportKind {
    /// The folder that PEFT loads, with a model card.
    Adapter,
    /// Base and LoRA merged, in one GGUF file.
    Gguf(Quantization),
    /// The LoRA as a GGUF file of its own, for `llama-cli --lora`.
    GgufLora,
    /// Base and LoRA merged, in 16-bit safetensors: the folder that transformers loads.
    Merged,
    /// A folder with a merged GGUF file and Ollama's Modelfile for it.
    Ollama(Quantization),
}

impl ExportKind {
    /// The name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Gguf(_) => "gguf",
            Self::GgufLora => "gguf_lora",
            Self::Merged => "merged",
            Self::Ollama(_) => "ollama",
        }
    }

    /// How its GGUF file stores the merged matrices, where it has one.
    pub fn quantization(self) -> Option<Quantization> {
        match self {
            Self::Gguf(quantization) | Self::Ollama(quantization) => Some(quantization),
            Self::Adapter | Self::GgufLora | Self::Merged => None,
        }
    }
}

impl fmt::Display for ExportKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())?;
        self.quantization().map_or(Ok(()), |quantization| write!(formatter, " {}", quantization.name()))
    }
}

/// Finds out before a training whether a base can be told in the form that an export has.
///
/// # Errors
/// [`Error::Model`] or [`Error::Tokenizer`] naming what cannot be told.
pub fn check_exportable(kind: ExportKind, base: &GgufFile, tokenizer: &Tokenizer) -> Result<()> {
    match kind {
        ExportKind::Merged => check_merged(base, tokenizer),
        ExportKind::Adapter | ExportKind::Gguf(_) | ExportKind::GgufLora | ExportKind::Ollama(_) => Ok(()),
    }
}

/// A tuned model, with all that its exports need.
pub struct Tuned<'a> {
    /// The base's file.
    pub base: &'a GgufFile,
    /// The base, loaded from it.
    pub model: &'a Llama,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The template that it was trained with. Where that is not the base's own, merged models carry it.
    pub template: Option<&'a ChatTemplate>,
    /// The LoRA.
    pub lora: &'a LoraParams,
    /// Appended to the base's `general.name`, after a space.
    pub name_suffix: &'a str,
    /// What the adapter's README.md tells.
    pub card: &'a ModelCard<'a>,
}

/// An export and where it shall be: a file for [`ExportKind::Gguf`] and [`ExportKind::GgufLora`], a folder for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What to make.
    pub kind: ExportKind,
    /// The name it gets.
    pub path: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// How its GGUF file stores the merged matrices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of its files.
    pub size_bytes: u64,
    /// How close it is to what was trained.
    pub parity: Certificate,
}

/// Who is told how far an export has come, and may break it off.
pub type OnProgress<'a> = &'a mut dyn FnMut(ExportKind, Progress) -> ControlFlow<()>;

/// An export that has not got its name yet; dropped, it is removed.
struct Staged<'a> {
    wanted: &'a Wanted,
    folder: TempDir,
}

impl Tuned<'_> {
    /// Makes every export; `None` where `on_progress` broke it off.
    ///
    /// # Errors
    /// [`Error::ReadBack`] where a file does not compute what was trained; [`Error::Io`], also where something is at its place
    /// already; what the single exports may fail for.
    pub fn export(&self, wanted: &[Wanted], on_progress: OnProgress<'_>) -> Result<Option<Vec<Exported>>> {
        let staged = wanted.iter().map(Staged::new).collect::<Result<Vec<_>>>()?;
        if !self.make_gguf(&staged, on_progress)? {
            return Ok(None);
        }
        let reference = Reference::new(self.model, self.lora, self.tokenizer, self.template)?;
        let mut certificates: Vec<Certificate> = Vec::with_capacity(staged.len());
        for (index, item) in staged.iter().enumerate() {
            let kind = item.wanted.kind;
            let same_file = |earlier: &&Staged<'_>| {
                kind.quantization().is_some() && earlier.wanted.kind.quantization() == kind.quantization()
            };
            let twin = staged[..index].iter().position(|earlier| same_file(&earlier));
            let made = match twin {
                Some(twin) => {
                    link(&staged[twin].gguf_path(), &item.gguf_path())?;
                    Some(certificates[twin])
                }
                None => self.make(item, &reference, &mut |progress| on_progress(kind, progress))?,
            };
            let Some(certificate) = made else { return Ok(None) };
            if let ExportKind::Ollama(quantization) = kind {
                let text = modelfile(&gguf_name(quantization), self.tokenizer, self.template);
                let path = item.path().join("Modelfile");
                std::fs::write(&path, text).map_err(Error::io(&path))?;
            }
            certificates.push(certificate);
        }
        staged.into_iter().zip(certificates).map(|(item, parity)| item.publish(parity)).collect::<Result<_>>().map(Some)
    }

    /// Writes the merged GGUF files of all exports, reading the base once; whether it was not broken off. Each is told of the
    /// progress of all.
    fn make_gguf(&self, staged: &[Staged<'_>], on_progress: OnProgress<'_>) -> Result<bool> {
        let mut made: Vec<(ExportKind, Quantization, PathBuf)> = Vec::new();
        for item in staged {
            let kind = item.wanted.kind;
            if let Some(quantization) = kind.quantization()
                && !made.iter().any(|&(_, known, _)| known == quantization)
            {
                made.push((kind, quantization, item.gguf_path()));
            }
        }
        if made.is_empty() {
            return Ok(true);
        }
        let outputs: Vec<(Quantization, &Path)> = made.iter().map(|(_, how, path)| (*how, path.as_path())).collect();
        let on_progress = &mut |progress| made.iter().try_for_each(|&(kind, ..)| on_progress(kind, progress));
        let mut copies = HashMap::new();
        for (layer, projection) in self.lora.projections() {
            let Some(pair) = self.lora.pair(layer, projection) else { continue };
            let copy = |matrix| Ok::<_, Error>(host(matrix)?.to_vec());
            copies.insert((layer, projection), (copy(&pair.lora_a)?, copy(&pair.lora_b)?));
        }
        let delta = |layer, projection| {
            let (a, b): &(Vec<f32>, Vec<f32>) = copies.get(&(layer, projection))?;
            Some(Delta { lora_a: Cow::Borrowed(a), lora_b: Cow::Borrowed(b) })
        };
        let merge = Merge {
            base: self.base,
            lora: Some(self.lora.layout().spec()),
            name_suffix: Some(self.name_suffix),
            chat_template: self.template.and_then(ChatTemplate::replacement),
        };
        Ok(merged_gguf(&merge, &delta, &outputs, on_progress)?.is_some())
    }

    /// Writes one export aside, if that has not been done, and certifies it.
    fn make(
        &self,
        item: &Staged<'_>,
        reference: &Reference,
        on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Certificate>> {
        let path = item.path();
        match item.wanted.kind {
            ExportKind::Adapter => {
                self.card.save_adapter(self.lora, &path)?;
                let read = LoraParams::zeros(self.lora.layout().clone())?;
                read.load_peft(&path)?;
                reference.certify(self.model, Some(&read), ADAPTER_BOUND).map(Some)
            }
            ExportKind::GgufLora => {
                if gguf_lora(self.lora, &self.name(), &path, on_progress)?.is_none() {
                    return Ok(None);
                }
                let read = read_gguf_lora(&GgufFile::open(&path)?, &self.model.config().shape)?;
                reference.certify(self.model, Some(&read), ADAPTER_BOUND).map(Some)
            }
            ExportKind::Gguf(quantization) | ExportKind::Ollama(quantization) => {
                let read = Llama::load(&GgufFile::open(&item.gguf_path())?)?;
                reference.certify(&read, None, bound_of(quantization)).map(Some)
            }
            ExportKind::Merged => {
                if !write_merged(self.base, self.lora, self.tokenizer, self.template, &path, on_progress)? {
                    return Ok(None);
                }
                let again = item.folder.path().join("read-back.gguf");
                read_merged(self.base, &path, &again)?;
                let read = Llama::load(&GgufFile::open(&again)?)?;
                let certificate = reference.certify(&read, None, bound_of_merged(self.base))?;
                std::fs::remove_file(&again).map_err(Error::io(&again))?;
                Ok(Some(certificate))
            }
        }
    }

    fn name(&self) -> String {
        let base = self.base.string("general.name").ok().flatten();
        base.map_or_else(|| self.name_suffix.to_owned(), |base| format!("{base} {}", self.name_suffix))
    }
}

impl<'a> Staged<'a> {
    fn new(wanted: &'a Wanted) -> Result<Self> {
        let parent = match wanted.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if wanted.path.symlink_metadata().is_ok() {
            let error = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "is there already");
            return Err(Error::io(&wanted.path)(error));
        }
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let folder = tempfile::Builder::new().prefix(".lorad-export-").tempdir_in(parent).map_err(Error::io(parent))?;
        let staged = Self { wanted, folder };
        if matches!(wanted.kind, ExportKind::Adapter | ExportKind::Merged | ExportKind::Ollama(_)) {
            let path = staged.path();
            std::fs::create_dir(&path).map_err(Error::io(&path))?;
        }
        Ok(staged)
    }

    /// The file or folder, until it is published.
    fn path(&self) -> PathBuf {
        self.folder.path().join("made")
    }

    /// The GGUF file, which an Ollama export has in its folder.
    fn gguf_path(&self) -> PathBuf {
        match self.wanted.kind {
            ExportKind::Ollama(quantization) => self.path().join(gguf_name(quantization)),
            _ => self.path(),
        }
    }

    /// Syncs everything and gives it its name.
    fn publish(self, parity: Certificate) -> Result<Exported> {
        let Wanted { kind, path } = self.wanted;
        let size_bytes = sync(&self.path())?;
        std::fs::rename(self.path(), path).map_err(Error::io(path))?;
        let parent = self.folder.path().parent().unwrap_or(Path::new("."));
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(Error::io(parent))?;
        Ok(Exported { kind: kind.name(), quantization: kind.quantization(), path: path.clone(), size_bytes, parity })
    }
}

/// The name of the GGUF file beside a Modelfile.
fn gguf_name(quantization: Quantization) -> String {
    format!("model-{}.gguf", quantization.name())
}

/// The same file under a second name, or a copy where the file system has no such thing.
fn link(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to).or_else(|_| std::fs::copy(from, to).map(drop)).map_err(Error::io(to))
}

/// Syncs a file, or a folder and the files in it; gives their size.
fn sync(path: &Path) -> Result<u64> {
    let file = File::open(path).map_err(Error::io(path))?;
    let metadata = file.metadata().map_err(Error::io(path))?;
    let mut size = 0;
    if metadata.is_dir() {
        for item in std::fs::read_dir(path).map_err(Error::io(path))? {
            size += sync(&item.map_err(Error::io(path))?.path())?;
        }
    } else {
        size = metadata.len();
    }
    file.sync_all().map_err(Error::io(path))?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Template;
    use crate::testing::{TinyModel, random_lora};

    /// A tiny model with a random LoRA, in a folder of its own.
    struct Parts {
        folder: TempDir,
        base: GgufFile,
        model: Llama,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        lora: LoraParams,
    }

    impl Parts {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("tiny.gguf");
            TinyModel::default().write(&path).unwrap();
            let base = GgufFile::open(&path).unwrap();
            let (model, tokenizer) = (Llama::load(&base).unwrap(), Tokenizer::from_gguf(&base).unwrap());
            let template = ChatTemplate::for_model(&Template::Auto, &tokenizer).unwrap();
            let lora = random_lora(&model.config().shape, 4).unwrap();
            Self { folder, base, model, tokenizer, template, lora }
        }

        fn export(&self, wanted: &[Wanted], on_progress: OnProgress<'_>) -> Result<Option<Vec<Exported>>> {
            let card = ModelCard { name: "tiny", base_model: "tiny", lora: self.lora.layout().spec(), training: None };
            let Self { base, model, tokenizer, lora, .. } = self;
            let template = Some(&self.template);
            Tuned { base, model, tokenizer, template, lora, name_suffix: "tuned", card: &card }
                .export(wanted, on_progress)
        }

        fn all(&self) -> Vec<Wanted> {
            let quantization = Quantization::Q8_0;
            let kinds = [
                ("adapter", ExportKind::Adapter),
                ("model-f16.gguf", ExportKind::Gguf(Quantization::F16)),
                ("model-q8_0.gguf", ExportKind::Gguf(quantization)),
                ("lora.gguf", ExportKind::GgufLora),
                ("merged", ExportKind::Merged),
                ("ollama-q8_0", ExportKind::Ollama(quantization)),
            ];
            kinds.map(|(name, kind)| Wanted { kind, path: self.folder.path().join("out").join(name) }).into()
        }

        fn names(&self, folder: &str) -> Vec<String> {
            let items = std::fs::read_dir(self.folder.path().join(folder)).unwrap();
            let mut names: Vec<_> = items.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn every_export_is_made_and_certified() {
        let parts = Parts::new();
        let made = parts.export(&parts.all(), &mut |_, _| ControlFlow::Continue(())).unwrap().unwrap();
        let all = ["adapter", "lora.gguf", "merged", "model-f16.gguf", "model-q8_0.gguf", "ollama-q8_0"];
        assert_eq!(parts.names("out"), all);
        assert_eq!(parts.names("out/adapter"), ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
        assert_eq!(parts.names("out/ollama-q8_0"), ["Modelfile", "model-q8_0.gguf"]);
        let merged = ["config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json"];
        assert_eq!(parts.names("out/merged"), [&merged[..], &["tokenizer.json", "tokenizer_config.json"]].concat());
        for made in &made {
            eprintln!("{} {:?}: {}", made.kind, made.quantization, made.parity);
            let Certificate { positions, greedy_agreement, largest_logit_difference, .. } = made.parity;
            assert!(positions > 100 && greedy_agreement > 0.9 && made.size_bytes > 0, "{made:?}");
            assert_eq!(largest_logit_difference == 0.0, matches!(made.kind, "adapter" | "gguf_lora"), "{made:?}");
        }
        assert_eq!(made[2].parity, made[5].parity);

        let bytes = |name: &str| std::fs::read(parts.folder.path().join("out").join(name)).unwrap();
        let before = ["adapter/README.md", "merged/tokenizer.json", "merged/model.safetensors", "lora.gguf"].map(bytes);
        let again = parts.export(&parts.all(), &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert!(again.to_string().ends_with("out/adapter: is there already"), "{again}");
        std::fs::remove_dir_all(parts.folder.path().join("out")).unwrap();
        parts.export(&parts.all(), &mut |_, _| ControlFlow::Continue(())).unwrap().unwrap();
        let after = ["adapter/README.md", "merged/tokenizer.json", "merged/model.safetensors", "lora.gguf"].map(bytes);
        assert!(before == after, "the same model gives the same bytes");
    }

    #[test]
    fn merged_models_prompt_as_they_were_trained() {
        let mut parts = Parts::new();
        let conversation = [crate::data::Message::new(crate::data::Role::User, "How many owls?")];
        for choice in [Template::Alpaca, Template::Jinja("{{ messages[-1].content }}\n> ".into())] {
            parts.template = ChatTemplate::for_model(&choice, &parts.tokenizer).unwrap();
            parts.export(&parts.all(), &mut |_, _| ControlFlow::Continue(())).unwrap().unwrap();
            let expected = parts.template.render(&conversation, &[], true).unwrap();
            let out = parts.folder.path().join("out");
            for name in ["model-f16.gguf", "model-q8_0.gguf", "ollama-q8_0/model-q8_0.gguf"] {
                let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&out.join(name)).unwrap()).unwrap();
                let own = ChatTemplate::for_model(&Template::Auto, &tokenizer).unwrap();
                assert_eq!(own.render(&conversation, &[], true).unwrap(), expected, "{name}");
            }
            let config = std::fs::read_to_string(out.join("merged/tokenizer_config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            assert_eq!(config["chat_template"].as_str(), parts.template.replacement());
            let modelfile = std::fs::read_to_string(out.join("ollama-q8_0/Modelfile")).unwrap();
            assert_eq!(modelfile.contains("### Response:"), choice == Template::Alpaca, "{modelfile}");
            std::fs::remove_dir_all(out).unwrap();
        }
    }

    #[test]
    fn a_stop_leaves_nothing() {
        let parts = Parts::new();
        for stop_at in 1..6 {
            let mut stop = |kind, progress: Progress| match parts.all()[stop_at].kind == kind && progress.done == 1 {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            // The Ollama folder takes the file that is there already.
            let stopped = parts.export(&parts.all()[..5], &mut stop).unwrap();
            assert_eq!(stopped.is_none(), stop_at < 5);
            assert_eq!(parts.names("out").is_empty(), stop_at < 5);
        }
    }

    #[test]
    fn a_file_that_computes_something_else_is_refused() {
        let parts = Parts::new();
        let reference = Reference::new(&parts.model, &parts.lora, &parts.tokenizer, Some(&parts.template)).unwrap();
        let error = reference.certify(&parts.model, None, bound_of(Quantization::Q8_0)).unwrap_err().to_string();
        assert!(error.contains("it does not compute what was trained"), "{error}");
        let other = random_lora(&parts.model.config().shape, 4).unwrap();
        crate::ops::host_mut(&other.pair(1, crate::spec::Target::VProj).unwrap().lora_a, |values| {
            values[0] = f32::NAN;
            Ok(())
        })
        .unwrap();
        assert!(reference.certify(&parts.model, Some(&other), 100.0).is_err(), "no number is no parity");
    }
}
