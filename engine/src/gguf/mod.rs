//! The GGUF container: a bounded reader that trusts nothing a header says, and a streaming writer.
//!
//! Layout (versions 2 and 3, little-endian): `GGUF`, version u32, tensor count u64, metadata count u64; the metadata
//! (key, type u32, value); one record a tensor (name, dimension count u32, dimensions u64 from the innermost outwards, type
//! u32, offset u64 from the start of the data section); padding to `general.alignment`; the data section. Strings and arrays
//! carry a u64 length. Source: the format's description in the ggml repository (docs/gguf.md).

mod cursor;
mod reader;
mod types;
mod value;
mod writer;

pub use reader::GgufFile;
pub use types::{StoredType, TensorInfo};
pub use value::{Array, Value};
pub use writer::{SealedFile, TensorSpec, Writer};
pub(crate) use writer::{file_bytes, same_bytes};

/// Alignment of the data section and of every tensor where the file names none; the writer knows no other.
pub const DEFAULT_ALIGNMENT: usize = 32;

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";

#[cfg(test)]
mod tests;
