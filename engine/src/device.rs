//! What a training runs on, by its name: `cpu`, or `cuda:0` for the first GPU; and which GPUs there are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a training runs on. In JSON it is its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Device {
    /// The processors of this machine.
    #[default]
    Cpu,
    /// The NVIDIA GPU of that number, as CUDA counts those that `CUDA_VISIBLE_DEVICES` leaves.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(ordinal) => write!(formatter, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        // Only what `Display` writes: a device has one spelling, also in a database.
        let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        [Some(Self::Cpu), ordinal.map(Self::Cuda)]
            .into_iter()
            .flatten()
            .find(|device| device.to_string() == name)
            .ok_or_else(|| format!("a device is `cpu` or a GPU like `cuda:0`, got `{name}`"))
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaDevice {
    /// Its number, as in `cuda:0`: as CUDA counts those that `CUDA_VISIBLE_DEVICES` leaves.
    pub ordinal: usize,
    /// The maker's name.
    pub name: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Compute capability, 9.0 for one as (9, 0).
    pub compute_capability: (i32, i32),
}

pub use crate::ops::cuda::devices as cuda_devices;

/// The GPU of that number, or which there are instead.
pub fn cuda_device(ordinal: usize) -> Result<CudaDevice, String> {
    let asked = Device::Cuda(ordinal);
    let gpus = cuda_devices().map_err(|reason| format!("there is no `{asked}`: {reason}"))?;
    let name = |gpu: &CudaDevice| format!("{} ({})", Device::Cuda(gpu.ordinal), gpu.name);
    let there = gpus.iter().map(name).collect::<Vec<_>>().join(", ");
    gpus.into_iter().find(|gpu| gpu.ordinal == ordinal).ok_or_else(|| match there.as_str() {
        "" => format!("there is no `{asked}`: the NVIDIA driver knows no GPU"),
        there => format!("there is no `{asked}`, there is {there}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_one_name() {
        for (name, device) in [("cpu", Device::Cpu), ("cuda:0", Device::Cuda(0)), ("cuda:12", Device::Cuda(12))] {
            assert_eq!((name.parse(), device.to_string()), (Ok(device), name.to_owned()));
            assert_eq!(serde_json::to_value(device).unwrap(), name);
            assert_eq!(serde_json::from_value::<Device>(name.into()).unwrap(), device);
        }
        for name in ["", "CPU", "gpu", "cuda", "cuda:", "cuda:01", "cuda:+1", "cuda:-1", "cuda:0,1", " cpu", "cuda:0x1"]
        {
            let error = name.parse::<Device>().unwrap_err();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
