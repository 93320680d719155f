//! `lorad keys`: make, list and revoke the API keys of a server, which may run or not.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use secrecy::ExposeSecret;
use serde_json::json;

use super::serve::private_folder;
use super::terminal::in_line;
use super::{keep_private, named};
use crate::config::{Config, Flags};
use crate::jobs::keys::{NewKey, create_key, revoke_key};
use crate::store::{self, Store};
use crate::types::DEFAULT_OWNER;
use crate::types::api_key::{ApiKey, Scope, check_name, check_owner};
use crate::types::ids::KeyId;

/// Makes, lists and revokes API keys.
///
/// Works on the database of the data folder, beside a server that runs or before the first start. From the first key on every
/// request needs one. A key reaches what its owner has: files, uploads, jobs, artifacts, models; to others it does not exist.
#[derive(Debug, Args)]
pub struct KeysCommand {
    #[command(subcommand)]
    action: Action,
    /// Configuration file in TOML [default: lorad.toml in the current folder, where there is one]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// The server's data folder [default: ~/.local/share/lorad]
    #[arg(long, value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Makes a key and prints it, this once: the server keeps its hash
    Create(CreateArgs),
    /// Lists every key that was ever made
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Refuses a key from now on, also in a server that runs
    Revoke {
        /// The key's id, as `lorad keys list` shows it
        id: KeyId,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// What to call it
    #[arg(long, value_parser = check_name)]
    name: String,
    /// Whose files, jobs, artifacts and models it reaches
    #[arg(long, default_value = DEFAULT_OWNER, value_parser = check_owner)]
    owner: String,
    /// What it is good for: read (look and download), write (everything)
    #[arg(long, default_value = "write", value_parser = named::<Scope>)]
    scope: Scope,
}

/// Runs the command.
///
/// # Errors
/// A configuration or database that cannot be used, a key that does not exist.
pub fn run(command: KeysCommand) -> anyhow::Result<()> {
    let KeysCommand { action, config, data_dir } = command;
    let config = Config::load(&Flags { config, data_dir, ..Flags::default() })?;
    keep_private();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the async runtime")?.block_on(async {
        let store = open(&config, matches!(action, Action::Create(_))).await?;
        let done = perform(action, &store).await;
        store.close().await;
        done
    })
}

/// Opens the server's database; only who makes a key makes one that is not there yet.
async fn open(config: &Config, create: bool) -> anyhow::Result<Store> {
    let path = config.database_path();
    let opened = if path.exists() {
        Store::open_as_it_is(&path).await
    } else if create {
        private_folder(&config.server.data_dir)?;
        Store::open(&path).await
    } else {
        bail!("there is no database {}: name the server's --data-dir or --config", path.display());
    };
    opened.with_context(|| format!("cannot open the database {}", path.display()))
}

async fn perform(action: Action, store: &Store) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match action {
        Action::Create(CreateArgs { name, owner, scope }) => {
            let (key, secret) = create_key(store, NewKey { name, owner, scope }).await?;
            eprintln!("key {} of owner {}, scope {}; it is not shown again:", key.id, key.owner, key.scope);
            writeln!(out, "{}", secret.expose_secret())?;
        }
        Action::List { json } => {
            let keys = store::api_key::list(&mut *store.read().await?).await?;
            write_list(&mut out, &keys, json)?;
        }
        Action::Revoke { id } => {
            if !revoke_key(store, id).await? {
                bail!("there is no key `{id}`");
            }
            eprintln!("key {id} is refused from now on");
        }
    }
    Ok(())
}

fn write_list(out: &mut impl Write, keys: &[ApiKey], as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let rows = keys.iter().map(|key| {
            json!({
                "id": key.id, "name": key.name, "owner": key.owner, "scope": key.scope, "hint": key.hint,
                "created_at": key.created_at_ms / 1000, "revoked_at": key.revoked_at_ms.map(|at| at / 1000),
            })
        });
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?)?);
    }
    for ApiKey { id, name, owner, scope, hint, revoked_at_ms, .. } in keys {
        let state = if revoked_at_ms.is_some() { "revoked" } else { "active" };
        writeln!(out, "{id}  …{hint}  {state:<7}  {scope:<5}  {owner}  {}", in_line(name))?;
    }
    Ok(())
}
