//! Rows in tokens, on disk: written once while the data set is read, then read row by row, so that a training's memory does
//! not grow with its data.
//!
//! Two files without a name, which the system removes with the process, however it ends. One holds the rows end to end: the
//! number of tokens (u32), the tokens (u16 where the vocabulary fits, else u32), and a bit for each that says whether it is
//! trained on. The other holds where each row begins (u64). All numbers are little-endian.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Row;
use crate::{Error, Result};

/// Bytes that are collected before they are written.
const BUFFER_BYTES: usize = 1 << 18;

/// The rows of a data set.
#[derive(Debug, Clone)]
pub struct Rows {
    rows: Arc<File>,
    offsets: Arc<File>,
    folder: PathBuf,
    len: usize,
    token_bytes: usize,
    digest: [u8; 32],
}

impl Rows {
    /// Keeps rows that are in memory already, in the system's folder for temporary files.
    ///
    /// # Errors
    /// [`Error::Io`] where they cannot be written.
    pub fn from_memory(rows: &[Row]) -> Result<Self> {
        let mut writer = RowWriter::new(&std::env::temp_dir(), usize::MAX)?;
        rows.iter().try_for_each(|row| writer.push(row))?;
        writer.finish()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The row of that number, from 0.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read.
    ///
    /// # Panics
    /// For a number that no row has.
    pub fn row(&self, index: usize) -> Result<Row> {
        assert!(index < self.len, "row {index} was asked for, there are {}", self.len);
        self.read(index).map_err(Error::io(&self.folder))
    }

    /// All rows, in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Row>> + '_ {
        (0..self.len).map(|index| self.row(index))
    }

    /// SHA-256 of all rows: the same for the same rows and vocabulary.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn read(&self, index: usize) -> std::io::Result<Row> {
        let mut offset = [0; 8];
        self.offsets.read_exact_at(&mut offset, index as u64 * 8)?;
        let offset = u64::from_le_bytes(offset);
        let mut count = [0; 4];
        self.rows.read_exact_at(&mut count, offset)?;
        let count = u32::from_le_bytes(count) as usize;
        let mut bytes = vec![0; count * self.token_bytes + count.div_ceil(8)];
        self.rows.read_exact_at(&mut bytes, offset + 4)?;
        let (tokens, mask) = bytes.split_at(count * self.token_bytes);
        let token = |bytes: &[u8]| bytes.iter().rev().fold(0, |token, &byte| token << 8 | u32::from(byte));
        let tokens = tokens.chunks_exact(self.token_bytes).map(token).collect();
        Ok(Row { tokens, trained: (0..count).map(|at| mask[at / 8] >> (at % 8) & 1 == 1).collect() })
    }
}

/// Writes rows as they come.
pub(super) struct RowWriter {
    rows: BufWriter<File>,
    offsets: BufWriter<File>,
    folder: PathBuf,
    len: usize,
    end: u64,
    token_bytes: usize,
    digest: Sha256,
    buffer: Vec<u8>,
}

impl RowWriter {
    /// A writer into that folder, for tokens below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder in which no file can be made.
    pub(super) fn new(folder: &Path, vocab_size: usize) -> Result<Self> {
        let file = || tempfile::tempfile_in(folder).map_err(Error::io(folder));
        Ok(Self::over(file()?, file()?, folder, vocab_size))
    }

    fn over(rows: File, offsets: File, folder: &Path, vocab_size: usize) -> Self {
        let buffered = |file| BufWriter::with_capacity(BUFFER_BYTES, file);
        Self {
            rows: buffered(rows),
            offsets: buffered(offsets),
            folder: folder.to_owned(),
            len: 0,
            end: 0,
            token_bytes: if vocab_size <= 1 << 16 { 2 } else { 4 },
            digest: Sha256::new(),
            buffer: Vec::new(),
        }
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written, on a disk that is full for one.
    pub(super) fn push(&mut self, row: &Row) -> Result<()> {
        self.buffer.clear();
        self.buffer.extend((row.tokens.len() as u32).to_le_bytes());
        for token in &row.tokens {
            self.buffer.extend(&token.to_le_bytes()[..self.token_bytes]);
        }
        let mask = |trained: &[bool]| trained.iter().rev().fold(0, |bits, &bit| bits << 1 | u8::from(bit));
        self.buffer.extend(row.trained.chunks(8).map(mask));
        self.digest.update(&self.buffer);
        let offset = self.end.to_le_bytes();
        let written = self.rows.write_all(&self.buffer).and_then(|()| self.offsets.write_all(&offset));
        written.map_err(|error| self.failed(error))?;
        self.end += self.buffer.len() as u64;
        self.len += 1;
        Ok(())
    }

    /// The rows, ready to be read.
    ///
    /// # Errors
    /// As [`RowWriter::push`].
    pub(super) fn finish(mut self) -> Result<Rows> {
        let written = self.rows.flush().and_then(|()| self.offsets.flush());
        written.map_err(|error| self.failed(error))?;
        // Nothing is left in the buffers.
        let file = |writer: BufWriter<File>| Arc::new(writer.into_parts().0);
        let (rows, offsets) = (file(self.rows), file(self.offsets));
        let (len, token_bytes, digest) = (self.len, self.token_bytes, self.digest.finalize().into());
        Ok(Rows { rows, offsets, folder: self.folder, len, token_bytes, digest })
    }

    fn failed(&self, error: std::io::Error) -> Error {
        let message = format!("the rows in tokens ({} bytes so far) cannot be kept there: {error}", self.end);
        Error::io(&self.folder)(std::io::Error::new(error.kind(), message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(vocab_size: u32) -> impl Strategy<Value = Vec<Row>> {
        let row = prop::collection::vec((0..vocab_size, any::<bool>()), 0..40).prop_map(|tokens| {
            let (tokens, trained) = tokens.into_iter().unzip();
            Row { tokens, trained }
        });
        prop::collection::vec(row, 0..12)
    }

    fn kept(rows: &[Row], vocab_size: usize) -> Rows {
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = RowWriter::new(folder.path(), vocab_size).expect("a writer");
        rows.iter().try_for_each(|row| writer.push(row)).expect("writes");
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "the files have no name");
        writer.finish().expect("rows")
    }

    proptest! {
        #[test]
        fn what_is_kept_comes_back((vocab_size, rows) in prop_oneof![Just(65_536u32), Just(u32::MAX)].prop_flat_map(|v| (Just(v), rows(v)))) {
            let kept = kept(&rows, vocab_size as usize);
            prop_assert_eq!(kept.len(), rows.len());
            prop_assert_eq!(kept.is_empty(), rows.is_empty());
            let back: Result<Vec<Row>> = kept.iter().collect();
            prop_assert_eq!(&back.expect("reads"), &rows);
            for index in (0..rows.len()).rev() {
                prop_assert_eq!(&kept.row(index).expect("reads"), &rows[index]);
            }
        }
    }

    #[test]
    fn other_rows_have_another_digest() {
        let row = |tokens: &[u32], trained: &[bool]| Row { tokens: tokens.to_vec(), trained: trained.to_vec() };
        let all = [
            vec![],
            vec![row(&[1, 2], &[false, true])],
            vec![row(&[1, 2], &[false, false])],
            vec![row(&[1], &[false]), row(&[2], &[true])],
            vec![row(&[2, 1], &[false, true])],
        ];
        let digests: std::collections::HashSet<[u8; 32]> = all.iter().map(|rows| kept(rows, 100).digest()).collect();
        assert_eq!(digests.len(), all.len());
        assert_eq!(kept(&all[1], 100).digest(), kept(&all[1], 200).digest());
    }

    #[test]
    fn a_full_disk_and_a_missing_folder_are_errors_that_say_so() {
        let full = || File::options().write(true).open("/dev/full").expect("opens");
        let mut writer = RowWriter::over(full(), full(), Path::new("/scratch"), 100);
        writer.push(&Row { tokens: vec![1], trained: vec![true] }).expect("still in memory");
        let error = writer.finish().expect_err("full").to_string();
        assert!(error.contains("/scratch") && error.contains("No space left"), "{error}");
        let error = RowWriter::new(Path::new("/nowhere"), 100).err().expect("no folder").to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }
}
