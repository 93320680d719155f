//! A run's state in one file: parameters, both moments, step, tokens so far, and which run it belongs to.
//!
//! The row order and the initial values depend only on the seed, the loader only on seed and step: the step is also the state
//! of the random numbers and of the data cursor. Written to a new name, synced, then renamed: it is whole or absent.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::Dataset;
use crate::files::write_atomically;
use crate::model::Llama;
use crate::ops::{host, tensor};
use crate::spec::TrainSpec;
use crate::{Error, Result};

const FORMAT: u32 = 1;
const METADATA_KEY: &str = "lorad";
const TENSOR: &str = "state";

/// Where a run stands. The one that an event carries shows the live state: save it before the next step.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) header: Header,
    /// (3, N): parameters, first moments, second moments.
    pub(super) state: Tensor,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) format: u32,
    /// Steps done.
    pub(super) step: u32,
    pub(super) trained_tokens: u64,
    /// What must be the same for the run to go on: specification, model, data.
    pub(super) run: String,
}

impl Checkpoint {
    /// Steps that were done.
    pub fn step(&self) -> u32 {
        self.header.step
    }

    /// Tokens that had a loss so far.
    pub fn trained_tokens(&self) -> u64 {
        self.header.trained_tokens
    }

    /// Writes it under that path, replacing what was there in one move.
    ///
    /// # Errors
    /// A folder that cannot be written or is full; what was there before stays.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes: Vec<u8> = host(&self.state)?.iter().flat_map(|value| value.to_le_bytes()).collect();
        let damaged = |error: &dyn std::fmt::Display| Error::Checkpoint(format!("it cannot be written: {error}"));
        let view = TensorView::new(Dtype::F32, self.state.dims().to_vec(), &bytes).map_err(|error| damaged(&error))?;
        let header = serde_json::to_string(&self.header).map_err(|error| damaged(&error))?;
        // One key only: safetensors writes them in the order of a hash map.
        let metadata = Some(HashMap::from([(METADATA_KEY.to_owned(), header)]));
        let file = safetensors::serialize([(TENSOR, view)], metadata).map_err(|error| damaged(&error))?;
        write_atomically(path, &file)
    }

    /// Reads one.
    ///
    /// # Errors
    /// A file that is missing, cut or of another format.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let damaged = |what: &str| Error::Checkpoint(format!("{what} cannot be read"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|_| damaged("its header"))?;
        let json = metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
        let header: Header = serde_json::from_str(json.ok_or_else(|| damaged("its description"))?)
            .map_err(|_| damaged("its description"))?;
        if header.format != FORMAT {
            return Err(Error::Checkpoint(format!("format must be {FORMAT}, got `{}`", header.format)));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|_| damaged("its header"))?;
        let state = tensors.tensor(TENSOR).map_err(|_| damaged("its tensor"))?;
        let (Dtype::F32, &[3, len]) = (state.dtype(), state.shape()) else {
            return Err(damaged("its tensor"));
        };
        let values = state.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Ok(Self { header, state: tensor(values, (3, len))? })
    }
}

/// A digest of all that must be the same for a run to go on with the same numbers.
pub(super) fn run_digest(spec: &TrainSpec, model: &Llama, dataset: &Dataset) -> Result<String> {
    let mut digest = Sha256::new();
    let spec = serde_json::to_vec(spec).map_err(|error| Error::Checkpoint(error.to_string()))?;
    digest.update(&spec);
    digest.update(model.file_sha256());
    for row in &dataset.rows {
        digest.update((row.tokens.len() as u64).to_le_bytes());
        row.tokens.iter().for_each(|token| digest.update(token.to_le_bytes()));
        row.trained.iter().for_each(|&trained| digest.update([u8::from(trained)]));
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

pub(super) fn header(step: u32, trained_tokens: u64, run: &str) -> Header {
    Header { format: FORMAT, step, trained_tokens, run: run.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let state = tensor((0..12).map(|i| i as f32 / 7.0).collect(), (3, 4)).unwrap();
        Checkpoint { header: header(5, 678, "run"), state }
    }

    #[test]
    fn what_was_saved_is_loaded_and_saved_the_same_again() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        checkpoint().save(&one).unwrap();
        let loaded = Checkpoint::load(&one).unwrap();
        assert_eq!((loaded.step(), loaded.trained_tokens(), loaded.header.run.as_str()), (5, 678, "run"));
        loaded.save(&two).unwrap();
        assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_cut_file_is_an_error_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        checkpoint().save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(Checkpoint::load(&path).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_failed_save_leaves_the_old_file() {
        let error = checkpoint().save(Path::new("/nowhere/checkpoint")).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }
}
