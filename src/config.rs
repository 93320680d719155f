//! The server's configuration: defaults ⊕ `lorad.toml` ⊕ `LORAD__SECTION__KEY` ⊕ flags, the later winning.
//!
//! A key that nobody knows is an error that names it, wherever it was written: a typo must not run a server with other
//! settings than those that its owner believes in.

mod devices;
mod storage;

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Deserializer};

pub use devices::Devices;
pub use storage::{Bucket, Location, Retention, Storage, check_endpoint};

/// File that is read where no `--config` is given and it is there.
pub const DEFAULT_FILE: &str = "lorad.toml";

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file named by `--config` is not there.
    #[error("configuration file {} does not exist", .0.display())]
    MissingFile(PathBuf),
    /// A source does not parse, a key is unknown, or a value is of the wrong kind.
    #[error("invalid configuration: {0}")]
    Invalid(String),
    /// A value is of the right kind and cannot be used.
    #[error("invalid configuration: {key} {right}, got `{value}`")]
    Value {
        /// The key, `workers.lease_seconds` for one.
        key: &'static str,
        /// What would be right.
        right: Cow<'static, str>,
        /// What is there.
        value: String,
    },
}

/// What the command line says; it wins over every other source.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// The file to read instead of [`DEFAULT_FILE`].
    pub config: Option<PathBuf>,
    /// `server.data_dir`.
    pub data_dir: Option<PathBuf>,
    /// `server.listen`.
    pub listen: Option<String>,
    /// `models.dir`.
    pub models_dir: Option<PathBuf>,
}

/// The whole configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The public listener and where the server keeps its things.
    pub server: Server,
    /// SQLite.
    pub database: Database,
    /// Object storage.
    pub storage: Storage,
    /// How long things are kept.
    pub retention: Retention,
    /// Who may call.
    pub auth: Auth,
    /// Worker processes.
    pub workers: Workers,
    /// Base models.
    pub models: Models,
    /// How much at once.
    pub limits: Limits,
}

/// The public listener and where the server keeps its things.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address of the public API. Default `127.0.0.1:8080`; port 0 takes a free one, which the log names.
    pub listen: SocketAddr,
    /// Folder of the database, objects, logs and the workers' socket. Default `$XDG_DATA_HOME/lorad`, `~/.local/share/lorad`.
    pub data_dir: PathBuf,
    /// Largest file that may be uploaded, in bytes. Default 8 GiB.
    pub max_upload_bytes: u64,
    /// Seconds that a client may take for a request's headers, or keep silent within its body. Default 60.
    pub idle_seconds: u32,
}

/// SQLite.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// The database file. Default `lorad.db` in the data folder.
    pub path: Option<PathBuf>,
}

/// Who may call.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// The API key that callers must send. Without one the server answers on loopback only, and to anybody there.
    #[serde(deserialize_with = "secret")]
    pub bootstrap_key: Option<SecretString>,
}

/// Worker processes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Workers {
    /// What to train on: `auto` (every GPU, the CPU only where there is none), `cpu`, or GPUs as `cuda:0,1`. Default auto.
    pub devices: Devices,
    /// TCP address of the listener that workers call; without one it is a Unix socket in the data folder.
    pub listen: Option<SocketAddr>,
    /// Seconds that an attempt lives on without a heartbeat. Default 30.
    pub lease_seconds: u32,
    /// Seconds without progress after which a worker that is alive is killed. Default 3600.
    pub stall_seconds: u32,
    /// Seconds between the checkpoints that are kept only for resuming. Default 60.
    pub checkpoint_seconds: u32,
    /// Seconds that a training may take to end its step and save, when its job is paused or the server ends. Default 60.
    pub pause_seconds: u32,
    /// Bytes of memory that a training may have; a job that cannot do with it fails when it is validated. 0: all that this
    /// machine has. Default 0.
    pub memory_bytes: u64,
    /// Threads of a worker's arithmetic; 0: one per processor. Default 0.
    pub threads: u32,
    /// The program that is started as a worker. Default: this one.
    pub executable: Option<PathBuf>,
}

/// Base models.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Models {
    /// Folder that `local:` names are in. Default `models` in the data folder.
    pub dir: Option<PathBuf>,
    /// Folder of downloaded models. Default `$XDG_CACHE_HOME/lorad`, `~/.cache/lorad`.
    pub cache_dir: Option<PathBuf>,
}

/// How much at once.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Data sets validated at once, beside a running training. Default 2.
    pub validations: u32,
    /// Reports, previews and estimates answered at once, beside everything else. Default 2.
    pub inspections: u32,
    /// Seconds that one of them may take. Default 300.
    pub inspection_seconds: u32,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            data_dir: user_folder("XDG_DATA_HOME", ".local/share").join("lorad"),
            max_upload_bytes: 8 << 30,
            idle_seconds: 60,
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            devices: Devices::Auto,
            listen: None,
            lease_seconds: 30,
            stall_seconds: 3600,
            checkpoint_seconds: 60,
            pause_seconds: 60,
            memory_bytes: 0,
            threads: 0,
            executable: None,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { validations: 2, inspections: 2, inspection_seconds: 300 }
    }
}

impl Config {
    /// Reads all sources: the file, this process's environment, the flags.
    ///
    /// # Errors
    /// A file that is named and not there, a source that does not parse, an unknown key, a value that cannot be used.
    pub fn load(flags: &Flags) -> Result<Self, Error> {
        // Names and values that are not Unicode cannot be ours.
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self::load_from(flags, environment)
    }

    fn load_from(flags: &Flags, environment: HashMap<String, String>) -> Result<Self, Error> {
        let mut builder = config::Config::builder();
        let file = flags.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
        if file.is_file() {
            builder = builder.add_source(config::File::from(file).format(config::FileFormat::Toml));
        } else if flags.config.is_some() {
            return Err(Error::MissingFile(file.to_owned()));
        }
        // Values stay text until their field asks for a number: a key of digits keeps its zeros.
        let environment =
            config::Environment::with_prefix("LORAD").separator("__").source(Some(environment.into_iter().collect()));
        builder = builder.add_source(environment);
        for (key, value) in [
            ("server.data_dir", flags.data_dir.as_deref().map(Path::to_string_lossy)),
            ("server.listen", flags.listen.as_deref().map(Into::into)),
            ("models.dir", flags.models_dir.as_deref().map(Path::to_string_lossy)),
        ] {
            builder = builder.set_override_option(key, value.map(String::from)).map_err(invalid)?;
        }
        let merged = builder.build().map_err(invalid)?;
        let config: Self = serde_path_to_error::deserialize(merged).map_err(|error| {
            let path = error.path().to_string();
            Error::Invalid(format!("{path}: {}", error.into_inner()))
        })?;
        config.check()?;
        Ok(config)
    }

    /// What one field alone cannot tell.
    fn check(&self) -> Result<(), Error> {
        let workers = &self.workers;
        for (key, value, right, fine) in [
            ("server.idle_seconds", self.server.idle_seconds, "must be from 1 to 3600", 1..=3600),
            ("workers.lease_seconds", workers.lease_seconds, "must be from 2 to 3600", 2..=3600),
            ("workers.stall_seconds", workers.stall_seconds, "must be from 10 to 604800", 10..=604_800),
            ("workers.checkpoint_seconds", workers.checkpoint_seconds, "must be from 1 to 86400", 1..=86_400),
            ("workers.pause_seconds", workers.pause_seconds, "must be from 1 to 3600", 1..=3600),
            ("workers.threads", workers.threads, "must be from 0 to 1024", 0..=1024),
            ("limits.validations", self.limits.validations, "must be from 1 to 64", 1..=64),
            ("limits.inspections", self.limits.inspections, "must be from 1 to 64", 1..=64),
            ("limits.inspection_seconds", self.limits.inspection_seconds, "must be from 1 to 86400", 1..=86_400),
        ] {
            if !fine.contains(&value) {
                return Err(Error::Value { key, right: right.into(), value: value.to_string() });
            }
        }
        self.storage.check(&self.storage_location()?)?;
        self.retention.check()
    }

    /// The database file.
    pub fn database_path(&self) -> PathBuf {
        self.database.path.clone().unwrap_or_else(|| self.server.data_dir.join("lorad.db"))
    }

    /// Where objects are kept.
    ///
    /// # Errors
    /// A `storage.url` of no known kind.
    pub fn storage_location(&self) -> Result<Location, Error> {
        let folder = || Ok(Location::File(self.server.data_dir.join("objects")));
        self.storage.url.as_deref().map_or_else(folder, Location::parse)
    }

    /// How long a client may keep the server waiting within a request.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(u64::from(self.server.idle_seconds))
    }

    /// Folder that `local:` names are in.
    pub fn models_dir(&self) -> PathBuf {
        self.models.dir.clone().unwrap_or_else(|| self.server.data_dir.join("models"))
    }

    /// Folder of downloaded models.
    pub fn cache_dir(&self) -> PathBuf {
        let default = || user_folder("XDG_CACHE_HOME", ".cache").join("lorad");
        self.models.cache_dir.clone().unwrap_or_else(default)
    }

    /// Folder of the workers' logs.
    pub fn logs_dir(&self) -> PathBuf {
        self.server.data_dir.join("logs")
    }

    /// Folder in which each attempt has a folder of its own while it runs.
    pub fn scratch_dir(&self) -> PathBuf {
        self.server.data_dir.join("scratch")
    }
}

impl Workers {
    /// How long an attempt lives on without a heartbeat.
    pub fn lease(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_seconds))
    }

    /// How long a worker that is alive may make no progress.
    pub fn stall(&self) -> Duration {
        Duration::from_secs(u64::from(self.stall_seconds))
    }

    /// How long a training may take to end its step and save.
    pub fn pause(&self) -> Duration {
        Duration::from_secs(u64::from(self.pause_seconds))
    }
}

fn invalid(error: config::ConfigError) -> Error {
    Error::Invalid(error.to_string())
}

/// A folder of the user's as the XDG rules find it.
fn user_folder(variable: &str, below_home: &str) -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable)
        .or_else(|| Some(absolute("HOME")?.join(below_home)))
        .unwrap_or_else(|| std::env::temp_dir().join("lorad-home").join(below_home))
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    let key = Option::<String>::deserialize(deserializer)?;
    match key {
        Some(key) if key.is_empty() => Err(serde::de::Error::custom("an empty key would let everybody in")),
        key => Ok(key.map(SecretString::from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, Error> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("lorad.toml");
        std::fs::write(&file, toml).expect("a writable folder");
        let environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Config::load_from(&Flags { config: Some(file), ..flags }, environment)
    }

    #[test]
    fn a_later_source_wins() {
        let toml = "[server]\nlisten = \"127.0.0.1:1\"\nmax_upload_bytes = 10\n[workers]\nlease_seconds = 5\n";
        let environment = [
            ("LORAD__SERVER__LISTEN", "127.0.0.1:2"),
            ("LORAD__WORKERS__LEASE_SECONDS", "6"),
            ("LORAD__AUTH__BOOTSTRAP_KEY", "0012"),
            ("PATH", "/bin"),
        ];
        let flags = Flags { listen: Some("127.0.0.1:3".into()), data_dir: Some("/d".into()), ..Flags::default() };
        let config = load(toml, &environment, flags).expect("a good configuration");
        assert_eq!(config.server.listen, SocketAddr::from(([127, 0, 0, 1], 3)));
        assert_eq!((config.server.max_upload_bytes, config.workers.lease_seconds), (10, 6));
        assert_eq!(config.auth.bootstrap_key.as_ref().map(ExposeSecret::expose_secret), Some("0012"));
        assert_eq!(config.storage_location().expect("a location"), Location::File("/d/objects".into()));
        assert_eq!(config.database_path(), Path::new("/d/lorad.db"));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        type Case = (&'static str, &'static [(&'static str, &'static str)], &'static [&'static str]);
        let cases: [Case; 13] = [
            ("[server]\nlisen = \"127.0.0.1:1\"\n", &[], &["server", "lisen"]),
            ("[servers]\n", &[], &["servers"]),
            ("", &[("LORAD__WORKERS__LEASE", "5")], &["workers", "lease"]),
            ("", &[("LORAD__LISTEN", "5")], &["listen"]),
            ("[workers]\nlease_seconds = \"soon\"\n", &[], &["workers.lease_seconds", "soon"]),
            ("[workers]\nlease_seconds = 0\n", &[], &["workers.lease_seconds", "`0`"]),
            ("[workers]\ndevices = \"gpu\"\n", &[], &["workers.devices", "`cuda:0,1`", "`gpu`"]),
            ("", &[("LORAD__WORKERS__DEVICES", "cuda:1,1")], &["workers.devices", "once", "`cuda:1,1`"]),
            ("[auth]\nbootstrap_key = \"\"\n", &[], &["auth.bootstrap_key", "empty"]),
            ("", &[("LORAD__STORAGE__URL", "ftp://a")], &["storage.url", "`ftp://a`"]),
            ("[storage]\nurl = \"file:a\"\nregion = \"b\"\n", &[], &["storage.region", "s3://", "`b`"]),
            ("", &[("LORAD__RETENTION__FILES_DAYS", "0")], &["retention.files_days", "`0`"]),
            ("[server\n", &[], &["lorad.toml"]),
        ];
        for (toml, environment, words) in cases {
            let error = load(toml, environment, Flags::default()).expect_err(toml).to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let flags = Flags { config: Some("/nowhere/lorad.toml".into()), ..Flags::default() };
        let error = Config::load_from(&flags, HashMap::new()).expect_err("no such file").to_string();
        assert!(error.contains("/nowhere/lorad.toml"), "{error}");
    }
}
