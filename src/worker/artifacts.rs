//! The files that a training leaves behind: the adapter as one `.tar`, the merged model as GGUF.

use std::fs::File;
use std::io::BufWriter;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lorad_engine::Error;
use lorad_engine::adapter::LoraParams;
use lorad_engine::export;
use lorad_engine::gguf::GgufFile;

use super::Progress;
use crate::types::artifact::{ArtifactRequest, ArtifactType, Quantization};
use crate::types::worker_protocol::Task;

/// The name to save an artifact under, made of the model's name: `smollm2-lorad-pirate-a1b2c3d4-q8_0.gguf` for one.
pub(super) fn filename(model_name: &str, request: &ArtifactRequest) -> String {
    let parts: Vec<&str> = model_name.split(':').filter(|part| !part.is_empty() && *part != "ft").collect();
    let stem = parts.join("-").replace(|c: char| !(c.is_ascii_alphanumeric() || "-_.".contains(c)), "-");
    match (request.kind, request.quantization) {
        (ArtifactType::Adapter, _) => format!("{stem}-adapter.tar"),
        (ArtifactType::Gguf, Some(quantization)) => format!("{stem}-{quantization}.gguf"),
        (ArtifactType::Gguf, None) => format!("{stem}.gguf"),
    }
}

/// Writes an artifact into `scratch` and returns its file.
pub(super) fn make(
    request: &ArtifactRequest,
    base: &GgufFile,
    lora: &LoraParams,
    task: &Task,
    scratch: &Path,
    progress: &Progress,
) -> lorad_engine::Result<PathBuf> {
    match (request.kind, request.quantization) {
        (ArtifactType::Adapter, _) => {
            let (folder, target) = (scratch.join("export-adapter"), scratch.join("export-adapter.tar"));
            lora.save_peft(&folder, &task.base_model.name)?;
            write_tar(&folder, &target).map_err(Error::io(&target))?;
            progress.made();
            Ok(target)
        }
        (ArtifactType::Gguf, quantization) => {
            let quantization = match quantization.unwrap_or(Quantization::Q8_0) {
                Quantization::F16 => export::Quantization::F16,
                Quantization::Q8_0 => export::Quantization::Q8_0,
            };
            let target = scratch.join(format!("export-{}.gguf", quantization.name()));
            let mut on_progress = |_| {
                progress.made();
                ControlFlow::Continue(())
            };
            export::merged_lora(
                base,
                lora,
                (quantization, Some(name_suffix(&task.model_name))),
                &target,
                &mut on_progress,
            )?;
            Ok(target)
        }
    }
}

/// What sets the merged model's name off from its base's: the suffix that the job was given. Not the random end of the model's
/// name: the same job made again gives the same bytes.
fn name_suffix(model_name: &str) -> &str {
    model_name.split(':').nth(3).filter(|suffix| !suffix.is_empty()).unwrap_or("tuned")
}

/// Packs the files of `folder` into one archive whose bytes depend on nothing but their names and contents.
fn write_tar(folder: &Path, target: &Path) -> std::io::Result<()> {
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
        archive.append_data(&mut header, Path::new(&name), source)?;
    }
    let writer = archive.into_inner()?;
    writer.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_after_its_model() {
        let adapter = ArtifactRequest { kind: ArtifactType::Adapter, quantization: None };
        let gguf = ArtifactRequest { kind: ArtifactType::Gguf, quantization: Some(Quantization::Q8_0) };
        assert_eq!(
            filename("ft:smollm2:lorad:my/suffix:abcd1234", &gguf),
            "smollm2-lorad-my-suffix-abcd1234-q8_0.gguf"
        );
        assert_eq!(filename("ft:m:lorad::abcd1234", &adapter), "m-lorad-abcd1234-adapter.tar");
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
            write_tar(&files, &target).expect("an archive");
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
