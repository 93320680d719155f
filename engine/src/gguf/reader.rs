//! Reads a GGUF file of version 2 or 3 through a memory map, and checks all that its header claims.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::cursor::Cursor;
use super::types::size_bytes;
use super::{ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, StoredType, TensorInfo, Value};
use crate::model::weights::MappedFile;
use crate::{Error, Result};

/// A GGUF file whose header has been checked; its tensors stay on disk, mapped.
#[derive(Debug)]
pub struct GgufFile {
    file: Arc<MappedFile>,
    metadata: Vec<(String, Value)>,
    metadata_index: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    tensor_index: HashMap<String, usize>,
}

impl GgufFile {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be opened; [`Error::Model`] where it is no GGUF file of version 2 or 3, is big-endian,
    /// one of several parts, cut off, or claims what cannot be.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_mapped(Arc::new(MappedFile::open(path)?))
    }

    /// Reads the header of a file that is mapped already, or of bytes in memory.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn from_mapped(file: Arc<MappedFile>) -> Result<Self> {
        let header = read_header(file.bytes()).map_err(|message| {
            Error::Model(match file.path() {
                Some(path) => format!("{}: {message}", path.display()),
                None => message,
            })
        })?;
        let Header { metadata, metadata_index, tensors, tensor_index } = header;
        Ok(Self { file, metadata, metadata_index, tensors, tensor_index })
    }

    /// The mapped file itself.
    pub fn mapped(&self) -> &Arc<MappedFile> {
        &self.file
    }

    /// Every metadata pair, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// Every tensor, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor_index.get(name).map(|&index| &self.tensors[index])
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Model`] where the file has none.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| Error::Model(format!("tensor `{name}` is missing")))
    }

    /// The stored bytes of a tensor of this file.
    ///
    /// # Errors
    /// [`Error::Model`] where the type cannot be dequantized (its size may not be known), or the tensor is another file's.
    pub fn data(&self, tensor: &TensorInfo) -> Result<&[u8]> {
        tensor.dtype()?;
        let end = tensor.offset.checked_add(tensor.size_bytes);
        end.and_then(|end| self.file.bytes().get(tensor.offset..end))
            .ok_or_else(|| Error::Model(format!("tensor `{}` is not one of this file", tensor.name)))
    }

    /// The value of that key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata_index.get(key).map(|&index| &self.metadata[index].1)
    }

    /// The text of that key.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or not UTF-8.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, Value::as_str)
    }

    /// The integer of that key, of whatever width it is stored in.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or does not fit.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, integer)
    }

    /// The integer of that key, of whatever width it is stored in.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or does not fit.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, integer)
    }

    /// The floating-point number of that key.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.get(key, Value::as_f32)
    }

    /// The bool of that key.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, Value::as_bool)
    }

    /// The texts of that key.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or an element is not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.get(key, |value| value.as_array().and_then(Array::as_strings))
    }

    /// The integers of that key, of whatever width they are stored in.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or an element does not fit.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.get(key, |value| value.as_array().and_then(Array::as_integers))
    }

    /// The integers of that key, of whatever width they are stored in.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type, or an element does not fit.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.get(key, |value| value.as_array().and_then(Array::as_integers))
    }

    /// The floating-point numbers of that key.
    ///
    /// # Errors
    /// [`Error::Model`] where the value is of another type.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.get(key, |value| value.as_array().and_then(Array::as_f32s))
    }

    /// As [`GgufFile::string`], for a key that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] also where the key is missing.
    pub fn require_string(&self, key: &str) -> Result<&str> {
        self.string(key)?.ok_or_else(|| missing(key))
    }

    /// As [`GgufFile::u32`], for a key that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] also where the key is missing.
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        self.u32(key)?.ok_or_else(|| missing(key))
    }

    /// As [`GgufFile::f32`], for a key that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] also where the key is missing.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.f32(key)?.ok_or_else(|| missing(key))
    }

    /// As [`GgufFile::strings`], for a key that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] also where the key is missing.
    pub fn require_strings(&self, key: &str) -> Result<Vec<&str>> {
        self.strings(key)?.ok_or_else(|| missing(key))
    }

    fn get<'a, T>(&'a self, key: &str, convert: impl FnOnce(&'a Value) -> Result<T, String>) -> Result<Option<T>> {
        let value = self.value(key).map(convert).transpose();
        value.map_err(|what| Error::Model(format!("metadata `{key}` is {what}")))
    }
}

fn integer<T: TryFrom<i128>>(value: &Value) -> Result<T, String> {
    T::try_from(value.as_integer()?).map_err(|_| format!("{}, which is out of range", value.describe()))
}

fn missing(key: &str) -> Error {
    Error::Model(format!("metadata `{key}` is missing"))
}

struct Header {
    metadata: Vec<(String, Value)>,
    metadata_index: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    tensor_index: HashMap<String, usize>,
}

fn read_header(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor::new(bytes);
    if bytes.get(..4) != Some(&MAGIC) {
        return Err("is no GGUF file".to_owned());
    }
    cursor.take(4)?;
    match cursor.u32()? {
        2 | 3 => (),
        1 => return Err("is a GGUF file of version 1, supported are 2 and 3".to_owned()),
        version if version & 0xffff == 0 => return Err("is a big-endian GGUF file, which is not supported".to_owned()),
        version => return Err(format!("is a GGUF file of version {version}, supported are 2 and 3")),
    }
    let tensor_count = cursor.count("the tensor count", TENSOR_RECORD_BYTES)?;
    let metadata_count = cursor.count("the metadata count", METADATA_RECORD_BYTES)?;

    let (metadata, metadata_index) = read_metadata(&mut cursor, metadata_count)?;
    let value_of = |key: &str| metadata_index.get(key).map(|&index: &usize| &metadata[index].1);
    if let Some(split_count) = value_of("split.count") {
        let count: u32 = integer(split_count).map_err(|what| format!("metadata `split.count` is {what}"))?;
        if count > 1 {
            return Err(format!("is one of {count} parts, merge them into one file first"));
        }
    }
    let alignment = read_alignment(value_of(ALIGNMENT_KEY))?;
    let (tensors, tensor_index) = read_tensors(&mut cursor, tensor_count, alignment, bytes.len())?;
    Ok(Header { metadata, metadata_index, tensors, tensor_index })
}

/// Fewest bytes of a tensor's record: an empty name, one dimension, type, offset.
const TENSOR_RECORD_BYTES: usize = 8 + 4 + 8 + 4 + 8;
/// Fewest bytes of a metadata pair: an empty key, the type, one byte.
const METADATA_RECORD_BYTES: usize = 8 + 4 + 1;

type Named<T> = (Vec<T>, HashMap<String, usize>);

fn read_metadata(cursor: &mut Cursor, count: usize) -> Result<Named<(String, Value)>, String> {
    let mut metadata = Vec::new();
    let mut index = HashMap::new();
    for position in 0..count {
        let key = cursor.name("metadata key", position)?;
        let value = cursor.value().map_err(|message| format!("metadata `{key}`: {message}"))?;
        if index.insert(key.clone(), position).is_some() {
            return Err(format!("metadata `{key}` stands there twice"));
        }
        metadata.push((key, value));
    }
    Ok((metadata, index))
}

/// The format asks for a multiple of 8; then every block type is aligned for the processor.
fn read_alignment(value: Option<&Value>) -> Result<usize, String> {
    let Some(value) = value else { return Ok(DEFAULT_ALIGNMENT) };
    let alignment: u32 = integer(value).map_err(|what| format!("metadata `{ALIGNMENT_KEY}` is {what}"))?;
    if !alignment.is_power_of_two() || alignment < 8 {
        return Err(format!("metadata `{ALIGNMENT_KEY}` must be a power of two from 8 on, got `{alignment}`"));
    }
    Ok(alignment as usize)
}

fn read_tensors(
    cursor: &mut Cursor,
    count: usize,
    alignment: usize,
    file_bytes: usize,
) -> Result<Named<TensorInfo>, String> {
    let mut tensors = Vec::new();
    let mut index = HashMap::new();
    for position in 0..count {
        let name = cursor.name("tensor name", position)?;
        let tensor = read_tensor(cursor, &name).map_err(|message| format!("tensor `{name}` {message}"))?;
        if index.insert(name.clone(), position).is_some() {
            return Err(format!("tensor `{name}` stands there twice"));
        }
        tensors.push(tensor);
    }
    // A file without tensors (a vocabulary) may end before its padding would.
    let data_start = cursor.position().next_multiple_of(alignment);
    for tensor in &mut tensors {
        place(tensor, data_start, alignment, file_bytes)
            .map_err(|message| format!("tensor `{}` {message}", tensor.name))?;
    }
    check_overlaps(&tensors)?;
    Ok((tensors, index))
}

/// One record; `offset` is still counted from the start of the data section.
fn read_tensor(cursor: &mut Cursor, name: &str) -> Result<TensorInfo, String> {
    let dimensions = cursor.u32()?;
    if !(1..=4).contains(&dimensions) {
        return Err(format!("has {dimensions} dimensions, must have 1 to 4"));
    }
    let mut shape = Vec::with_capacity(4);
    for _ in 0..dimensions {
        let dimension = cursor.u64()?;
        shape.push(usize::try_from(dimension).map_err(|_| format!("has a dimension of {dimension}"))?);
    }
    shape.reverse();
    let stored = StoredType::from_id(cursor.u32()?);
    let offset = cursor.u64()?;
    let offset = usize::try_from(offset).map_err(|_| format!("lies at offset {offset}"))?;
    let size_bytes = size_bytes(&shape, stored)?;
    Ok(TensorInfo { name: name.to_owned(), shape, stored, offset, size_bytes })
}

/// Turns the offset into one from the start of the file, and checks that the tensor lies inside.
fn place(tensor: &mut TensorInfo, data_start: usize, alignment: usize, file_bytes: usize) -> Result<(), String> {
    let TensorInfo { offset, size_bytes, .. } = *tensor;
    if !offset.is_multiple_of(alignment) {
        return Err(format!("lies at offset {offset}, not a multiple of the alignment {alignment}"));
    }
    let start = data_start.checked_add(offset);
    let end = start.and_then(|start| start.checked_add(size_bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= file_bytes => {
            tensor.offset = start;
            Ok(())
        }
        _ => Err(format!(
            "lies outside of the file: {size_bytes} bytes at {offset} of a data section that begins at {data_start}, \
             in a file of {file_bytes} bytes"
        )),
    }
}

fn check_overlaps(tensors: &[TensorInfo]) -> Result<(), String> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| (tensor.offset, tensor.size_bytes));
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].size_bytes > pair[1].offset {
            return Err(format!("tensors `{}` and `{}` overlap", pair[0].name, pair[1].name));
        }
    }
    Ok(())
}
