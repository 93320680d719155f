//! Writes a GGUF file of version 3 as a stream: the whole header first, then each tensor's bytes in order.
//!
//! The file grows under a temporary name beside its target and takes the target's name only when it is complete and synced.

use std::collections::HashSet;
use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::types::size_bytes;
use super::{ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, StoredType, Value};
use crate::quant::BlockType;
use crate::{Error, Result};

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, `blk.0.attn_q.weight` for one.
    pub name: String,
    /// Dimensions, row-major, outermost first.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub dtype: BlockType,
}

/// A GGUF file that is being written.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    file: BufWriter<NamedTempFile>,
    tensors: Vec<(String, usize)>,
    /// The tensor that bytes go to next.
    current: usize,
    /// Bytes it has got so far.
    written: usize,
    /// Bytes that may not be on the disk yet.
    unsynced: usize,
}

/// The disk gets what was written in portions of this size, while the next portion is computed.
const SYNC_BYTES: usize = 256 << 20;

impl Writer {
    /// Writes the header of a file that shall get the name `target`.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written; [`Error::Model`] where a key or tensor stands there twice, a tensor's shape
    /// cannot be, or `general.alignment` is another than 32.
    pub fn create(target: &Path, metadata: &[(String, Value)], tensors: &[TensorSpec]) -> Result<Self> {
        let (header, sizes) = header(metadata, tensors).map_err(|message| {
            let target = target.display();
            Error::Model(format!("{target} cannot be written: {message}"))
        })?;
        let folder = folder_of(target);
        let temporary = tempfile::Builder::new()
            .prefix(".lorad-")
            .suffix(".gguf.tmp")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(Error::io(folder))?;
        let names = tensors.iter().map(|tensor| tensor.name.clone());
        let tensors = names.zip(sizes).collect();
        let file = BufWriter::with_capacity(1 << 20, temporary);
        let mut writer = Self { target: target.to_owned(), file, tensors, current: 0, written: 0, unsynced: 0 };
        writer.put(&header)?;
        Ok(writer)
    }

    /// Appends bytes to the tensor of that name, which must be the next one that is not complete.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written; [`Error::Model`] where another tensor is next, or these are too many bytes.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some((expected, size)) = self.tensors.get(self.current) else {
            return Err(self.misuse(format!("tensor `{name}` comes after the last one")));
        };
        let (size, left) = (*size, *size - self.written);
        if expected != name || bytes.len() > left {
            let message = format!("got {} bytes of tensor `{name}`, needs {left} of `{expected}`", bytes.len());
            return Err(self.misuse(message));
        }
        self.put(bytes)?;
        self.sync_portion(bytes.len())?;
        self.written += bytes.len();
        if self.written == size {
            self.put(&vec![0; size.next_multiple_of(DEFAULT_ALIGNMENT) - size])?;
            self.current += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Whether every tensor has got all its bytes.
    pub fn is_complete(&self) -> bool {
        self.current == self.tensors.len()
    }

    /// Syncs the complete file, still under its temporary name, so that it can be read back before it is published.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written; [`Error::Model`] where bytes are missing.
    pub fn seal(self) -> Result<SealedFile> {
        if let Some((name, size)) = self.tensors.get(self.current) {
            let message = format!("tensor `{name}` got {} of its {size} bytes", self.written);
            return Err(self.misuse(message));
        }
        let Self { target, file, .. } = self;
        let temporary = file.into_inner().map_err(|error| Error::io(&target)(error.into_error()))?;
        temporary.as_file().sync_all().map_err(Error::io(&target))?;
        Ok(SealedFile { target, temporary })
    }

    /// Syncs the complete file and gives it its name, in place of a file that has it.
    ///
    /// # Errors
    /// As [`Writer::seal`] and [`SealedFile::publish`].
    pub fn finish(self) -> Result<()> {
        self.seal()?.publish()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.target))
    }

    fn sync_portion(&mut self, bytes: usize) -> Result<()> {
        self.unsynced += bytes;
        if self.unsynced < SYNC_BYTES {
            return Ok(());
        }
        self.unsynced = 0;
        self.file.get_ref().as_file().sync_data().map_err(Error::io(&self.target))
    }

    fn misuse(&self, message: String) -> Error {
        Error::Model(format!("{} cannot be written: {message}", self.target.display()))
    }
}

/// A complete GGUF file that has not got its name yet; dropped, it is removed.
#[derive(Debug)]
pub struct SealedFile {
    target: PathBuf,
    temporary: NamedTempFile,
}

impl SealedFile {
    /// Where it lies until it is published.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the file its name, in place of a file that has it.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be renamed.
    pub fn publish(self) -> Result<()> {
        let Self { target, temporary } = self;
        temporary.persist(&target).map_err(|error| Error::io(&target)(error.error))?;
        let folder = folder_of(&target);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
    }
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The header with its padding, and every tensor's size in bytes.
/// Bytes of a file with this metadata and these tensors.
///
/// # Errors
/// As [`Writer::create`], but for what only writing can find out.
pub(crate) fn file_bytes(metadata: &[(String, Value)], tensors: &[TensorSpec]) -> Result<u64> {
    let (header, sizes) = header(metadata, tensors).map_err(Error::Model)?;
    let data = sizes.iter().map(|size| size.next_multiple_of(DEFAULT_ALIGNMENT) as u64);
    Ok(header.len() as u64 + data.sum::<u64>())
}

fn header(metadata: &[(String, Value)], tensors: &[TensorSpec]) -> Result<(Vec<u8>, Vec<usize>), String> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(3u32.to_le_bytes());
    put_length(&mut out, tensors.len());
    put_length(&mut out, metadata.len());

    let mut seen = HashSet::new();
    for (key, value) in metadata {
        if !seen.insert(key) {
            return Err(format!("metadata `{key}` stands there twice"));
        }
        if key == ALIGNMENT_KEY && value.as_integer() != Ok(DEFAULT_ALIGNMENT as i128) {
            return Err(format!("metadata `{ALIGNMENT_KEY}` must be {DEFAULT_ALIGNMENT}"));
        }
        put_string(&mut out, key.as_bytes());
        out.extend(value.type_id().to_le_bytes());
        put_value(&mut out, value);
    }

    let mut seen = HashSet::new();
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut offset = 0usize;
    for TensorSpec { name, shape, dtype } in tensors {
        if !seen.insert(name) {
            return Err(format!("tensor `{name}` stands there twice"));
        }
        let stored = StoredType::from(*dtype);
        let size = size_bytes(shape, stored).map_err(|message| format!("tensor `{name}` {message}"))?;
        put_string(&mut out, name.as_bytes());
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&dimension| put_length(&mut out, dimension));
        out.extend(stored.id().to_le_bytes());
        put_length(&mut out, offset);
        offset =
            offset.checked_add(size.next_multiple_of(DEFAULT_ALIGNMENT)).ok_or("the tensors take too many bytes")?;
        sizes.push(size);
    }
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    Ok((out, sizes))
}

/// Whether two values are stored as the same bytes; unlike `==`, that holds for a NaN and itself.
pub(crate) fn same_bytes(a: &Value, b: &Value) -> bool {
    let encoded = |value: &Value| {
        let mut out = value.type_id().to_le_bytes().to_vec();
        put_value(&mut out, value);
        out
    };
    encoded(a) == encoded(b)
}

fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend((length as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.extend(bytes);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => out.push(*value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push((*value).into()),
        Value::String(bytes) => put_string(out, bytes),
        Value::Array(array) => put_array(out, array),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type_id().to_le_bytes());
    put_length(out, array.len());
    match array {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(strings) => strings.iter().for_each(|bytes| put_string(out, bytes)),
        Array::Array(arrays) => arrays.iter().for_each(|array| put_array(out, array)),
        Array::U64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
}
