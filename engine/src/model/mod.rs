//! The frozen base model.

pub mod weights;
