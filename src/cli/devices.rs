//! `lorad devices`: what trainings may run on here.

use std::io::Write;
use std::str::FromStr;

use anyhow::{Context, anyhow};
use clap::Args;
use lorad_engine::device::{CudaDevice, cuda_device, cuda_devices};
use lorad_engine::train::HostMemory;

use super::terminal::in_line;
use crate::types::device::{Device, FoundDevice, FoundDevices};

/// Lists what trainings may run on: GPUs and the CPU, one a line, with their memory.
///
/// The names are those of `workers.devices` and of `lorad train --device`. GPUs are counted as CUDA counts them, so CUDA_VISIBLE_DEVICES and
/// CUDA_DEVICE_ORDER change which ones there are and their numbers. Why there is none is told on stderr.
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print one JSON object: {"devices": [{"device", "model", "memory_bytes"}], "no_gpu": why there is none, or null}
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Memory figures that cannot be read, an output that cannot be written.
pub fn run(args: &DevicesArgs) -> anyhow::Result<()> {
    let found = find()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&found)?)?;
        return Ok(());
    }
    for FoundDevice { device, model, memory_bytes } in &found.devices {
        let gib = *memory_bytes as f64 / f64::from(1 << 30);
        writeln!(out, "{:<8}{gib:>8.1} GiB  {}", device.to_string(), in_line(model))?;
    }
    if let Some(reason) = &found.no_gpu {
        eprintln!("no GPU: {reason}");
    }
    Ok(())
}

/// Looks for GPUs, and at the CPU.
fn find() -> anyhow::Result<FoundDevices> {
    let gpu = |found: CudaDevice| FoundDevice {
        device: Device::Cuda(found.ordinal),
        model: found.name,
        memory_bytes: found.total_bytes,
    };
    let (mut devices, no_gpu) = match gpus() {
        Ok(gpus) => (gpus.into_iter().map(gpu).collect::<Vec<_>>(), None),
        Err(reason) => (Vec::new(), Some(reason)),
    };
    let memory_bytes = HostMemory::now().context("cannot read this machine's memory")?.total_bytes;
    devices.push(FoundDevice { device: Device::Cpu, model: processor(), memory_bytes });
    Ok(FoundDevices { devices, no_gpu })
}

/// The GPUs, at least one, or why there is none.
pub(super) fn gpus() -> Result<Vec<CudaDevice>, String> {
    match cuda_devices() {
        Ok(gpus) if gpus.is_empty() => Err("the NVIDIA driver knows none".to_owned()),
        gpus => gpus,
    }
}

/// What the processor's maker calls it.
fn processor() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = told.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The device that a command line asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum WantedDevice {
    /// `auto`: the first GPU, the CPU where there is none.
    Auto,
    /// That one.
    This(Device),
}

impl FromStr for WantedDevice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "auto" { Ok(Self::Auto) } else { name.parse().map(Self::This) }
    }
}

impl WantedDevice {
    /// The device, which is there.
    pub(super) fn find(self) -> anyhow::Result<Device> {
        match self {
            Self::Auto => Ok(gpus().map_or(Device::Cpu, |gpus| Device::Cuda(gpus[0].ordinal))),
            Self::This(Device::Cpu) => Ok(Device::Cpu),
            Self::This(Device::Cuda(ordinal)) => {
                cuda_device(ordinal).map(|gpu| Device::Cuda(gpu.ordinal)).map_err(|reason| anyhow!(reason))
            }
        }
    }
}
