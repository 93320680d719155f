//! Base models: what a job's `model` names, and the file on this machine that it stands for.
//!
//! A name is an alias of the catalogue, `hf:org/repo/file.gguf` (a model hub), or `local:path` under `models.dir`. Finding is
//! split in two: [`Hub::locate`] looks at this machine only, [`Hub::fetch`] may download, and both block.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use hf_hub::progress::{Progress, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientBuilder, HFClientSync, HFError};
use reqwest::StatusCode;
use sha2::{Digest, Sha256};

use crate::config::Config;

/// Why a base model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No catalogue entry, repository or file has that name.
    #[error("the model `{name}` does not exist: {reason}")]
    NotFound {
        /// The model as the request named it.
        name: String,
        /// Where it was looked for, or what there is instead.
        reason: String,
    },
    /// The name can be read, and this version cannot train such a model.
    #[error("the model `{name}` is not supported: {reason}")]
    Unsupported {
        /// The model as the request named it.
        name: String,
        /// What would be right.
        reason: String,
    },
    /// The hub could not be reached, or broke off.
    #[error("the model `{name}` could not be downloaded: {source}")]
    Download {
        /// The model as the request named it.
        name: String,
        /// What the hub's client said.
        source: Box<HFError>,
    },
    /// The file is not the one that the catalogue pins.
    #[error("the file of model `{name}` has sha256 {found}, expected {expected}")]
    WrongHash {
        /// The model as the request named it.
        name: String,
        /// Hash of the file that is there.
        found: String,
        /// Hash in the catalogue.
        expected: &'static str,
    },
    /// The file cannot be read.
    #[error("the file of model `{name}` cannot be read: {source}")]
    Io {
        /// The model as the request named it.
        name: String,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the same request may succeed later: a network or a hub that fails now, not one that says no.
    pub fn may_pass(&self) -> bool {
        let Self::Download { source, .. } = self else { return false };
        let HFError::Http { context } = source.as_ref() else { return true };
        let status = context.status;
        !status.is_client_error() || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status)
    }
}

/// A model of the catalogue: a short name for one file of one revision of a repository.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The short name.
    pub alias: &'static str,
    /// Owner of the repository on the hub.
    pub owner: &'static str,
    /// The repository.
    pub repository: &'static str,
    /// Commit of the repository.
    pub revision: &'static str,
    /// File in the repository.
    pub file: &'static str,
    /// SHA-256 of the file.
    pub sha256: &'static str,
}

/// Every model with a short name.
pub const CATALOGUE: [Entry; 1] = [Entry {
    alias: "smollm2-135m-instruct",
    owner: "QuantFactory",
    repository: "SmolLM2-135M-Instruct-GGUF",
    revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// What the name of a base model says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A short name of the catalogue.
    Alias(&'static Entry),
    /// A file of a hub repository.
    Repository {
        /// Owner of the repository.
        owner: String,
        /// The repository.
        repository: String,
        /// File in it, `/` between folders.
        file: String,
    },
    /// A file under `models.dir`.
    Local(PathBuf),
}

/// A base model that is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseModel {
    /// The name that was asked for.
    pub name: String,
    /// Its file, without symlinks.
    pub path: PathBuf,
    /// Length of the file.
    pub size_bytes: u64,
    /// SHA-256 of the file, where the catalogue pins it (and it was checked).
    pub sha256: Option<String>,
}

/// A base model for the list of models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for it with.
    pub name: String,
    /// Unix seconds at which its file was last changed, 0 where it is not on this machine yet.
    pub created_at: i64,
}

/// Where models are looked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of `local:` names.
    pub models_dir: PathBuf,
    /// Folder of downloads.
    pub cache_dir: PathBuf,
    /// Address of the hub; `None`: `HF_ENDPOINT`, or the public one.
    pub endpoint: Option<String>,
    /// Whether nothing may be downloaded.
    pub offline: bool,
}

/// Finds base models; blocking, so never call it on an async runtime's thread.
#[derive(Debug, Clone)]
pub struct Hub {
    options: Options,
    progress: Option<Progress>,
}

impl Reference {
    /// The hub's name of the repository, `org/repo`; `None` for a local file.
    pub fn repository_id(&self) -> Option<String> {
        match self {
            Self::Alias(entry) => Some(format!("{}/{}", entry.owner, entry.repository)),
            Self::Repository { owner, repository, .. } => Some(format!("{owner}/{repository}")),
            Self::Local(_) => None,
        }
    }

    /// Reads the name of a base model.
    ///
    /// # Errors
    /// A name of no known form, an alias that the catalogue lacks.
    pub fn parse(name: &str) -> Result<Self, Error> {
        if let Some(rest) = name.strip_prefix("hf:") {
            return Self::parse_repository(name, rest);
        }
        if let Some(rest) = name.strip_prefix("local:") {
            return Self::parse_local(name, rest);
        }
        CATALOGUE.iter().find(|entry| entry.alias == name).map(Self::Alias).ok_or_else(|| {
            let aliases = CATALOGUE.each_ref().map(|entry| entry.alias).join(", ");
            let reason = format!("it is none of {aliases}, nor `hf:org/repo/file.gguf`, nor `local:path`");
            Error::NotFound { name: name.to_owned(), reason }
        })
    }

    fn parse_repository(name: &str, rest: &str) -> Result<Self, Error> {
        let mut parts = rest.splitn(3, '/');
        let (owner, repository, file) = (parts.next(), parts.next(), parts.next());
        let plain = |part: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part != "." && part != ".." && part.chars().all(fine)
        };
        match (owner, repository, file) {
            (Some(owner), Some(repository), Some(file))
                if plain(owner) && plain(repository) && file.split('/').all(plain) && file.ends_with(".gguf") =>
            {
                Ok(Self::Repository {
                    owner: owner.to_owned(),
                    repository: repository.to_owned(),
                    file: file.to_owned(),
                })
            }
            _ => {
                let reason = "name one GGUF file of a repository, `hf:org/repo/file.gguf`".to_owned();
                Err(Error::Unsupported { name: name.to_owned(), reason })
            }
        }
    }

    fn parse_local(name: &str, rest: &str) -> Result<Self, Error> {
        let path = Path::new(rest);
        let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
        if rest.is_empty() || !inside || rest.contains('\0') {
            let reason = "a local path is relative to models.dir and stays inside it".to_owned();
            return Err(Error::NotFound { name: name.to_owned(), reason });
        }
        if path.extension().is_none_or(|extension| extension != "gguf") {
            let reason = "name a GGUF file, `local:file.gguf`".to_owned();
            return Err(Error::Unsupported { name: name.to_owned(), reason });
        }
        Ok(Self::Local(path.to_owned()))
    }

    /// The `{base}` of the names of models tuned on this one: the alias or the file's stem, `/` and `:` as `-`.
    pub fn name_base(&self) -> String {
        let stem = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let base = match self {
            Self::Alias(entry) => entry.alias.to_owned(),
            Self::Repository { file, .. } => stem(Path::new(file)),
            Self::Local(path) => stem(path),
        };
        base.replace(['/', ':'], "-")
    }
}

impl Hub {
    /// A hub over these folders.
    pub fn new(options: Options) -> Self {
        Self { options, progress: None }
    }

    /// The same hub, which calls `on_progress` now and then as long as a download gets on.
    pub fn with_progress(self, on_progress: impl Fn() + Send + Sync + 'static) -> Self {
        Self { progress: Some(Progress::new(OnProgress(on_progress))), ..self }
    }

    /// The hub of a configuration; `HF_ENDPOINT` and `HF_HUB_OFFLINE` count as for the hub's own tools.
    pub fn from_config(config: &Config) -> Self {
        Self::new(Options {
            models_dir: config.models_dir(),
            cache_dir: config.cache_dir(),
            endpoint: None,
            offline: offline(),
        })
    }

    /// The model, if its file is on this machine; `None`: it would have to be downloaded.
    ///
    /// # Errors
    /// A name of no known form, a local file that is not there, a file with the wrong hash.
    pub fn locate(&self, name: &str) -> Result<Option<BaseModel>, Error> {
        let reference = Reference::parse(name)?;
        let path = match &reference {
            Reference::Local(path) => Some(self.local_file(name, path)?),
            Reference::Alias(entry) => match self.plain_file(entry.file) {
                Some(path) => Some(path),
                None => self.cached(name, entry.owner, entry.repository, entry.file, Some(entry.revision))?,
            },
            Reference::Repository { owner, repository, file } => self.cached(name, owner, repository, file, None)?,
        };
        path.map(|path| self.verify(name, &reference, path)).transpose()
    }

    /// The model; downloads it where it is not on this machine.
    ///
    /// # Errors
    /// As [`Hub::locate`], and whatever can go wrong with a download.
    pub fn fetch(&self, name: &str) -> Result<BaseModel, Error> {
        if let Some(model) = self.locate(name)? {
            return Ok(model);
        }
        if self.options.offline {
            let reason = "it is not on this machine, and HF_HUB_OFFLINE forbids to download it".to_owned();
            return Err(Error::NotFound { name: name.to_owned(), reason });
        }
        let reference = Reference::parse(name)?;
        let (owner, repository, file, revision) = match &reference {
            Reference::Alias(entry) => (entry.owner, entry.repository, entry.file, Some(entry.revision)),
            Reference::Repository { owner, repository, file } => {
                (owner.as_str(), repository.as_str(), file.as_str(), None)
            }
            Reference::Local(path) => {
                return Err(not_found(name, &format!("models.dir has no file {}", path.display())));
            }
        };
        tracing::info!(model = name, repository = format!("{owner}/{repository}"), file, "downloading base model");
        let client = self.client().map_err(|error| hub_error(name, error))?;
        let path = loop {
            match download(&client, owner, repository, file, revision, false, self.progress.clone()) {
                Ok(path) => break path,
                // Another process downloads the same file: its result is ours too.
                Err(HFError::CacheLockTimeout { .. }) => tracing::info!(model = name, "waiting for another download"),
                Err(error) => return Err(hub_error(name, error)),
            }
        };
        self.verify(name, &reference, path)
    }

    /// The catalogue and the GGUF files under `models.dir`, sorted by name.
    pub fn list(&self) -> Vec<Listed> {
        let mut models: Vec<Listed> = CATALOGUE
            .iter()
            .map(|entry| {
                let created_at = self.plain_file(entry.file).map_or(0, |path| changed_at(&path));
                Listed { name: entry.alias.to_owned(), created_at }
            })
            .collect();
        let mut folders = vec![(PathBuf::new(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            // A folder that cannot be read has no models for us.
            let Ok(items) = std::fs::read_dir(self.options.models_dir.join(&folder)) else { continue };
            for item in items.flatten() {
                let path = folder.join(item.file_name());
                if item.file_type().is_ok_and(|kind| kind.is_dir()) && depth < 4 {
                    folders.push((path, depth + 1));
                    continue;
                }
                let name = format!("local:{}", path.display());
                if let (true, Ok(real)) =
                    (path.to_str().is_some(), Reference::parse(&name).and_then(|_| self.local_file(&name, &path)))
                {
                    models.push(Listed { name, created_at: changed_at(&real) });
                }
            }
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        models
    }

    /// A file under `models.dir`: canonical, and still inside it after every symlink.
    fn local_file(&self, name: &str, path: &Path) -> Result<PathBuf, Error> {
        let missing = || not_found(name, &format!("models.dir has no file {}", path.display()));
        let root = self.options.models_dir.canonicalize().map_err(|_| missing())?;
        let real = root.join(path).canonicalize().map_err(|_| missing())?;
        if !real.starts_with(&root) {
            return Err(not_found(name, "its file is outside of models.dir"));
        }
        if real.is_file() { Ok(real) } else { Err(missing()) }
    }

    /// A catalogue file that somebody put into `models.dir` or the cache folder under its own name.
    fn plain_file(&self, file: &str) -> Option<PathBuf> {
        [&self.options.models_dir, &self.options.cache_dir]
            .into_iter()
            .find_map(|folder| folder.join(file).canonicalize().ok().filter(|path| path.is_file()))
    }

    fn cached(
        &self,
        name: &str,
        owner: &str,
        repository: &str,
        file: &str,
        revision: Option<&str>,
    ) -> Result<Option<PathBuf>, Error> {
        match self.client().and_then(|client| download(&client, owner, repository, file, revision, true, None)) {
            Ok(path) => Ok(Some(path)),
            Err(HFError::LocalEntryNotFound { .. }) => Ok(None),
            Err(error) => Err(hub_error(name, error)),
        }
    }

    fn client(&self) -> Result<HFClientSync, HFError> {
        let builder = HFClientBuilder::new().cache_dir(self.options.cache_dir.join("hub"));
        match &self.options.endpoint {
            Some(endpoint) => builder.endpoint(endpoint).build_sync(),
            None => builder.build_sync(),
        }
    }

    /// Checks the hash where the catalogue pins one; a note in the cache folder saves hashing the same state of a file again.
    fn verify(&self, name: &str, reference: &Reference, path: PathBuf) -> Result<BaseModel, Error> {
        let io = |source| Error::Io { name: name.to_owned(), source };
        let path = path.canonicalize().map_err(io)?;
        let metadata = path.metadata().map_err(io)?;
        let size_bytes = metadata.len();
        let mut model = BaseModel { name: name.to_owned(), path, size_bytes, sha256: None };
        let Reference::Alias(entry) = reference else { return Ok(model) };
        let changed = metadata.modified().map_err(io)?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let state = format!("{size_bytes} {} {}\n", changed.as_nanos(), model.path.display());
        let note = self.options.cache_dir.join("verified").join(entry.sha256);
        if std::fs::read_to_string(&note).ok().as_ref() != Some(&state) {
            let found = sha256_of_file(&model.path).map_err(io)?;
            if found != entry.sha256 {
                return Err(Error::WrongHash { name: name.to_owned(), found, expected: entry.sha256 });
            }
            // Without the note the file is only hashed again.
            let written = std::fs::create_dir_all(self.options.cache_dir.join("verified"));
            if let Err(error) = written.and_then(|()| std::fs::write(&note, &state)) {
                tracing::debug!(note = %note.display(), %error, "cannot note that a model file was verified");
            }
        }
        model.sha256 = Some(entry.sha256.to_owned());
        Ok(model)
    }
}

/// Whether `HF_HUB_OFFLINE` forbids downloads, read as the hub's own tools read it.
pub fn offline() -> bool {
    let said = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&said.as_str())
}

/// SHA-256 of a file in lower-case hex, read piece by piece.
///
/// # Errors
/// A file that cannot be read.
pub fn sha256_of_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

fn download(
    client: &HFClientSync,
    owner: &str,
    repository: &str,
    file: &str,
    revision: Option<&str>,
    local_files_only: bool,
    progress: Option<Progress>,
) -> Result<PathBuf, HFError> {
    client
        .model(owner, repository)
        .download_file()
        .filename(file)
        .maybe_revision(revision)
        .local_files_only(local_files_only)
        .maybe_progress(progress)
        .send()
}

/// Tells that a download got on, whatever of it did.
struct OnProgress<F>(F);

impl<F: Fn() + Send + Sync> ProgressHandler for OnProgress<F> {
    fn on_progress(&self, _: &ProgressEvent) {
        (self.0)();
    }
}

fn hub_error(name: &str, error: HFError) -> Error {
    match error {
        HFError::RepoNotFound { .. }
        | HFError::RevisionNotFound { .. }
        | HFError::EntryNotFound { .. }
        | HFError::AuthRequired { .. }
        | HFError::Forbidden { .. } => not_found(name, &error.to_string()),
        source => Error::Download { name: name.to_owned(), source: Box::new(source) },
    }
}

fn not_found(name: &str, reason: &str) -> Error {
    Error::NotFound { name: name.to_owned(), reason: reason.to_owned() }
}

fn changed_at(path: &Path) -> i64 {
    let since_epoch = path.metadata().and_then(|metadata| metadata.modified()).ok();
    let seconds = since_epoch.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    seconds.map_or(0, |seconds| seconds.as_secs().cast_signed())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use axum::http::Method;
    use axum::routing::get;

    use super::*;

    fn hub(folder: &Path, endpoint: Option<String>, offline: bool) -> Hub {
        let (models_dir, cache_dir) = (folder.join("models"), folder.join("cache"));
        std::fs::create_dir_all(&models_dir).expect("a writable folder");
        Hub::new(Options { models_dir, cache_dir, endpoint, offline })
    }

    #[test]
    fn a_name_is_read_or_refused_with_what_would_be_right() {
        let repository =
            |file: &str| Reference::Repository { owner: "org".into(), repository: "repo".into(), file: file.into() };
        let good = [
            ("smollm2-135m-instruct", Reference::Alias(&CATALOGUE[0]), "smollm2-135m-instruct"),
            ("hf:org/repo/sub/m.Q4_1.gguf", repository("sub/m.Q4_1.gguf"), "m.Q4_1"),
            ("local:a:b/c:d.gguf", Reference::Local("a:b/c:d.gguf".into()), "c-d"),
        ];
        for (name, reference, base) in good {
            assert_eq!(Reference::parse(name).expect(name), reference);
            assert_eq!(reference.name_base(), base);
        }
        for name in ["hf:org/repo", "hf:org/repo/../x.gguf", "hf:org//x.gguf", "hf:o/r/x.safetensors", "local:folder"] {
            assert!(matches!(Reference::parse(name), Err(Error::Unsupported { .. })), "{name}");
        }
        for name in ["", "gpt-4", "local:", "local:/etc/x.gguf", "local:../x.gguf", "local:a/../../x.gguf"] {
            let error = Reference::parse(name).expect_err(name);
            assert!(matches!(error, Error::NotFound { .. }), "{error}");
        }
        let error = Reference::parse("smollm2").expect_err("no such alias").to_string();
        assert!(error.contains("`smollm2`") && error.contains("smollm2-135m-instruct"), "{error}");
    }

    #[test]
    fn a_local_model_stays_inside_its_folder() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let hub = hub(folder.path(), None, true);
        let models = folder.path().join("models");
        std::fs::create_dir(models.join("sub")).expect("a folder");
        std::fs::write(models.join("sub/a.gguf"), "model").expect("a file");
        std::fs::write(folder.path().join("secret.gguf"), "secret").expect("a file");
        std::os::unix::fs::symlink(models.join("sub/a.gguf"), models.join("in.gguf")).expect("a link");
        std::os::unix::fs::symlink("../secret.gguf", models.join("out.gguf")).expect("a link");
        std::os::unix::fs::symlink("..", models.join("up")).expect("a link");
        for name in ["local:sub/a.gguf", "local:in.gguf"] {
            let model = hub.locate(name).expect(name).expect("it is there");
            assert_eq!((model.size_bytes, model.sha256), (5, None));
            assert!(model.path.ends_with("models/sub/a.gguf"));
        }
        for name in ["local:out.gguf", "local:up/secret.gguf", "local:b.gguf"] {
            assert!(matches!(hub.locate(name), Err(Error::NotFound { .. })), "{name}");
        }
        let names: Vec<String> = hub.list().into_iter().map(|model| model.name).collect();
        assert_eq!(names, ["local:in.gguf", "local:sub/a.gguf", "smollm2-135m-instruct"]);
    }

    #[test]
    fn an_alias_takes_only_the_pinned_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let hub = hub(folder.path(), None, true);
        let name = CATALOGUE[0].alias;
        assert_eq!(hub.locate(name).expect("no error"), None);
        let error = hub.fetch(name).expect_err("it cannot be downloaded").to_string();
        assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
        std::fs::write(folder.path().join("models").join(CATALOGUE[0].file), "another").expect("a file");
        assert!(matches!(hub.locate(name), Err(Error::WrongHash { .. })));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_repository_file_is_downloaded_once() {
        let downloads = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&downloads);
        let answer = async move |method: Method| {
            counter.fetch_add(u32::from(method == Method::GET), Ordering::Relaxed);
            ([("x-repo-commit", "0123456789012345678901234567890123456789"), ("etag", "\"aaaa\"")], "GGUF and more")
        };
        let routes = axum::Router::new().route("/org/repo/resolve/main/model.gguf", get(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("a bound socket"));
        let _server = tokio::spawn(async { axum::serve(listener, routes).await });

        let folder = tempfile::tempdir().expect("a temporary folder");
        let online = hub(folder.path(), Some(endpoint.clone()), false);
        let offline = hub(folder.path(), Some(endpoint.clone()), true);
        tokio::task::spawn_blocking(move || {
            let name = "hf:org/repo/model.gguf";
            assert_eq!(online.locate(name).expect("no error"), None);
            assert!(matches!(offline.fetch(name), Err(Error::NotFound { .. })));
            let model = online.fetch(name).expect("a download");
            assert_eq!(std::fs::read_to_string(&model.path).expect("a file"), "GGUF and more");
            assert_eq!(online.fetch(name).expect("the cached file"), model);
            assert_eq!(offline.fetch(name).expect("the cached file"), model);
            let missing = online.fetch("hf:org/repo/other.gguf").expect_err("no such file");
            assert!(matches!(missing, Error::NotFound { .. }), "{missing}");
        })
        .await
        .expect("no panic");
        assert_eq!(downloads.load(Ordering::Relaxed), 1);
    }
}
