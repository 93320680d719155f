//! Reads little-endian values from bytes that may lie: what is allocated is a small multiple of the bytes read so far.

use super::{Array, Value};

/// Arrays in arrays in arrays: deeper ones are refused.
const MAX_ARRAY_DEPTH: usize = 4;
/// A header larger than this is refused. The largest tokenizers known take some 20 MB.
const MAX_HEADER_BYTES: usize = 1 << 28;

/// A position in the header.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes: &bytes[..bytes.len().min(MAX_HEADER_BYTES)], position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let left = &self.bytes[self.position..];
        let Some(taken) = left.get(..count) else {
            return Err(format!(
                "the header is cut off: {count} bytes are needed at {}, {} are left",
                self.position,
                left.len()
            ));
        };
        self.position += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("take gives the length asked for"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `least_bytes` each, no more than the bytes left could hold.
    pub(super) fn count(&mut self, what: &str, least_bytes: usize) -> Result<usize, String> {
        let count = self.u64()?;
        let left = self.bytes.len() - self.position;
        match usize::try_from(count) {
            Ok(count) if count <= left / least_bytes => Ok(count),
            _ => Err(format!("{what} is {count}, more than the {left} bytes left can hold")),
        }
    }

    fn string(&mut self) -> Result<&'a [u8], String> {
        let length = self.count("a string's length", 1)?;
        self.take(length)
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self, what: &str, index: usize) -> Result<String, String> {
        let bytes = self.string().map_err(|message| format!("{what} {index}: {message}"))?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} {index} is not UTF-8"))
    }

    /// A value, its type in front of it.
    pub(super) fn value(&mut self) -> Result<Value, String> {
        Ok(match self.u32()? {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(bool_of(self.array()?)?),
            8 => Value::String(self.string()?.to_vec()),
            9 => Value::Array(self.array_value(1)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            id => return Err(format!("its type {id} is not one of GGUF's thirteen")),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<Array, String> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(format!("arrays are nested deeper than {MAX_ARRAY_DEPTH}"));
        }
        Ok(match self.u32()? {
            0 => Array::U8(self.numbers(u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(f32::from_le_bytes)?),
            7 => Array::Bool(self.numbers(|byte| byte)?.into_iter().map(bool_of).collect::<Result<_, _>>()?),
            8 => Array::String(self.elements(8, |cursor| Ok(cursor.string()?.to_vec()))?),
            9 => Array::Array(self.elements(4 + 8, |cursor| cursor.array_value(depth + 1))?),
            10 => Array::U64(self.numbers(u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(f64::from_le_bytes)?),
            id => return Err(format!("its element type {id} is not one of GGUF's thirteen")),
        })
    }

    fn numbers<const N: usize, T>(&mut self, read: impl Fn([u8; N]) -> T) -> Result<Vec<T>, String> {
        let count = self.count("an array's length", N)?;
        let (chunks, _) = self.take(count * N)?.as_chunks::<N>();
        Ok(chunks.iter().map(|&bytes| read(bytes)).collect())
    }

    fn elements<T>(
        &mut self,
        least_bytes: usize,
        mut read: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let count = self.count("an array's length", least_bytes)?;
        (0..count).map(|_| read(self)).collect()
    }
}

fn bool_of([byte]: [u8; 1]) -> Result<bool, String> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("a bool is the byte {other}, must be 0 or 1")),
    }
}
