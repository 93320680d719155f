//! The model: configuration, stored weights, and the forward and backward of its parts.

mod block;
mod config;
mod linear;
mod llama;
mod untrained;
pub mod weights;

pub use block::BlockParts;
pub(crate) use block::gguf_name;
pub use config::{Config, Shape};
pub use llama::{KvCache, Llama, MicroStep, Parts};
pub use untrained::untrained_tokens;
