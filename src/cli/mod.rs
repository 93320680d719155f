//! One file a command.

mod archive;
pub mod backup;
pub mod bench;
pub mod chat;
pub mod dataset;
pub mod devices;
pub mod export;
pub mod keys;
pub mod logits;
pub mod openapi;
pub mod serve;
pub mod terminal;
pub mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use clap::Args;
use nix::sys::stat::{Mode, umask};

use crate::config::{Config, Flags};
use crate::hub::Hub;

/// Which base model a command works on.
#[derive(Debug, Args)]
struct ModelArgs {
    /// Base model: a GGUF file, a name of the catalogue (smollm2-135m-instruct), hf:org/repo/file.gguf, local:file.gguf
    #[arg(long, value_name = "MODEL")]
    base: String,
    /// Folder of `local:` models [default: models.dir of lorad.toml]
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,
}

impl ModelArgs {
    /// The model's name and its file; downloads it where it is not on this machine.
    fn resolve(&self) -> anyhow::Result<(String, PathBuf)> {
        let path = Path::new(&self.base);
        if path.is_file() {
            return Ok((self.base.clone(), path.to_owned()));
        }
        let flags = Flags { models_dir: self.models_dir.clone(), ..Flags::default() };
        let hub = Hub::from_config(&Config::load(&flags)?);
        let model = hub.fetch(&self.base).with_context(|| format!("`{}` is no file here", self.base))?;
        Ok((self.base.clone(), model.path))
    }
}

/// From here on every file and folder that this process makes is its user's alone, also where the folder that it is in is not.
fn keep_private() {
    umask(Mode::from_bits_truncate(0o077));
}

/// Reads a value by the name that it has in the HTTP API.
fn named<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

/// A flag that the first Ctrl-C raises, with a message; the second one ends the process.
fn stop_on_ctrl_c(message: &'static str) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("{message}");
            }
        });
    })?;
    Ok(stop)
}
