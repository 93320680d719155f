//! The LoRA daemon.

pub mod config;
pub mod hub;
pub mod storage;
