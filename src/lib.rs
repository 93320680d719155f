//! The LoRA daemon.
