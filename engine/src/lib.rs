//! LoRA training on quantized Llama-family models: forward and backward by hand, no autograd, no server.

pub mod adapter;
pub mod allocator;
pub mod bench;
pub mod data;
pub mod device;
mod error;
pub mod export;
mod files;
pub mod generate;
pub mod gguf;
mod jinja;
pub mod model;
pub mod ops;
pub mod quant;
pub mod spec;
#[doc(hidden)]
pub mod testing;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
