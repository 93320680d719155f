//! The engine's one error type: what is wrong, with the thing and the value named.

use std::path::PathBuf;

/// Everything that can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A model file is damaged, lies about itself, or is of a kind that is not supported.
    #[error("invalid model: {0}")]
    Model(String),
    /// The model's architecture is not one that the engine trains.
    #[error("architecture `{0}` is not supported, supported: llama")]
    UnsupportedArchitecture(String),
    /// The model's tokenizer cannot be built or does not fit the model.
    #[error("invalid tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template does not compile, does not render, or renders what cannot be masked.
    #[error("invalid chat template: {0}")]
    Template(String),
    /// A data set cannot be trained on.
    #[error(transparent)]
    Dataset(#[from] crate::data::DatasetError),
    /// A hyperparameter is out of its range.
    #[error(transparent)]
    Spec(#[from] crate::spec::SpecError),
    /// An adapter folder is damaged or does not fit the model.
    #[error("invalid adapter: {0}")]
    Adapter(String),
    /// A checkpoint is damaged or belongs to another run.
    #[error("invalid checkpoint: {0}")]
    Checkpoint(String),
    /// An exported file, read back, is not what was written.
    #[error("export failed its read-back: {0}")]
    ReadBack(String),
    /// Training cannot go on (the loss is not a number, for one).
    #[error("training failed at step {step}: {message}")]
    Training {
        /// The step, counted from 1.
        step: u32,
        /// What happened.
        message: String,
    },
    /// The GPU or its driver refuses, or is not there.
    #[error("GPU: {0}")]
    Device(String),
    /// The GPU's memory is too small for what was asked.
    #[error("out of GPU memory: {}{} MiB are free", needed(*needed_bytes), free_bytes >> 20)]
    DeviceMemory {
        /// Bytes that were asked for, by the run or by a part of it; 0 where the driver does not say.
        needed_bytes: u64,
        /// Bytes that were free then.
        free_bytes: u64,
    },
    /// A tensor operation failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error with the path it happened at.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// The part of a message that names what was asked for, where that is known.
fn needed(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!("{} MiB are needed, ", bytes.div_ceil(1 << 20)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_without_memory_says_what_is_known() {
        let said = |needed_bytes| Error::DeviceMemory { needed_bytes, free_bytes: 5 << 20 }.to_string();
        assert_eq!(said(0), "out of GPU memory: 5 MiB are free");
        assert_eq!(said((2 << 20) + 1), "out of GPU memory: 3 MiB are needed, 5 MiB are free");
    }
}
