//! LoRA training on quantized Llama-family models: forward and backward by hand, no autograd, no server.

pub mod data;
mod error;
pub mod export;
pub mod gguf;
pub mod model;
pub mod spec;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;

pub use error::{Error, Result};
