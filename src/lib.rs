//! The LoRA daemon.

pub mod config;
