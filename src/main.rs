//! The command line: one role a command, each with its one `run`.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lorad::LOG_FORMAT;
use lorad::{cli, worker};
use tracing_subscriber::EnvFilter;

/// The LoRA daemon: a self-hosted fine-tuning server with OpenAI's API.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    Serve(cli::serve::Options),
    /// Works off one task of a server; the server starts it
    #[command(hide = true)]
    Worker(worker::Options),
    /// Answers one question about a data set; the server starts it
    #[command(hide = true)]
    Inspect(worker::inspect::Options),
    Train(Box<cli::train::TrainArgs>),
    Keys(cli::keys::KeysCommand),
    Backup(cli::backup::BackupArgs),
    Restore(cli::backup::RestoreArgs),
    Dataset(cli::dataset::DatasetCommand),
    Devices(cli::devices::DevicesArgs),
    Bench(cli::bench::BenchCommand),
    Chat(cli::chat::ChatArgs),
    Export(cli::export::ExportArgs),
    #[command(hide = true)]
    Logits(cli::logits::LogitsArgs),
    /// Prints the API's OpenAPI specification as YAML
    Openapi,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start_log().and_then(|()| run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lorad: {}", cli::terminal::printable(&in_one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.role {
        Role::Serve(options) => cli::serve::run(options),
        Role::Worker(options) => worker::run(options),
        Role::Inspect(options) => worker::inspect::run(options),
        Role::Train(args) => cli::train::run(&args),
        Role::Backup(args) => cli::backup::back_up(args),
        Role::Restore(args) => cli::backup::restore(args),
        Role::Keys(command) => cli::keys::run(command),
        Role::Bench(command) => cli::bench::run(&command),
        Role::Devices(args) => cli::devices::run(&args),
        Role::Dataset(command) => cli::dataset::run(&command),
        Role::Chat(args) => cli::chat::run(&args),
        Role::Export(args) => cli::export::run(&args),
        Role::Logits(args) => cli::logits::run(&args),
        Role::Openapi => cli::openapi::run(),
    }
}

/// An error and its causes; a cause that the text before it has told already is left out.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            line.push_str(if line.is_empty() { "" } else { ": " });
            line.push_str(&cause);
        }
    }
    line
}

/// The log goes to stderr. `RUST_LOG` filters it, `info` unless said otherwise; `LORAD_LOG_FORMAT` is `text` or `json`, which is one object
/// a line with its spans.
fn start_log() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let is_terminal = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match std::env::var_os(LOG_FORMAT) {
        None => log.with_ansi(is_terminal).init(),
        Some(format) if format == "text" => log.with_ansi(is_terminal).init(),
        Some(format) if format == "json" => log.json().init(),
        Some(format) => anyhow::bail!("{LOG_FORMAT} must be text or json, got `{}`", format.display()),
    }
    Ok(())
}
