//! The files that a training leaves behind: what the engine exports, each folder as one `.tar`.

use std::fs::File;
use std::io::BufWriter;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lorad_engine::Error;
use lorad_engine::adapter::LoraParams;
use lorad_engine::data::ChatTemplate;
use lorad_engine::export::{self, Certificate, ExportKind, ModelCard, TrainingFacts, Tuned, Wanted};
use lorad_engine::gguf::GgufFile;
use lorad_engine::model::Llama;
use lorad_engine::tokenizer::Tokenizer;

use super::Progress;
use crate::hub::Reference;
use crate::types::artifact::{ArtifactRequest, ArtifactType, Parity, Quantization};
use crate::types::worker_protocol::Task;

/// The name to save an artifact under, made of the model's name: `smollm2-lorad-pirate-a1b2c3d4-q8_0.gguf` for one.
pub(super) fn filename(model_name: &str, request: &ArtifactRequest) -> String {
    let parts: Vec<&str> = model_name.split(':').filter(|part| !part.is_empty() && *part != "ft").collect();
    let stem = parts.join("-").replace(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)), "-");
    let quantization = request.quantization.map(|quantization| format!("-{quantization}")).unwrap_or_default();
    match request.kind {
        ArtifactType::Adapter => format!("{stem}-adapter.tar"),
        ArtifactType::Gguf => format!("{stem}{quantization}.gguf"),
        ArtifactType::GgufLora => format!("{stem}-lora.gguf"),
        ArtifactType::Merged => format!("{stem}-merged.tar"),
        ArtifactType::Ollama => format!("{stem}-ollama{quantization}.tar"),
    }
}

/// An artifact that is ready to be sent.
pub(super) struct Made {
    /// What was asked for.
    pub(super) request: ArtifactRequest,
    /// Its file.
    pub(super) path: PathBuf,
    /// How close it is to what was trained.
    pub(super) parity: Parity,
}

/// What was trained.
pub(super) struct Trained<'a> {
    pub(super) base: &'a GgufFile,
    pub(super) model: &'a Llama,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) lora: &'a LoraParams,
    /// What the model card tells of the training.
    pub(super) facts: Option<TrainingFacts<'a>>,
}

impl Trained<'_> {
    /// Makes every artifact of the task in `scratch`.
    pub(super) fn make_artifacts(
        self,
        task: &Task,
        scratch: &Path,
        progress: &Progress,
    ) -> lorad_engine::Result<Vec<Made>> {
        let template = ChatTemplate::for_export(&task.spec.dataset.template, self.tokenizer)?;
        let base_name = &task.base_model.name;
        let repository = Reference::parse(base_name).ok().and_then(|reference| reference.repository_id());
        let card = ModelCard {
            name: name_suffix(&task.model_name),
            base_model: repository.as_deref().unwrap_or(base_name),
            lora: self.lora.layout().spec(),
            training: self.facts,
        };
        let tuned = Tuned {
            base: self.base,
            model: self.model,
            tokenizer: self.tokenizer,
            template: template.as_ref(),
            lora: self.lora,
            name_suffix: name_suffix(&task.model_name),
            card: &card,
        };
        let wanted: Vec<Wanted> = task.artifacts.iter().map(|request| wanted(request, scratch)).collect();
        let mut on_progress = |_, _| {
            progress.made();
            ControlFlow::Continue(())
        };
        let made = tuned.export(&wanted, &mut on_progress)?.unwrap_or_default();
        let packed = task.artifacts.iter().zip(made).map(|(&request, exported)| {
            let path = match exported.path.is_dir() {
                true => pack(&exported.path, progress)?,
                false => exported.path,
            };
            Ok(Made { request, path, parity: parity(exported.parity) })
        });
        packed.collect()
    }
}

/// Finds out before a training whether the artifacts can be made of that base.
pub(super) fn check(task: &Task, base: &GgufFile, tokenizer: &Tokenizer) -> lorad_engine::Result<()> {
    task.artifacts.iter().try_for_each(|request| export::check_exportable(kind(request), base, tokenizer))
}

fn wanted(request: &ArtifactRequest, scratch: &Path) -> Wanted {
    let kind = kind(request);
    Wanted { kind, path: scratch.join(format!("export-{kind}").replace(' ', "-")) }
}

fn kind(request: &ArtifactRequest) -> ExportKind {
    let quantization = quantization(request.quantization.unwrap_or(Quantization::DEFAULT));
    match request.kind {
        ArtifactType::Adapter => ExportKind::Adapter,
        ArtifactType::Gguf => ExportKind::Gguf(quantization),
        ArtifactType::GgufLora => ExportKind::GgufLora,
        ArtifactType::Merged => ExportKind::Merged,
        ArtifactType::Ollama => ExportKind::Ollama(quantization),
    }
}

/// The engine's word for it.
pub(crate) fn quantization(quantization: Quantization) -> export::Quantization {
    export::Quantization::from_name(quantization.as_str()).expect("the engine has every quantization of the API")
}

/// The engine's certificate in the API's words.
fn parity(certificate: Certificate) -> Parity {
    let Certificate { largest_logit_difference, mean_logit_difference, logit_deviation, .. } = certificate;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Parity {
        prompts: count(certificate.prompts),
        positions: count(certificate.positions),
        largest_logit_difference,
        mean_logit_difference,
        logit_deviation,
        greedy_agreement: certificate.greedy_agreement,
        bound: certificate.bound,
    }
}

/// Packs a folder into an archive beside it and removes it.
fn pack(folder: &Path, progress: &Progress) -> lorad_engine::Result<PathBuf> {
    let target = folder.with_extension("tar");
    write_tar(folder, &target, progress).map_err(Error::io(&target))?;
    std::fs::remove_dir_all(folder).map_err(Error::io(folder))?;
    Ok(target)
}

/// Unpacks an adapter's archive into a folder of `scratch`: the two files that PEFT reads, and nothing else that may be in it.
///
/// # Errors
/// An archive that cannot be read or lacks one of the two.
pub(super) fn unpack_adapter(archive: &Path, scratch: &Path) -> lorad_engine::Result<PathBuf> {
    const NAMES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
    let folder = scratch.join("init_from_adapter");
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let mut reader = tar::Archive::new(File::open(archive).map_err(Error::io(archive))?);
    for entry in reader.entries().map_err(Error::io(archive))? {
        let mut entry = entry.map_err(Error::io(archive))?;
        let path = entry.path().map_err(Error::io(archive))?;
        if let Some(name) = NAMES.into_iter().find(|name| path == Path::new(name)) {
            let target = folder.join(name);
            let mut file = File::create(&target).map_err(Error::io(&target))?;
            std::io::copy(&mut entry, &mut file).map_err(Error::io(&target))?;
        }
    }
    match NAMES.into_iter().find(|name| !folder.join(name).is_file()) {
        None => Ok(folder),
        Some(name) => Err(Error::Adapter(format!("the archive to begin with has no {name}"))),
    }
}

/// What sets the merged model's name off from its base's: the suffix that the job was given. Not the random end of the model's
/// name: the same job made again gives the same bytes.
fn name_suffix(model_name: &str) -> &str {
    model_name.split(':').nth(3).filter(|suffix| !suffix.is_empty()).unwrap_or("tuned")
}

/// Packs the files of `folder` into one archive whose bytes depend on nothing but their names and contents.
fn write_tar(folder: &Path, target: &Path, progress: &Progress) -> std::io::Result<()> {
    let items = std::fs::read_dir(folder)?;
    let mut names = items.map(|item| item.map(|item| item.file_name())).collect::<Result<Vec<_>, _>>()?;
    names.sort();
    let mut archive = tar::Builder::new(BufWriter::new(File::create(target)?));
    for name in names {
        let source = File::open(folder.join(&name))?;
        let mut header = tar::Header::new_ustar();
        header.set_size(source.metadata()?.len());
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        archive.append_data(&mut header, Path::new(&name), Counted { source, progress })?;
    }
    let writer = archive.into_inner()?;
    writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    Ok(())
}

/// A file whose reading is progress: a model of many gigabytes is packed for longer than a worker may stand still.
struct Counted<'a> {
    source: File,
    progress: &'a Progress,
}

impl std::io::Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.progress.made();
        self.source.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_has_every_quantization_of_the_api() {
        for &one in Quantization::ALL {
            assert_eq!(quantization(one).name(), one.as_str());
        }
    }

    #[test]
    fn a_file_is_named_after_its_model() {
        let adapter = ArtifactRequest { kind: ArtifactType::Adapter, quantization: None };
        let gguf = ArtifactRequest { kind: ArtifactType::Gguf, quantization: Some(Quantization::Q8_0) };
        assert_eq!(
            filename("ft:smollm2:lorad:my/suffix:abcd1234", &gguf),
            "smollm2-lorad-my-suffix-abcd1234-q8_0.gguf"
        );
        assert_eq!(filename("ft:m:lorad::abcd1234", &adapter), "m-lorad-abcd1234-adapter.tar");
        let ollama = ArtifactRequest { kind: ArtifactType::Ollama, ..gguf };
        assert_eq!(filename("ft:m:lorad::abcd1234", &ollama), "m-lorad-abcd1234-ollama-q8_0.tar");
    }

    #[test]
    fn the_same_files_give_the_same_archive() {
        let pack = |order: [&str; 2]| {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let (files, target) = (folder.path().join("files"), folder.path().join("files.tar"));
            std::fs::create_dir(&files).expect("a folder");
            for name in order {
                std::fs::write(files.join(name), name.repeat(300)).expect("a file");
            }
            write_tar(&files, &target, &Progress::default()).expect("an archive");
            std::fs::read(&target).expect("an archive")
        };
        let bytes = pack(["b.json", "a.safetensors"]);
        assert_eq!(bytes, pack(["a.safetensors", "b.json"]));
        let mut archive = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> = archive
            .entries()
            .expect("an archive")
            .map(|entry| entry.expect("an entry").path().expect("a name").display().to_string())
            .collect();
        assert_eq!(names, ["a.safetensors", "b.json"]);
    }
}
