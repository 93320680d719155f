//! What a GGUF file says of a tensor: name, shape, stored type, place.

use crate::quant::BlockType;
use crate::{Error, Result};

/// A tensor type as the file numbers it, whether or not it can be dequantized here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoredType(u32);

impl StoredType {
    /// The type of that number.
    pub fn from_id(id: u32) -> Self {
        Self(id)
    }

    /// The number that stands in the file.
    pub fn id(self) -> u32 {
        self.0
    }

    /// The type of its blocks; `None` where it cannot be dequantized.
    pub fn dtype(self) -> Option<BlockType> {
        KNOWN.iter().find(|known| known.id == self.0).and_then(|known| known.dtype)
    }

    /// The ggml name, `Q4_K` for one; `type 99` where the number is not known.
    pub fn name(self) -> String {
        match KNOWN.iter().find(|known| known.id == self.0) {
            Some(known) => known.name.to_owned(),
            None => format!("type {}", self.0),
        }
    }

    /// Values and bytes of one block; `None` where the number is not known.
    pub(super) fn block(self) -> Option<(usize, usize)> {
        KNOWN.iter().find(|known| known.id == self.0).map(|known| (known.block_values, known.block_bytes))
    }
}

impl From<BlockType> for StoredType {
    fn from(dtype: BlockType) -> Self {
        let known = KNOWN.iter().find(|known| known.dtype == Some(dtype));
        Self(known.expect("every block type stands in the table").id)
    }
}

/// One tensor of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, `blk.0.attn_q.weight` for one.
    pub name: String,
    /// Dimensions, row-major, outermost first: a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub stored: StoredType,
    /// Where the tensor begins, in bytes from the start of the file.
    pub offset: usize,
    /// Bytes it takes; 0 where the type's number is not known.
    pub size_bytes: usize,
}

impl TensorInfo {
    /// The stored type, where it can be dequantized.
    ///
    /// # Errors
    /// [`Error::Model`] naming the tensor and its type.
    pub fn dtype(&self) -> Result<BlockType> {
        self.stored.dtype().ok_or_else(|| {
            let Self { name, stored, .. } = self;
            Error::Model(format!("tensor `{name}` is stored as {}, which is not supported", stored.name()))
        })
    }

    /// Length of a row: the innermost dimension.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }
}

/// Bytes that a tensor of that shape takes, or what is wrong with the shape.
pub(super) fn size_bytes(shape: &[usize], stored: StoredType) -> Result<usize, String> {
    if !(1..=4).contains(&shape.len()) {
        return Err(format!("has {} dimensions, must have 1 to 4", shape.len()));
    }
    let mut values = 1usize;
    for &dimension in shape {
        if dimension == 0 {
            return Err(format!("has a dimension of 0 in its shape {shape:?}"));
        }
        values = values
            .checked_mul(dimension)
            .filter(|&values| values <= isize::MAX as usize / 8)
            .ok_or_else(|| format!("has more values than can be addressed in its shape {shape:?}"))?;
    }
    let Some((block_values, block_bytes)) = stored.block() else { return Ok(0) };
    let columns = shape[shape.len() - 1];
    if !columns.is_multiple_of(block_values) {
        let name = stored.name();
        return Err(format!("has rows of {columns}, not a multiple of the {block_values} values in a block of {name}"));
    }
    (values / block_values)
        .checked_mul(block_bytes)
        .ok_or_else(|| format!("has more bytes than can be addressed in its shape {shape:?}"))
}

struct Known {
    id: u32,
    name: &'static str,
    block_values: usize,
    block_bytes: usize,
    dtype: Option<BlockType>,
}

const fn known(id: u32, name: &'static str, block: (usize, usize), dtype: Option<BlockType>) -> Known {
    Known { id, name, block_values: block.0, block_bytes: block.1, dtype }
}

/// ggml's types: number, name, values and bytes of a block, and our name for it. Numbers 4, 5, 31 to 33 and 36 to 38
/// belonged to types that ggml has given up.
const KNOWN: [Known; 32] = [
    known(0, "F32", (1, 4), Some(BlockType::F32)),
    known(1, "F16", (1, 2), Some(BlockType::F16)),
    known(2, "Q4_0", (32, 18), Some(BlockType::Q4_0)),
    known(3, "Q4_1", (32, 20), Some(BlockType::Q4_1)),
    known(6, "Q5_0", (32, 22), Some(BlockType::Q5_0)),
    known(7, "Q5_1", (32, 24), Some(BlockType::Q5_1)),
    known(8, "Q8_0", (32, 34), Some(BlockType::Q8_0)),
    known(9, "Q8_1", (32, 36), None),
    known(10, "Q2_K", (256, 84), Some(BlockType::Q2K)),
    known(11, "Q3_K", (256, 110), Some(BlockType::Q3K)),
    known(12, "Q4_K", (256, 144), Some(BlockType::Q4K)),
    known(13, "Q5_K", (256, 176), Some(BlockType::Q5K)),
    known(14, "Q6_K", (256, 210), Some(BlockType::Q6K)),
    known(15, "Q8_K", (256, 292), None),
    known(16, "IQ2_XXS", (256, 66), None),
    known(17, "IQ2_XS", (256, 74), None),
    known(18, "IQ3_XXS", (256, 98), None),
    known(19, "IQ1_S", (256, 50), None),
    known(20, "IQ4_NL", (32, 18), Some(BlockType::IQ4NL)),
    known(21, "IQ3_S", (256, 110), None),
    known(22, "IQ2_S", (256, 82), None),
    known(23, "IQ4_XS", (256, 136), None),
    known(24, "I8", (1, 1), None),
    known(25, "I16", (1, 2), None),
    known(26, "I32", (1, 4), None),
    known(27, "I64", (1, 8), None),
    known(28, "F64", (1, 8), None),
    known(29, "IQ1_M", (256, 56), None),
    known(30, "BF16", (1, 2), Some(BlockType::BF16)),
    known(34, "TQ1_0", (256, 54), None),
    known(35, "TQ2_0", (256, 66), None),
    known(39, "MXFP4", (32, 17), None),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_types_are_named_and_sized_alike() {
        for known in KNOWN {
            if let Some(dtype) = known.dtype {
                assert_eq!(
                    (known.block_values, known.block_bytes),
                    (dtype.block_values(), dtype.block_bytes()),
                    "{dtype:?}"
                );
                assert_eq!(known.name, dtype.name());
                assert_eq!(StoredType::from(dtype).id(), known.id);
            }
        }
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        let q4k = StoredType::from(BlockType::Q4K);
        assert_eq!(size_bytes(&[3, 512], q4k), Ok(3 * 2 * 144));
        assert_eq!(size_bytes(&[7], StoredType::from_id(99)), Ok(0));
        for (shape, says) in [
            (vec![], "has 0 dimensions"),
            (vec![1; 5], "has 5 dimensions"),
            (vec![4, 0], "dimension of 0"),
            (vec![1 << 40, 1 << 40], "more values than can be addressed"),
            (vec![usize::MAX, 256], "more values than can be addressed"),
            (vec![2, 172], "rows of 172, not a multiple of the 256 values in a block of Q4_K"),
        ] {
            let error = size_bytes(&shape, q4k).expect_err("refused");
            assert!(error.contains(says), "{shape:?}: {error}");
        }
    }
}
