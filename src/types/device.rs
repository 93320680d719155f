//! The devices of a machine, as `lorad devices --json` prints them and the server reads them.

pub use lorad_engine::device::Device;
use serde::{Deserialize, Serialize};

/// A device that trainings may run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDevice {
    /// Its name, `cuda:0` for one.
    pub device: Device,
    /// What its maker calls it.
    pub model: String,
    /// Bytes of its memory, free or not.
    pub memory_bytes: u64,
}

/// What there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDevices {
    /// GPUs in CUDA's order, then the CPU.
    pub devices: Vec<FoundDevice>,
    /// Why there is no GPU, where there is none.
    pub no_gpu: Option<String>,
}

impl FoundDevices {
    /// The GPUs, in CUDA's order.
    pub fn gpus(&self) -> impl Iterator<Item = &FoundDevice> {
        self.devices.iter().filter(|found| found.device != Device::Cpu)
    }
}
