//! Which devices of this machine trainings run on, asked of a process of its own: the server never opens a GPU's driver, which could
//! hold memory of the card, or take the server down with it.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::process::Command;

use super::launcher::{THIS_PROGRAM, describe, passed_on};
use crate::config::{Config, Devices};
use crate::types::device::{Device, FoundDevices};

/// How long a driver may take to wake its cards: seconds each, where nothing keeps them awake.
const PATIENCE: Duration = Duration::from_secs(120);

/// What trainings run on, those with most memory first. Where `workers.devices` is `auto`, a driver that cannot be asked means the CPU.
///
/// # Errors
/// A GPU that the configuration names and that is not there, a driver that cannot be asked about it.
pub async fn training_devices(config: &Config) -> anyhow::Result<Vec<Device>> {
    let setting = &config.workers.devices;
    if *setting == Devices::Cpu {
        tracing::info!("trainings run on the CPU, as workers.devices says");
        return Ok(vec![Device::Cpu]);
    }
    let found = match find().await {
        Ok(found) => found,
        Err(error) if *setting == Devices::Auto => {
            tracing::warn!("trainings run on the CPU, GPUs cannot be looked for: {error:#}");
            return Ok(vec![Device::Cpu]);
        }
        Err(error) => return Err(error.context("cannot look for the GPUs of workers.devices")),
    };
    let chosen = setting.choose(&found)?;
    for found in found.gpus().filter(|found| chosen.contains(&found.device)) {
        let gib = found.memory_bytes as f64 / f64::from(1 << 30);
        tracing::info!(device = %found.device, model = found.model, "trainings run on a GPU of {gib:.1} GiB");
    }
    if chosen == [Device::Cpu] {
        let reason = found.no_gpu.unwrap_or_default();
        tracing::info!(reason, "trainings run on the CPU");
    }
    Ok(chosen)
}

/// Asks `lorad devices`, with the environment that workers have, so that both count the same cards.
async fn find() -> anyhow::Result<FoundDevices> {
    let mut command = Command::new(THIS_PROGRAM);
    command.args(["devices", "--json"]).env_clear().envs(passed_on());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.with_context(|| format!("no answer for {} s", PATIENCE.as_secs()))?;
    let output = output.context("cannot start a process")?;
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "it ended with {}: {}", describe(output.status), log.trim());
    serde_json::from_slice(&output.stdout).context("its answer is not understood")
}
