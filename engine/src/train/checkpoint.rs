//! A run's state, and its file: parameters, moments, where the run stands, and which run it is.
//!
//! The row order and the initial values depend only on the seed, the loader only on seed and step, dropout on both: the step is
//! also the state of the random numbers and of the data cursor. The file is a safetensors file with one key of metadata,
//! streamed to a new name, synced, then renamed: it is whole or absent.

use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::Tensor;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::evaluation::Best;
use super::moments::Moments;
use crate::adapter::LoraLayout;
use crate::data::Dataset;
use crate::files::write_atomically_with;
use crate::model::Llama;
use crate::ops::matmul::Compute;
use crate::ops::{Host, host, tensor};
use crate::spec::{Optimizer, TrainSpec};
use crate::{Error, Result};

const FORMAT: u32 = 3;
const METADATA_KEY: &str = "lorad";
const PARAMETERS: &str = "parameters";
const BEST: &str = "best_parameters";
/// Values that are turned into bytes at once.
const PIECE: usize = 1 << 14;

/// Where a run stands. The one that an event carries is the live state: save it before the next step.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) header: Header,
    /// (N), the LoRA's flat buffer.
    pub(super) parameters: Tensor,
    pub(super) moments: Moments,
    /// (N), the parameters of the best evaluation, where the run may end with them.
    pub(super) best: Option<Tensor>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) format: u32,
    /// Steps done.
    pub(super) step: u32,
    pub(super) trained_tokens: u64,
    /// What must be the same for the run to go on: specification, model, data.
    pub(super) run: String,
    /// Blocks that keep their activations; with `auto` chosen again where the run is resumed.
    pub(super) kept_layers: usize,
    pub(super) optimizer: Optimizer,
    /// Type of the operands of products, decided once a run.
    pub(super) compute: Compute,
    /// The best evaluation so far, where early stopping looks for it.
    pub(super) best: Option<Best>,
}

/// A tensor of the file.
pub(super) enum Stored<'a> {
    Tensor(Host<'a>),
    Values(&'a [f32]),
    Codes(&'a [u8]),
}

impl Stored<'_> {
    /// Its type's name, its length, its bytes.
    fn describe(&self) -> (&'static str, usize, usize) {
        match self {
            Self::Tensor(values) => ("F32", values.len(), 4 * values.len()),
            Self::Values(values) => ("F32", values.len(), 4 * values.len()),
            Self::Codes(codes) => ("U8", codes.len(), codes.len()),
        }
    }

    fn write(&self, file: &mut impl Write) -> std::io::Result<()> {
        let values: &[f32] = match self {
            Self::Codes(codes) => return file.write_all(codes),
            Self::Tensor(values) => values,
            Self::Values(values) => values,
        };
        values.chunks(PIECE).try_for_each(|piece| {
            let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
            file.write_all(&bytes)
        })
    }
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
        let mut tensors = vec![(PARAMETERS, Stored::Tensor(host(&self.parameters)?))];
        tensors.extend(self.moments.stored()?);
        if let Some(best) = &self.best {
            tensors.push((BEST, Stored::Tensor(host(best)?)));
        }
        let header = self.safetensors_header(&tensors)?;
        write_atomically_with(path, |file| {
            let mut file = BufWriter::new(file);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            tensors.iter().try_for_each(|(_, stored)| stored.write(&mut file))?;
            file.flush()
        })
    }

    fn safetensors_header(&self, tensors: &[(&str, Stored<'_>)]) -> Result<Vec<u8>> {
        let unwritable = |error: serde_json::Error| Error::Checkpoint(format!("it cannot be written: {error}"));
        let own = serde_json::to_string(&self.header).map_err(unwritable)?;
        let mut header = json!({"__metadata__": {METADATA_KEY: own}});
        let mut begin = 0;
        for (name, stored) in tensors {
            let (dtype, length, size_bytes) = stored.describe();
            let end = begin + size_bytes;
            header[*name] = json!({"dtype": dtype, "shape": [length], "data_offsets": [begin, end]});
            begin = end;
        }
        let mut header = serde_json::to_vec(&header).map_err(unwritable)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(header)
    }

    /// Reads one.
    ///
    /// # Errors
    /// A file that is missing, cut or of another format.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|_| damaged("header"))?;
        let json = metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
        let json: serde_json::Value =
            serde_json::from_str(json.ok_or_else(|| damaged("description"))?).map_err(|_| damaged("description"))?;
        if json["format"] != FORMAT {
            return Err(Error::Checkpoint(format!("its format must be {FORMAT}, got `{}`", json["format"])));
        }
        let header: Header = serde_json::from_value(json).map_err(|_| damaged("description"))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|_| damaged("header"))?;
        let file = File { tensors };
        let parameters = file.values(PARAMETERS)?;
        let count = parameters.len();
        let best = header.best.as_ref().map(|_| file.values(BEST)).transpose()?;
        if best.as_ref().is_some_and(|best| best.len() != count) {
            return Err(damaged("best parameters"));
        }
        Ok(Self {
            moments: Moments::load(header.optimizer, &file)?,
            header,
            parameters: tensor(parameters, count)?,
            best: best.map(|best| tensor(best, count)).transpose()?,
        })
    }

    /// Whether it can be the state of a LoRA of that layout.
    pub(super) fn fits(&self, layout: &LoraLayout) -> bool {
        self.parameters.dims() == [layout.len()] && self.moments.fit(layout)
    }
}

/// A checkpoint file that is being read.
pub(super) struct File<'a> {
    tensors: SafeTensors<'a>,
}

impl File<'_> {
    /// A tensor of f32.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::F32)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// A tensor of bytes.
    pub(super) fn codes(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.bytes(name, Dtype::U8)?.to_vec())
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> Result<&[u8]> {
        let found = self.tensors.tensor(name).map_err(|_| damaged(&format!("tensor `{name}`")))?;
        if found.dtype() != dtype || found.shape().len() != 1 {
            return Err(damaged(&format!("tensor `{name}`")));
        }
        Ok(found.data())
    }
}

pub(super) fn damaged(what: &str) -> Error {
    Error::Checkpoint(format!("its {what} cannot be read"))
}

/// A digest of all that must be the same for a run to go on with the same numbers.
pub(super) fn run_digest(
    spec: &TrainSpec,
    model: &Llama,
    dataset: &Dataset,
    validation: Option<&Dataset>,
) -> Result<String> {
    let mut digest = Sha256::new();
    let spec = serde_json::to_vec(spec).map_err(|error| Error::Checkpoint(error.to_string()))?;
    digest.update(&spec);
    digest.update(model.file_sha256());
    digest.update(dataset.rows.digest());
    if let Some(validation) = validation {
        digest.update(b"validation");
        digest.update(validation.rows.digest());
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Header {
    /// Of a run before its first step.
    pub(super) fn new(run: &str, kept_layers: usize, optimizer: Optimizer, compute: Compute) -> Self {
        let run = run.to_owned();
        Self { format: FORMAT, step: 0, trained_tokens: 0, run, kept_layers, optimizer, compute, best: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Shape;
    use crate::spec::Optimizer;

    fn layout() -> std::sync::Arc<LoraLayout> {
        LoraLayout::new(&TrainSpec::default().lora, &Shape::tiny())
    }

    fn checkpoint(optimizer: Optimizer, best: bool) -> Checkpoint {
        let layout = layout();
        let values = |from: f32| tensor((0..layout.len()).map(|i| i as f32 / from).collect(), layout.len()).unwrap();
        let mut header = Header::new("run", 1, optimizer, Compute::F32);
        (header.step, header.trained_tokens) = (5, 678);
        header.best = best.then_some(Best { step: 3, loss: 0.1, since: 2 });
        let moments = Moments::zeros(optimizer, &layout).unwrap();
        Checkpoint { header, parameters: values(7.0), moments, best: best.then(|| values(9.0)) }
    }

    #[test]
    fn what_was_saved_is_loaded_and_saved_the_same_again() {
        for (optimizer, best) in [(Optimizer::AdamW, false), (Optimizer::AdamW8bit, true)] {
            let folder = tempfile::tempdir().unwrap();
            let (one, two) = (folder.path().join("one"), folder.path().join("two"));
            let saved = checkpoint(optimizer, best);
            saved.save(&one).unwrap();
            let loaded = Checkpoint::load(&one).unwrap();
            assert_eq!((loaded.step(), loaded.trained_tokens(), &loaded.header), (5, 678, &saved.header));
            assert!(loaded.fits(&layout()));
            let values = |tensor: &Tensor| tensor.to_vec1::<f32>().unwrap();
            assert_eq!(values(&loaded.parameters), values(&saved.parameters));
            assert_eq!(loaded.best.as_ref().map(values), saved.best.as_ref().map(values));
            loaded.save(&two).unwrap();
            assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_cut_file_is_an_error_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        checkpoint(Optimizer::AdamW8bit, true).save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).filter(|length| *length < 2000 || length % 997 == 0) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(Checkpoint::load(&path).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_failed_save_leaves_the_old_file() {
        let error = checkpoint(Optimizer::AdamW, false).save(Path::new("/nowhere/checkpoint")).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }
}
