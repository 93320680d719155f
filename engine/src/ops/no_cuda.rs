//! What stands in the place of `cuda` in a build without the feature: no GPU is there.

use std::sync::Arc;

use crate::adapter::LoraLayout;
use crate::bench::BenchSpec;
use crate::data::MicroBatch;
use crate::device::{CudaDevice, Device};
use crate::model::{Llama, MicroStep, Shape};
use crate::ops::adamw::Update;
use crate::ops::adamw_8bit::Moments as EightBitMoments;
use crate::ops::cross_entropy::Loss;
use crate::ops::matmul::Compute;
use crate::spec::TrainSpec;
use crate::{Error, Result};

const WITHOUT: &str = "this build is without the feature `cuda`";

/// Every GPU that this build can use, or why there is none.
pub fn devices() -> Result<Vec<CudaDevice>, String> {
    Err(WITHOUT.to_owned())
}

/// Times a training: not here.
pub(crate) fn bench_train(_: &BenchSpec) -> Result<serde_json::Value> {
    Err(Error::Device(WITHOUT.to_owned()))
}

/// Times kernels: there are none.
pub(crate) fn bench_ops(_: Device) -> Result<Vec<serde_json::Value>> {
    Err(Error::Device(WITHOUT.to_owned()))
}

/// What a run asks for: nothing that could be had.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) tokens: usize,
    pub(crate) kept_layers: Option<usize>,
}

impl Setup {
    pub(crate) fn of(_: &TrainSpec, _: &Arc<LoraLayout>, _: Compute, _: Option<u64>) -> Self {
        Self { tokens: 0, kept_layers: None }
    }
}

/// As in `cuda`.
pub(crate) fn check(_: &Shape) -> Result<()> {
    Ok(())
}

/// Most bytes of a GPU's memory that a run takes: no build without CUDA finds a GPU to ask this of.
pub(crate) fn peak_bytes(_: &Llama, _: &Setup, _: usize) -> u64 {
    0
}

/// Bytes that a run may take on that GPU: it is not there.
pub(crate) fn free_bytes(_: usize) -> Result<u64> {
    Err(Error::Device(WITHOUT.to_owned()))
}

/// As in `cuda`.
pub(crate) fn kept_layers_within(_: &Llama, _: &Setup, _: u64) -> Option<usize> {
    None
}

/// As in `cuda`.
pub(crate) fn resident_bytes_within(_: &Llama, _: &Setup, _: usize, _: u64) -> u64 {
    0
}

/// Moments on the host.
#[derive(Debug)]
#[expect(dead_code, reason = "no GPU reads them")]
pub(crate) enum HostMoments<'a> {
    F32(&'a mut [f32]),
    EightBit(&'a mut EightBitMoments),
}

/// A run on a GPU: there is none.
#[derive(Debug)]
pub(crate) enum Trainer {}

impl Trainer {
    pub(crate) fn new(ordinal: usize, _: &Llama, setup: &Setup) -> Result<Self> {
        let Setup { tokens, kept_layers } = setup;
        tracing::debug!(ordinal, tokens, kept_layers, "a GPU was asked for");
        Err(Error::Device(WITHOUT.to_owned()))
    }

    pub(crate) fn kept_layers(&self) -> usize {
        match *self {}
    }

    pub(crate) fn write_parameters(&mut self, _: &[f32]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn read_parameters(&self, _: &mut [f32]) -> Result<()> {
        match *self {}
    }

    pub(crate) fn write_moments(&mut self, moments: &HostMoments<'_>) -> Result<()> {
        let _ = moments;
        match *self {}
    }

    pub(crate) fn read_moments(&self, moments: HostMoments<'_>) -> Result<()> {
        match (self, moments) {
            (this, HostMoments::F32(_)) => match *this {},
            (this, HostMoments::EightBit(_)) => match *this {},
        }
    }

    pub(crate) fn clear_gradient(&mut self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn forward_backward(&mut self, _: &MicroBatch, _: MicroStep) -> Result<()> {
        match *self {}
    }

    pub(crate) fn evaluate(&mut self, _: &MicroBatch) -> Result<()> {
        match *self {}
    }

    pub(crate) fn take_loss(&mut self) -> Result<Loss> {
        match *self {}
    }

    pub(crate) fn gradient_norm(&self) -> Result<f64> {
        match *self {}
    }

    pub(crate) fn step(&mut self, _: Update) -> Result<()> {
        match *self {}
    }
}
