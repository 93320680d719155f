//! The LoRA daemon: a self-hosted fine-tuning server with OpenAI's API.

/// The environment's variable that says how the log is written.
pub const LOG_FORMAT: &str = "LORAD_LOG_FORMAT";

pub mod cli;
pub mod config;
pub mod http;
pub mod hub;
pub mod jobs;
mod memory;
pub mod storage;
pub mod store;
pub mod types;
pub mod worker;
