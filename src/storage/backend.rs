//! Opening what `storage.url` names.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::signer::Signer;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use secrecy::ExposeSecret;

use super::Error;
use super::abandoned::Abandoned;
use super::ranges::Connector;
use crate::config::{self, Bucket, Location, check_endpoint};

/// Longest time that a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most times that a request is tried again within the time that there is.
const MOST_RETRIES: usize = 10;

/// A backend that is open.
pub(super) struct Backend {
    /// The objects.
    pub(super) objects: Arc<dyn ObjectStore>,
    /// Who signs URLs, where that is wanted.
    pub(super) signer: Option<Arc<dyn Signer>>,
    /// Uploads that were never ended, where the service lists them.
    pub(super) abandoned: Option<Abandoned>,
    /// The folder of the `file:` backend.
    pub(super) folder: Option<PathBuf>,
    /// Whether a signed URL may name what the download is saved as.
    pub(super) signs_filenames: bool,
}

impl Backend {
    /// The memory of this process.
    pub(super) fn memory() -> Self {
        Self::plain(Arc::new(InMemory::new()), None)
    }

    /// Opens the backend of that location; nothing is asked of a service yet.
    pub(super) fn open(location: &Location, settings: &config::Storage) -> Result<Self, Error> {
        match location {
            Location::Memory => Ok(Self::memory()),
            Location::File(path) => folder(path.clone()),
            Location::S3(bucket) => s3(bucket, settings),
            Location::Gs(bucket) => gs(bucket, settings),
            Location::Az(bucket) => az(bucket, settings),
        }
    }

    fn plain(objects: Arc<dyn ObjectStore>, folder: Option<PathBuf>) -> Self {
        Self { objects, signer: None, abandoned: None, folder, signs_filenames: false }
    }

    fn service<T: ObjectStore + Signer>(
        store: T,
        bucket: &Bucket,
        settings: &config::Storage,
        signs_filenames: bool,
    ) -> Self {
        let store = Arc::new(PrefixStore::new(store, bucket.prefix.clone()));
        let signer = settings.presign.then(|| store.clone() as Arc<dyn Signer>);
        Self { signer, signs_filenames, ..Self::plain(store, None) }
    }
}

fn folder(path: PathBuf) -> Result<Backend, Error> {
    std::fs::create_dir_all(&path).map_err(|source| Error::Folder { path: path.clone(), source })?;
    let objects =
        LocalFileSystem::new_with_prefix(&path).map_err(Error::Open)?.with_fsync(true).with_automatic_cleanup(true);
    Ok(Backend::plain(Arc::new(objects), Some(path)))
}

fn s3(bucket: &Bucket, settings: &config::Storage) -> Result<Backend, Error> {
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(&bucket.name);
    if let Some(endpoint) = &settings.endpoint {
        // A variable may name one for S3 alone, which would win.
        builder = builder
            .with_config(AmazonS3ConfigKey::Endpoint, endpoint)
            .with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    if let Some(region) = &settings.region {
        builder = builder.with_region(region);
    }
    if let (Some(id), Some(secret)) = (&settings.access_key_id, &settings.secret_access_key) {
        builder = builder.with_access_key_id(id).with_secret_access_key(secret.expose_secret());
    }
    let value = |key| builder.get_config_value(&key);
    let endpoint = value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint));
    let allow_http = value(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
    let client = client(settings, endpoint.as_deref(), allow_http)?;
    let builder = builder.with_client_options(client).with_retry(retry(settings));
    let store = builder.with_http_connector(Connector::default()).build().map_err(Error::Open)?;
    let abandoned = Abandoned::new(store.clone(), bucket.prefix.clone(), settings.timeout())?;
    Ok(Backend { abandoned: Some(abandoned), ..Backend::service(store, bucket, settings, true) })
}

fn gs(bucket: &Bucket, settings: &config::Storage) -> Result<Backend, Error> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(&bucket.name);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_base_url(endpoint.trim_end_matches('/'));
    }
    if let Some(file) = &settings.credentials_file {
        builder = builder.with_service_account_path(file.display().to_string());
    }
    let value = |key| builder.get_config_value(&key);
    let endpoint = value(GoogleConfigKey::BaseUrl);
    let allow_http = value(GoogleConfigKey::Client(ClientConfigKey::AllowHttp));
    let client = client(settings, endpoint.as_deref(), allow_http)?;
    let builder = builder.with_client_options(client).with_retry(retry(settings));
    let store = builder.with_http_connector(Connector::default()).build().map_err(Error::Open)?;
    Ok(Backend::service(store, bucket, settings, true))
}

fn az(bucket: &Bucket, settings: &config::Storage) -> Result<Backend, Error> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(&bucket.name);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if let Some(account) = &settings.account {
        builder = builder.with_account(account);
    }
    if let Some(key) = &settings.account_key {
        builder = builder.with_access_key(key.expose_secret());
    }
    let value = |key| builder.get_config_value(&key);
    let endpoint = value(AzureConfigKey::Endpoint);
    let allow_http = value(AzureConfigKey::Client(ClientConfigKey::AllowHttp));
    let client = client(settings, endpoint.as_deref(), allow_http)?;
    let store = builder.with_client_options(client).with_retry(retry(settings)).build().map_err(Error::Open)?;
    Ok(Backend::service(store, bucket, settings, false))
}

/// How the service is spoken to. An object of any size takes as long as it takes; without a byte for a while it is given up.
fn client(
    settings: &config::Storage,
    endpoint: Option<&str>,
    allow_http: Option<String>,
) -> Result<ClientOptions, Error> {
    let allow_http = settings.allow_http || allow_http.is_some_and(|allow| allow == "true");
    if let Some(endpoint) = endpoint {
        check_endpoint(endpoint, allow_http)?;
    }
    let is_plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http:"));
    Ok(ClientOptions::new()
        .with_allow_http(is_plain)
        .with_connect_timeout(CONNECT_TIMEOUT.min(settings.timeout()))
        .with_timeout_disabled()
        .with_read_timeout(settings.timeout()))
}

fn retry(settings: &config::Storage) -> RetryConfig {
    let backoff = BackoffConfig { max_backoff: Duration::from_secs(5), ..BackoffConfig::default() };
    RetryConfig { backoff, max_retries: MOST_RETRIES, retry_timeout: settings.timeout() }
}
