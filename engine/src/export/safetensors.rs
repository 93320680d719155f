//! Safetensors as a stream: the header first, then each tensor's bytes in order; and the same read back.
//!
//! Layout: the header's length u64, little-endian; the header in JSON, padded with spaces to a multiple of 8: a tensor's name →
//! `dtype`, `shape`, `data_offsets` (from the end of the header); the tensors' bytes without gaps. A model above the size
//! of a shard is several such files and an index that says which tensor lies where. Source: the safetensors format's
//! description, and Hugging Face's naming of shards.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::model::weights::MappedFile;
use crate::{Error, Result};

/// Bytes of tensors in one file at most, unless a single tensor is larger.
pub(super) const MAX_SHARD_BYTES: u64 = 5_000_000_000;
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A tensor that is going to be written, in 16-bit floats.
#[derive(Debug, Clone)]
pub(super) struct TensorPlan {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

impl TensorPlan {
    fn size_bytes(&self) -> u64 {
        2 * self.shape.iter().product::<usize>() as u64
    }
}

/// The two 16-bit floats, by the names that the header has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Float {
    F16,
    Bf16,
}

impl Float {
    /// The name in a safetensors header.
    fn name(self) -> &'static str {
        match self {
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The name in a model's config.
    pub(super) fn torch_name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// The files of a model in a folder, which are written tensor by tensor in the order of the plan.
pub(super) struct ShardWriter {
    shards: Vec<Shard>,
    /// The file that is being written, the bytes that it has yet to get, and its hash so far.
    current: Option<(BufWriter<File>, u64, Sha256)>,
    next: usize,
}

struct Shard {
    path: PathBuf,
    header: Vec<u8>,
    data_bytes: u64,
    sha256: Option<[u8; 32]>,
}

impl ShardWriter {
    /// Plans the files and writes the index where there is more than one.
    pub(super) fn create(folder: &Path, tensors: &[TensorPlan], float: Float, max_bytes: u64) -> Result<Self> {
        let groups = group(tensors, max_bytes);
        let count = groups.len();
        let name = |index: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        if count > 1 {
            let places = groups.iter().enumerate();
            let places = places.flat_map(|(index, group)| group.iter().map(move |tensor| (&tensor.name, index)));
            let weight_map: Map<String, Value> =
                places.map(|(tensor, index)| (tensor.clone(), name(index).into())).collect();
            let total_size: u64 = tensors.iter().map(TensorPlan::size_bytes).sum();
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
            write_json(&folder.join(INDEX_FILE), &index)?;
        }
        let shard = |(index, group): (usize, &&[TensorPlan])| Shard {
            path: folder.join(name(index)),
            header: header(group, float),
            data_bytes: group.iter().map(TensorPlan::size_bytes).sum(),
            sha256: None,
        };
        Ok(Self { shards: groups.iter().enumerate().map(shard).collect(), current: None, next: 0 })
    }

    /// Appends bytes: the rest of the tensor that is being written, or a part of it.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.current.is_none() {
            let shard = &self.shards[self.next];
            let file = BufWriter::with_capacity(1 << 20, File::create(&shard.path).map_err(Error::io(&shard.path))?);
            self.current = Some((file, shard.data_bytes, Sha256::new()));
            let header = shard.header.clone();
            self.put(&header)?;
        }
        self.put(bytes)?;
        let Some((file, left, hash)) = &mut self.current else { return Ok(()) };
        assert!(bytes.len() as u64 <= *left, "a tensor lies in one file");
        *left -= bytes.len() as u64;
        if *left == 0 {
            let shard = &mut self.shards[self.next];
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(Error::io(&shard.path))?;
            shard.sha256 = Some(std::mem::take(hash).finalize().into());
            self.current = None;
            self.next += 1;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let path = &self.shards[self.next].path;
        let Some((file, _, hash)) = &mut self.current else { return Ok(()) };
        hash.update(bytes);
        file.write_all(bytes).map_err(Error::io(path))
    }

    /// Reads every file back from the disk and compares its hash with what was written.
    pub(super) fn verify(self) -> Result<()> {
        for shard in self.shards {
            let name = shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let file = MappedFile::open(&shard.path)?;
            if shard.sha256 != Some(Sha256::digest(file.bytes()).into()) {
                return Err(Error::ReadBack(format!("{name} is not what was written")));
            }
        }
        Ok(())
    }
}

/// Consecutive tensors that share a file.
fn group(tensors: &[TensorPlan], max_bytes: u64) -> Vec<&[TensorPlan]> {
    let (mut groups, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && bytes + tensor.size_bytes() > max_bytes {
            groups.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += tensor.size_bytes();
    }
    groups.push(&tensors[start..]);
    groups
}

fn header(tensors: &[TensorPlan], float: Float) -> Vec<u8> {
    let mut entries = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.size_bytes();
        let entry = json!({"dtype": float.name(), "shape": tensor.shape, "data_offsets": [offset, end]});
        entries.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

/// Writes JSON to a file, with a line end.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(Error::io(path))
}

/// The tensors of a model's folder, as their files say.
pub(super) struct Shards {
    files: Vec<MappedFile>,
    /// Name, file, shape, and the place in that file.
    tensors: std::collections::HashMap<String, (usize, Vec<usize>, std::ops::Range<usize>)>,
}

impl Shards {
    /// Opens `model.safetensors`, or the files of the index.
    ///
    /// # Errors
    /// [`Error::ReadBack`] where a file is damaged.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), tensors: std::collections::HashMap::new() };
        for name in file_names(folder)? {
            let file = MappedFile::open(&folder.join(&name))?;
            let damaged = |error: safetensors::SafeTensorError| Error::ReadBack(format!("{name}: {error}"));
            let read = safetensors::SafeTensors::deserialize(file.bytes()).map_err(damaged)?;
            let begin = file.bytes().as_ptr().addr();
            for (tensor, view) in read.tensors() {
                let start = view.data().as_ptr().addr() - begin;
                let place = (shards.files.len(), view.shape().to_vec(), start..start + view.data().len());
                shards.tensors.insert(tensor, place);
            }
            shards.files.push(file);
        }
        Ok(shards)
    }

    /// The stored bytes of a tensor of that name and shape.
    pub(super) fn data(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        match self.tensors.get(name) {
            Some((file, found, place)) if found == shape => Ok(&self.files[*file].bytes()[place.clone()]),
            Some((_, found, _)) => {
                Err(Error::ReadBack(format!("tensor `{name}` has the shape {found:?}, must have {shape:?}")))
            }
            None => Err(Error::ReadBack(format!("tensor `{name}` is missing"))),
        }
    }

    /// How many tensors there are.
    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }
}

fn file_names(folder: &Path) -> Result<Vec<String>> {
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let index: Value =
        serde_json::from_str(&text).map_err(|error| Error::ReadBack(format!("{INDEX_FILE}: {error}")))?;
    let places = index["weight_map"].as_object().into_iter().flat_map(Map::values);
    let names: std::collections::BTreeSet<String> = places.filter_map(|name| Some(name.as_str()?.to_owned())).collect();
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str, shape: &[usize]) -> TensorPlan {
        TensorPlan { name: name.to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn a_model_is_cut_into_files_and_read_back_from_them() {
        let tensors = [plan("a", &[3, 4]), plan("b", &[5]), plan("c", &[2, 2]), plan("d", &[100])];
        for (max_bytes, files) in [(MAX_SHARD_BYTES, 1), (40, 3), (1, 4)] {
            let folder = tempfile::tempdir().expect("a folder");
            let mut writer = ShardWriter::create(folder.path(), &tensors, Float::Bf16, max_bytes).expect("planned");
            for (index, tensor) in tensors.iter().enumerate() {
                let bytes = vec![index as u8; tensor.size_bytes() as usize];
                let (one, two) = bytes.split_at(bytes.len() / 4 * 2);
                writer.write(one).and_then(|()| writer.write(two)).expect("written");
            }
            writer.verify().expect("what was written");
            let shards = Shards::open(folder.path()).expect("readable");
            assert_eq!((shards.files.len(), shards.len()), (files, 4));
            for (index, tensor) in tensors.iter().enumerate() {
                let data = shards.data(&tensor.name, &tensor.shape).expect("there");
                assert!(data.len() as u64 == tensor.size_bytes() && data.iter().all(|&byte| byte == index as u8));
            }
            assert!(shards.data("a", &[4, 3]).is_err() && shards.data("e", &[1]).is_err());
        }
    }

    #[test]
    fn what_changed_on_the_disk_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = ShardWriter::create(folder.path(), &[plan("a", &[8])], Float::F16, 100).expect("planned");
        writer.write(&[1; 16]).expect("written");
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("there");
        *bytes.last_mut().expect("not empty") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        assert!(writer.verify().expect_err("a bit differs").to_string().contains("model.safetensors is not what"));
    }
}
