//! `workers.devices`: what trainings run on.

use std::str::FromStr;

use serde::Deserialize;

use super::Error;
use crate::types::device::{Device, FoundDevice, FoundDevices};

/// The setting, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub enum Devices {
    /// `auto`: every GPU, and the CPU only where there is none.
    #[default]
    Auto,
    /// `cpu`.
    Cpu,
    /// `cuda:0,1` for one: GPUs by their numbers, each once.
    Cuda(Vec<usize>),
}

impl FromStr for Devices {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("must be `auto`, `cpu`, or GPUs by their numbers (`cuda:0`, `cuda:0,1`), got `{text}`");
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            _ => (),
        }
        let mut ordinals = Vec::new();
        for number in text.strip_prefix("cuda:").ok_or_else(wrong)?.split(',') {
            let Ok(Device::Cuda(ordinal)) = format!("cuda:{number}").parse() else { return Err(wrong()) };
            if ordinals.contains(&ordinal) {
                return Err(format!("must name each GPU once, got `{text}`"));
            }
            ordinals.push(ordinal);
        }
        Ok(Self::Cuda(ordinals))
    }
}

impl TryFrom<String> for Devices {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Devices {
    /// What trainings run on, of what there is: at least one device, those with most memory first.
    ///
    /// # Errors
    /// A GPU that is named and not there; the message names those that are.
    pub fn choose(&self, found: &FoundDevices) -> Result<Vec<Device>, Error> {
        let mut chosen: Vec<&FoundDevice> = match self {
            Self::Cpu => Vec::new(),
            Self::Auto => found.gpus().collect(),
            Self::Cuda(ordinals) => {
                let of = |ordinal: &usize| {
                    let device = Device::Cuda(*ordinal);
                    found.gpus().find(|found| found.device == device).ok_or_else(|| missing(device, found))
                };
                ordinals.iter().map(of).collect::<Result<_, _>>()?
            }
        };
        // Stable: cards of one size stay in the order in which they were named.
        chosen.sort_by_key(|found| std::cmp::Reverse(found.memory_bytes));
        let chosen: Vec<Device> = chosen.into_iter().map(|found| found.device).collect();
        Ok(if chosen.is_empty() { vec![Device::Cpu] } else { chosen })
    }
}

fn missing(device: Device, found: &FoundDevices) -> Error {
    let there: Vec<String> = found.gpus().map(|found| format!("{} ({})", found.device, found.model)).collect();
    let right = match &found.no_gpu {
        Some(reason) => format!("cannot name a GPU, {reason}"),
        None => format!("must name GPUs of this machine: {}", there.join(", ")),
    };
    Error::Value { key: "workers.devices", right: right.into(), value: device.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(gpu_gigabytes: &[u64]) -> FoundDevices {
        let gpu = |(ordinal, gigabytes): (usize, &u64)| FoundDevice {
            device: Device::Cuda(ordinal),
            model: format!("Card {ordinal}"),
            memory_bytes: gigabytes << 30,
        };
        let cpu = FoundDevice { device: Device::Cpu, model: "Processor".to_owned(), memory_bytes: 1 << 40 };
        let devices = gpu_gigabytes.iter().enumerate().map(gpu).chain([cpu]).collect();
        FoundDevices { devices, no_gpu: gpu_gigabytes.is_empty().then(|| "there is no driver".to_owned()) }
    }

    fn chosen(setting: &str, gpu_gigabytes: &[u64]) -> Result<Vec<String>, String> {
        let setting: Devices = setting.parse()?;
        let chosen = setting.choose(&machine(gpu_gigabytes)).map_err(|error| error.to_string())?;
        Ok(chosen.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn auto_is_every_gpu_and_the_cpu_only_where_there_is_none() {
        for (setting, gpus, devices) in [
            ("auto", &[][..], &["cpu"][..]),
            ("auto", &[80], &["cuda:0"]),
            ("auto", &[80, 80, 80], &["cuda:0", "cuda:1", "cuda:2"]),
            ("auto", &[24, 80, 24], &["cuda:1", "cuda:0", "cuda:2"]),
            ("cpu", &[80, 80], &["cpu"]),
            ("cuda:1", &[80, 80], &["cuda:1"]),
            ("cuda:2,0", &[80, 80, 80], &["cuda:2", "cuda:0"]),
        ] {
            let devices = devices.iter().map(|device| (*device).to_owned()).collect();
            assert_eq!(chosen(setting, gpus), Ok(devices), "{setting}");
        }
    }

    #[test]
    fn what_is_no_device_here_is_named_with_what_is_there() {
        for (setting, gpus, words) in [
            ("gpu", &[80][..], &["`cuda:0,1`", "`gpu`"][..]),
            ("", &[80], &["`auto`", "``"]),
            ("cuda", &[80], &["`cuda`"]),
            ("cuda:0,", &[80], &["`cuda:0,`"]),
            ("cuda:0,cpu", &[80], &["`cuda:0,cpu`"]),
            ("cuda:0, 1", &[80, 80], &["`cuda:0, 1`"]),
            ("cuda:1,0,1", &[80, 80], &["once", "`cuda:1,0,1`"]),
            ("cuda:0,2", &[80, 80], &["workers.devices", "cuda:0 (Card 0), cuda:1 (Card 1)", "`cuda:2`"]),
            ("cuda:0", &[], &["workers.devices", "there is no driver", "`cuda:0`"]),
        ] {
            let error = chosen(setting, gpus).expect_err(setting);
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
