//! The LoRA daemon.

pub mod config;
pub mod storage;
