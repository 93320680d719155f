//! LoRA training on quantized Llama-family models: forward and backward by hand, no autograd, no server.

mod error;
pub mod spec;

pub use error::{Error, Result};
