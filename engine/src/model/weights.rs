//! Frozen weights in the blocks they are stored in, and from there to f32.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType,
};
use half::{bf16, f16};
use memmap2::{Mmap, MmapMut};
use rayon::prelude::*;

use crate::gguf::{GgufFile, TensorInfo};
use crate::quant::{BlockType, dequantize_iq4_nl, widen};
use crate::{Error, Result};

/// Values that one task converts at least, so that a task outweighs its hand-over.
const TASK_VALUES: usize = 1 << 15;

/// A file mapped read-only, or bytes in memory that look like one. Its start is page-aligned.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    source: Option<(File, PathBuf)>,
}

impl MappedFile {
    /// Maps a file. It must not be cut while it is mapped: reading what is gone ends the process.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be opened or mapped, or is no regular file.
    #[expect(unsafe_code, reason = "a memory map is the only way to keep a model's weights out of the heap")]
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        if !file.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::io(path)(std::io::Error::other("is no regular file")));
        }
        // SAFETY: the map is private and read-only. Nobody writes to a model file in place: base models are read-only,
        // and every file of our own is written under a new name and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Self { map, source: Some((file, path.to_owned())) })
    }

    /// Copies bytes into memory of their own.
    ///
    /// # Errors
    /// [`Error::Model`] where there is no memory left.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let copy = || {
            let mut map = MmapMut::map_anon(bytes.len())?;
            map.copy_from_slice(bytes);
            map.make_read_only()
        };
        let map =
            copy().map_err(|error| Error::Model(format!("{} bytes do not fit in memory: {error}", bytes.len())))?;
        Ok(Self { map, source: None })
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where the file lies; `None` for bytes in memory.
    pub fn path(&self) -> Option<&Path> {
        self.source.as_ref().map(|(_, path)| path.as_path())
    }

    /// Copies bytes from that place on. Those of a file are read, not mapped: what is read once leaves nothing in this
    /// process's memory.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read or ends before `out` is full.
    ///
    /// # Panics
    /// Where bytes in memory end before `out` is full.
    pub(crate) fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        match &self.source {
            Some((file, path)) => file.read_exact_at(out, offset as u64).map_err(Error::io(path)),
            None => {
                out.copy_from_slice(&self.map[offset..offset + out.len()]);
                Ok(())
            }
        }
    }
}

/// A frozen matrix in its stored blocks, row after row.
#[derive(Debug, Clone)]
pub struct Weight {
    file: Arc<MappedFile>,
    offset: usize,
    dtype: BlockType,
    rows: usize,
    columns: usize,
}

impl Weight {
    /// The matrix of that name and shape (rows, columns).
    ///
    /// # Errors
    /// [`Error::Model`] where the file has no such tensor, or it has another shape or a type that cannot be dequantized.
    pub fn from_gguf(file: &GgufFile, name: &str, expected: (usize, usize)) -> Result<Self> {
        let tensor = file.require_tensor(name)?;
        let (rows, columns) = expected;
        if tensor.shape != [rows, columns] {
            let shape = &tensor.shape;
            return Err(Error::Model(format!(
                "tensor `{name}` has the shape {shape:?}, must have [{rows}, {columns}]"
            )));
        }
        Self::from_tensor(file, tensor)
    }

    /// A tensor of the file, whatever its dimensions: all but the innermost make up the rows.
    ///
    /// # Errors
    /// [`Error::Model`] where the tensor has a type that cannot be dequantized.
    pub(crate) fn from_tensor(file: &GgufFile, tensor: &TensorInfo) -> Result<Self> {
        Self::new(Arc::clone(file.mapped()), tensor.offset, tensor.dtype()?, (tensor.rows(), tensor.columns()))
            .map_err(|message| Error::Model(format!("tensor `{}` {message}", tensor.name)))
    }

    /// A matrix from bytes in memory, in blocks of that type.
    ///
    /// # Errors
    /// [`Error::Model`] where the bytes are not as many as the shape needs.
    pub fn from_bytes(bytes: &[u8], dtype: BlockType, shape: (usize, usize)) -> Result<Self> {
        let weight = Self::new(Arc::new(MappedFile::from_bytes(bytes)?), 0, dtype, shape)
            .map_err(|message| Error::Model(format!("a matrix {message}")))?;
        if weight.stored_bytes() != bytes.len() {
            let (needed, got) = (weight.stored_bytes(), bytes.len());
            return Err(Error::Model(format!("a matrix of {shape:?} in {dtype:?} takes {needed} bytes, got {got}")));
        }
        Ok(weight)
    }

    fn new(
        file: Arc<MappedFile>,
        offset: usize,
        dtype: BlockType,
        (rows, columns): (usize, usize),
    ) -> Result<Self, String> {
        if !columns.is_multiple_of(dtype.block_values()) {
            return Err(format!("has rows of {columns}, not a multiple of the {} in a block", dtype.block_values()));
        }
        let size = dtype.row_bytes(columns).checked_mul(rows);
        let end = size.and_then(|size| size.checked_add(offset));
        let bytes = end.and_then(|end| file.bytes().get(offset..end)).ok_or("lies outside of its file")?;
        check_alignment(dtype, bytes)?;
        Ok(Self { file, offset, dtype, rows, columns })
    }

    /// Number of rows: the output features of a projection, the tokens of an embedding.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row: the input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Type of the stored blocks.
    pub fn dtype(&self) -> BlockType {
        self.dtype
    }

    /// The stored blocks, row after row.
    pub fn stored(&self) -> &[u8] {
        &self.file.bytes()[self.offset..self.offset + self.stored_bytes()]
    }

    /// Bytes of the stored blocks.
    pub fn stored_bytes(&self) -> usize {
        self.dtype.row_bytes(self.columns) * self.rows
    }

    /// Writes those rows as f32 to `out`, row-major; rows in parallel where there are many.
    ///
    /// # Errors
    /// [`Error::Model`] where a row is not there or `out` has another length.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let count =
            rows.end.checked_sub(rows.start).filter(|_| rows.end <= self.rows).ok_or_else(|| {
                Error::Model(format!("rows {rows:?} were asked of a matrix that has {} rows", self.rows))
            })?;
        if out.len() != count * self.columns {
            let columns = self.columns;
            let needed = format!("{count} rows of {columns} values do not fit a buffer of {}", out.len());
            return Err(Error::Model(needed));
        }
        let row_bytes = self.dtype.row_bytes(self.columns);
        let start = self.offset + rows.start * row_bytes;
        dequantize(self.dtype, self.columns, &self.file.bytes()[start..start + count * row_bytes], out)
    }

    /// Whether its columns fall into strips of that width that are whole blocks, each of which can be dequantized alone.
    pub(crate) fn has_strips(&self, width: usize) -> bool {
        self.columns.is_multiple_of(width) && width.is_multiple_of(self.dtype.block_values())
    }

    /// Writes those columns of those rows as f32 to `out`, row-major, on this thread.
    ///
    /// # Errors
    /// [`Error::Model`] where a row or column is not there, the columns are no whole blocks, or `out` has another length.
    pub(crate) fn dequantize_part(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) -> Result<()> {
        let block = self.dtype.block_values();
        let whole = columns.start.is_multiple_of(block) && columns.end.is_multiple_of(block);
        let inside = rows.start <= rows.end && rows.end <= self.rows && columns.end <= self.columns;
        if !whole || !inside || columns.is_empty() || out.len() != rows.len() * columns.len() {
            let (shape, length) = ((self.rows, self.columns), out.len());
            let message = format!("rows {rows:?} and columns {columns:?} of {shape:?} do not go into {length} values");
            return Err(Error::Model(message));
        }
        let row_bytes = self.dtype.row_bytes(self.columns);
        let (first, last) = (self.dtype.row_bytes(columns.start), self.dtype.row_bytes(columns.end));
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            let start = self.offset + row * row_bytes;
            dequantize_blocks(self.dtype, &self.file.bytes()[start + first..start + last], out)?;
        }
        Ok(())
    }
}

/// Rows of a weight as they are stored, read into one buffer again and again.
#[derive(Debug, Default)]
pub(crate) struct StoredRows {
    buffer: Vec<u8>,
    start: usize,
}

impl StoredRows {
    /// Aligned enough for every block type.
    const ALIGNMENT: usize = 8;

    /// Reads those rows, which must be there, on this thread.
    ///
    /// # Errors
    /// As [`MappedFile::read_at`].
    pub(crate) fn read(&mut self, weight: &Weight, rows: Range<usize>) -> Result<&[u8]> {
        debug_assert!(rows.start <= rows.end && rows.end <= weight.rows, "{rows:?} of {}", weight.rows);
        let row_bytes = weight.dtype.row_bytes(weight.columns);
        let length = rows.len() * row_bytes;
        if self.buffer.len() < length + Self::ALIGNMENT {
            self.buffer.resize(length + Self::ALIGNMENT, 0);
            self.start = self.buffer.as_ptr().align_offset(Self::ALIGNMENT);
        }
        let out = &mut self.buffer[self.start..self.start + length];
        weight.file.read_at(weight.offset + rows.start * row_bytes, out)?;
        Ok(out)
    }
}

/// A tensor of `length` values as f32, of whatever dimensions and stored type: norms, biases, RoPE factors.
///
/// # Errors
/// [`Error::Model`] where the file has no such tensor, or it has another length or a type that cannot be dequantized.
pub fn vector(file: &GgufFile, name: &str, length: usize) -> Result<Vec<f32>> {
    let tensor = file.require_tensor(name)?;
    let found = tensor.rows() * tensor.columns();
    if found != length {
        return Err(Error::Model(format!("tensor `{name}` has {found} values, must have {length}")));
    }
    let mut values = vec![0.0; length];
    dequantize(tensor.dtype()?, tensor.columns(), file.data(tensor)?, &mut values)?;
    Ok(values)
}

/// Runs an expression with the name bound to candle's block of a dtype.
macro_rules! with_block {
    ($dtype:expr, $block:ident => $run:expr, IQ4NL => $other:expr) => {
        with_block!(@match $dtype, $block, $run, $other,
            F32 f32, F16 f16, BF16 bf16, Q4_0 BlockQ4_0, Q4_1 BlockQ4_1, Q5_0 BlockQ5_0, Q5_1 BlockQ5_1, Q8_0 BlockQ8_0,
            Q2K BlockQ2K, Q3K BlockQ3K, Q4K BlockQ4K, Q5K BlockQ5K, Q6K BlockQ6K)
    };
    (@match $dtype:expr, $block:ident, $run:expr, $other:expr, $($variant:ident $type:ty),*) => {
        match $dtype {
            $(BlockType::$variant => {
                type $block = $type;
                $run
            })*
            BlockType::IQ4NL => $other,
        }
    };
}

/// Writes stored rows of `columns` values as f32, rows in parallel where there are many.
fn dequantize(dtype: BlockType, columns: usize, stored: &[u8], out: &mut [f32]) -> Result<()> {
    let task_rows = task_rows(columns);
    let (task_bytes, task_values) = (task_rows * dtype.row_bytes(columns), task_rows * columns);
    assert_eq!(stored.len() / dtype.row_bytes(columns).max(1), out.len() / columns.max(1), "rows in and out");
    if out.len() <= task_values {
        return dequantize_blocks(dtype, stored, out);
    }
    let tasks = out.par_chunks_mut(task_values).zip(stored.par_chunks(task_bytes));
    tasks.try_for_each(|(out, stored)| dequantize_blocks(dtype, stored, out))
}

/// Writes stored blocks as f32, on this thread.
///
/// # Errors
/// [`Error::Model`] where the bytes are not aligned as the type's blocks must be.
pub(crate) fn dequantize_blocks(dtype: BlockType, stored: &[u8], out: &mut [f32]) -> Result<()> {
    if widen(dtype, stored, out) {
        return Ok(());
    }
    with_block!(dtype, Block => Block::to_float(blocks::<Block>(dtype, stored)?, out),
        IQ4NL => dequantize_iq4_nl(stored, out));
    Ok(())
}

fn task_rows(columns: usize) -> usize {
    TASK_VALUES.div_ceil(columns.max(1))
}

fn check_alignment(dtype: BlockType, bytes: &[u8]) -> Result<(), String> {
    let alignment = with_block!(dtype, Block => align_of::<Block>(), IQ4NL => 1);
    if bytes.as_ptr().addr().is_multiple_of(alignment) {
        Ok(())
    } else {
        Err(format!("is not aligned to {alignment} bytes"))
    }
}

/// Stored bytes as blocks.
#[expect(unsafe_code, reason = "blocks are read where they lie in the file")]
fn blocks<Block: GgmlType>(dtype: BlockType, bytes: &[u8]) -> Result<&[Block]> {
    assert_eq!((Block::BLCK_SIZE, size_of::<Block>()), (dtype.block_values(), dtype.block_bytes()), "{dtype:?}");
    // SAFETY: every `Block` is f32, f16, bf16 or a `repr(C)` struct of such and of integers, without padding (its size is the
    // stored size, checked above): any bytes are a valid value. `align_to` sees to alignment and bounds.
    let (before, blocks, after) = unsafe { bytes.align_to::<Block>() };
    if !before.is_empty() || !after.is_empty() {
        return Err(Error::Model(format!("{} bytes are no aligned blocks of {}", bytes.len(), dtype.name())));
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};

    use super::*;
    use crate::quant::quantize;
    use crate::testing::TinyModel;

    /// Enough rows that there are several tasks.
    const SHAPE: (usize, usize) = (150, 512);

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|index| ((index * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.3).collect()
    }

    /// Candle's name for the type; it has none for IQ4_NL.
    fn candles(dtype: BlockType) -> Option<GgmlDType> {
        Some(match dtype {
            BlockType::F32 => GgmlDType::F32,
            BlockType::F16 => GgmlDType::F16,
            BlockType::BF16 => GgmlDType::BF16,
            BlockType::Q4_0 => GgmlDType::Q4_0,
            BlockType::Q4_1 => GgmlDType::Q4_1,
            BlockType::Q5_0 => GgmlDType::Q5_0,
            BlockType::Q5_1 => GgmlDType::Q5_1,
            BlockType::Q8_0 => GgmlDType::Q8_0,
            BlockType::Q2K => GgmlDType::Q2K,
            BlockType::Q3K => GgmlDType::Q3K,
            BlockType::Q4K => GgmlDType::Q4K,
            BlockType::Q5K => GgmlDType::Q5K,
            BlockType::Q6K => GgmlDType::Q6K,
            BlockType::IQ4NL => return None,
        })
    }

    #[test]
    fn every_type_is_dequantized_as_candle_does() {
        let values = values(SHAPE.0 * SHAPE.1);
        for dtype in BlockType::ALL {
            let stored = quantize(dtype, SHAPE.1, &values).expect("whole blocks");
            let weight = Weight::from_bytes(&stored, dtype, SHAPE).expect("the right size");
            let mut ours = vec![f32::NAN; values.len()];
            weight.dequantize_rows(0..SHAPE.0, &mut ours).expect("all rows");
            if let Some(candles) = candles(dtype) {
                let storage = QStorage::from_data(stored.into(), &Device::Cpu, candles).expect("the same bytes");
                let theirs = QTensor::new(storage, SHAPE).and_then(|tensor| tensor.dequantize(&Device::Cpu));
                let theirs = theirs.and_then(|tensor| tensor.flatten_all()?.to_vec1::<f32>()).expect("dequantized");
                assert_eq!(ours, theirs, "{dtype:?}");
            }
            let mut part = vec![f32::NAN; 5 * 256];
            weight.dequantize_part(70..75, 256..512, &mut part).expect("whole blocks");
            for (row, part) in part.chunks_exact(256).enumerate() {
                assert_eq!(part, &ours[(70 + row) * SHAPE.1 + 256..][..256], "{dtype:?}");
            }
            assert!(weight.dequantize_part(148..151, 0..256, &mut part[..768]).is_err());
            assert!(weight.dequantize_part(0..1, 0..256, &mut part[..255]).is_err());

            let mut some = vec![f32::NAN; 3 * SHAPE.1];
            weight.dequantize_rows(77..80, &mut some).expect("three rows");
            assert_eq!(some, ours[77 * SHAPE.1..80 * SHAPE.1], "{dtype:?}");
        }
    }

    #[test]
    fn rows_and_shapes_that_are_not_there_are_errors() {
        let weight = Weight::from_bytes(&[0; 4 * 34], BlockType::Q8_0, (4, 32)).expect("the right size");
        let mut out = vec![0.0; 32];
        assert!(weight.dequantize_rows(3..4, &mut out).is_ok());
        assert!(weight.dequantize_rows(4..5, &mut out).is_err());
        assert!(weight.dequantize_rows(0..2, &mut out).is_err());
        assert!(weight.dequantize_rows(2..2, &mut []).is_ok());
        assert!(Weight::from_bytes(&[0; 4 * 34], BlockType::Q8_0, (3, 32)).is_err());
        assert!(Weight::from_bytes(&[0; 4 * 34], BlockType::Q8_0, (4, 31)).is_err());
        assert!(quantize(BlockType::Q8_0, 33, &[0.0; 33]).is_err());
        assert!(quantize(BlockType::F32, 2, &[0.0; 3]).is_err());
    }

    #[test]
    fn a_tiny_model_has_what_it_promises() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        let model =
            TinyModel { dtypes: vec![BlockType::Q8_0, BlockType::Q4_0, BlockType::Q6K], ..TinyModel::default() };
        model.write(&path).expect("written");
        let bytes = std::fs::read(&path).expect("there");
        model.write(&path).expect("written again");
        assert_eq!(bytes, std::fs::read(&path).expect("there"), "the same fields give the same bytes");

        let file = GgufFile::open(&path).expect("our own file");
        let weight = Weight::from_gguf(&file, "blk.1.ffn_down.weight", (64, 128)).expect("there");
        assert_eq!((weight.rows(), weight.columns()), (64, 128));
        let vocab_size = file.require_strings("tokenizer.ggml.tokens").expect("tokens").len();
        let mut embedding = vec![0.0; vocab_size * 64];
        let weight = Weight::from_gguf(&file, "token_embd.weight", (vocab_size, 64)).expect("there");
        weight.dequantize_rows(0..vocab_size, &mut embedding).expect("all rows");
        let mean_square = embedding.iter().map(|value| value * value).sum::<f32>() / embedding.len() as f32;
        assert!((mean_square.sqrt() - 0.05).abs() < 0.002, "{mean_square}");
        let norm = vector(&file, "output_norm.weight", 64).expect("there");
        assert!(norm.iter().all(|value| (0.3..1.7).contains(value)));

        let says = |error: Error| error.to_string();
        let wrong_shape = Weight::from_gguf(&file, "blk.0.attn_k.weight", (64, 64)).map_err(says);
        let message = "invalid model: tensor `blk.0.attn_k.weight` has the shape [32, 64], must have [64, 64]";
        assert_eq!(wrong_shape.expect_err("another shape"), message);
        let wrong_length = vector(&file, "output_norm.weight", 32).map_err(says).expect_err("another length");
        assert_eq!(wrong_length, "invalid model: tensor `output_norm.weight` has 64 values, must have 32");
    }
}
