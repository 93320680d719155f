//! `[storage]` and `[retention]`: where objects are kept, how that is reached, and how long.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use object_store::path::Path;
use reqwest::Url;
use secrecy::SecretString;
use serde::{Deserialize, Deserializer};

use super::Error;

/// What `storage.url` may be.
const RIGHT_URL: &str = "must be `file:PATH`, `memory:`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or \
                         `az://CONTAINER/PREFIX` (the prefix may be left out)";

/// Object storage.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// `file:PATH`, `memory:` (lost when the server ends), `s3://`, `gs://` or `az://`. Default `file:` and `objects` in the
    /// data folder.
    pub url: Option<String>,
    /// URL of the service, for S3-compatible ones, gateways and emulators. Default: that of AWS, Google or Azure.
    pub endpoint: Option<String>,
    /// Region of an `s3://` bucket. Default: `AWS_REGION`, else `us-east-1`.
    pub region: Option<String>,
    /// Id of the key to an `s3://` bucket. Default: what the `AWS_*` variables or the machine's role say.
    pub access_key_id: Option<String>,
    /// The secret of that key.
    #[serde(deserialize_with = "secret")]
    pub secret_access_key: Option<SecretString>,
    /// Storage account of an `az://` container. Default: `AZURE_STORAGE_ACCOUNT_NAME`.
    pub account: Option<String>,
    /// Key of that account. Default: what the `AZURE_*` variables or the machine's identity say.
    #[serde(deserialize_with = "secret")]
    pub account_key: Option<SecretString>,
    /// File with the key of the service account for a `gs://` bucket. Default: what the `GOOGLE_*` variables or the machine's
    /// account say.
    pub credentials_file: Option<PathBuf>,
    /// Whether an endpoint on another machine may be plain `http:`. Default false.
    pub allow_http: bool,
    /// Seconds without an answer or a byte after which a request to the service is given up, and for which one that fails is
    /// tried again. Default 30.
    pub timeout_seconds: u32,
    /// Whether downloads are redirected to the service with a URL signed for five minutes. Default false.
    pub presign: bool,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            url: None,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            account: None,
            account_key: None,
            credentials_file: None,
            allow_http: false,
            timeout_seconds: 30,
            presign: false,
        }
    }
}

/// How long things are kept, in days; without a number for ever.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Files, from their upload (or, result files, from the end of their job); those of unfinished jobs stay.
    pub files_days: Option<u32>,
    /// Checkpoints that the API lists, from the end of their job.
    pub checkpoints_days: Option<u32>,
    /// Artifacts, from the end of their job; adapters that an unfinished job begins with stay.
    pub artifacts_days: Option<u32>,
}

/// A bucket or container, and the folder in it that is the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// The folder; empty: all of it.
    pub prefix: Path,
}

/// What `storage.url` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// The memory of the server.
    Memory,
    /// A folder of this machine.
    File(PathBuf),
    /// A bucket that speaks S3.
    S3(Bucket),
    /// A bucket of Google's.
    Gs(Bucket),
    /// A container of Azure's.
    Az(Bucket),
}

impl Location {
    /// Reads a `storage.url`.
    ///
    /// # Errors
    /// A URL of no known kind, without a bucket, or with a prefix that is no path.
    pub fn parse(url: &str) -> Result<Self, Error> {
        let wrong = || value("storage.url", RIGHT_URL, url);
        if url == "memory:" {
            return Ok(Self::Memory);
        }
        if let Some(path) = url.strip_prefix("file:").filter(|path| !path.is_empty()) {
            // `file:///a` and `file:/a` are the same folder, `file:a` is one of the current folder.
            return Ok(Self::File(PathBuf::from(path.strip_prefix("//").unwrap_or(path))));
        }
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(is_plain) {
            return Err(wrong());
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let is_path = prefix.split('/').all(|part| !part.is_empty());
        if !(prefix.is_empty() || is_path && prefix.chars().all(|c| is_plain(c) || "/=+@".contains(c))) {
            return Err(wrong());
        }
        let bucket = Bucket { name: name.to_owned(), prefix: Path::parse(prefix).map_err(|_| wrong())? };
        match scheme {
            "s3" => Ok(Self::S3(bucket)),
            "gs" => Ok(Self::Gs(bucket)),
            "az" => Ok(Self::Az(bucket)),
            _ => Err(wrong()),
        }
    }
}

impl Storage {
    /// How long a request to the service may go without an answer or a byte.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(u64::from(self.timeout_seconds))
    }

    /// What one field alone cannot tell; `location` is what the URL says.
    pub(super) fn check(&self, location: &Location) -> Result<(), Error> {
        let hidden = |secret: &Option<SecretString>| secret.as_ref().map(|_| "a secret".to_owned());
        let text = |text: &Option<String>| text.clone();
        let switch = |on: bool| on.then(|| "true".to_owned());
        let path = self.credentials_file.as_ref().map(|path| path.display().to_string());
        for (key, there, schemes) in [
            ("storage.endpoint", text(&self.endpoint), "s3 gs az"),
            ("storage.allow_http", switch(self.allow_http), "s3 gs az"),
            ("storage.presign", switch(self.presign), "s3 gs az"),
            ("storage.region", text(&self.region), "s3"),
            ("storage.access_key_id", text(&self.access_key_id), "s3"),
            ("storage.secret_access_key", hidden(&self.secret_access_key), "s3"),
            ("storage.account", text(&self.account), "az"),
            ("storage.account_key", hidden(&self.account_key), "az"),
            ("storage.credentials_file", path, "gs"),
        ] {
            let Some(there) = there else { continue };
            if there.is_empty() {
                return Err(value(key, "must not be empty", ""));
            }
            if !schemes.split(' ').any(|scheme| scheme == location.scheme()) {
                let right = match schemes {
                    "s3" => "is for a storage.url of `s3://` only",
                    "gs" => "is for a storage.url of `gs://` only",
                    "az" => "is for a storage.url of `az://` only",
                    _ => "is for a storage.url of `s3://`, `gs://` or `az://` only",
                };
                return Err(value(key, right, &there));
            }
        }
        if self.access_key_id.is_some() != self.secret_access_key.is_some() {
            let found = self.access_key_id.as_deref().unwrap_or("a secret");
            return Err(value("storage.access_key_id", "and storage.secret_access_key go together", found));
        }
        if !(1..=600).contains(&self.timeout_seconds) {
            return Err(value("storage.timeout_seconds", "must be from 1 to 600", &self.timeout_seconds.to_string()));
        }
        self.endpoint.as_deref().map_or(Ok(()), |endpoint| check_endpoint(endpoint, self.allow_http))
    }
}

impl Location {
    fn scheme(&self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::File(_) => "file",
            Self::S3(_) => "s3",
            Self::Gs(_) => "gs",
            Self::Az(_) => "az",
        }
    }
}

impl Retention {
    /// What the types alone cannot tell.
    pub(super) fn check(&self) -> Result<(), Error> {
        for (key, days) in [
            ("retention.files_days", self.files_days),
            ("retention.checkpoints_days", self.checkpoints_days),
            ("retention.artifacts_days", self.artifacts_days),
        ] {
            if let Some(days) = days.filter(|days| !(1..=36_500).contains(days)) {
                return Err(value(key, "must be from 1 to 36500 (or not there: for ever)", &days.to_string()));
            }
        }
        Ok(())
    }
}

/// An endpoint must be an `http(s):` URL, and a plain one on this machine unless that was allowed.
///
/// # Errors
/// One that is not.
pub fn check_endpoint(endpoint: &str, allow_http: bool) -> Result<(), Error> {
    let wrong = || value("storage.endpoint", "must be a URL like `https://HOST:PORT`", endpoint);
    let url = Url::parse(endpoint).map_err(|_| wrong())?;
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        // What it names may be a secret.
        return Err(value("storage.endpoint", "must have no user, query or fragment", host));
    }
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_here = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    match url.scheme() {
        "https" => Ok(()),
        "http" if is_here || allow_http => Ok(()),
        "http" => {
            let right = "must be `https:`, or storage.allow_http = true says that the network to it is trusted";
            Err(value("storage.endpoint", right, endpoint))
        }
        _ => Err(wrong()),
    }
}

fn value(key: &'static str, right: &'static str, value: &str) -> Error {
    Error::Value { key, right: right.into(), value: value.to_owned() }
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    let key = Option::<String>::deserialize(deserializer)?;
    match key {
        Some(key) if key.is_empty() => Err(serde::de::Error::custom("a key must not be empty")),
        key => Ok(key.map(SecretString::from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_objects_are() {
        let bucket = |name: &str, prefix: &str| Bucket { name: name.into(), prefix: Path::from(prefix) };
        for (url, location) in [
            ("memory:", Location::Memory),
            ("file:a/b", Location::File("a/b".into())),
            ("file:///a", Location::File("/a".into())),
            ("s3://lorad", Location::S3(bucket("lorad", ""))),
            ("s3://lorad/", Location::S3(bucket("lorad", ""))),
            ("gs://lorad/a/b/", Location::Gs(bucket("lorad", "a/b"))),
            ("az://lorad/a", Location::Az(bucket("lorad", "a"))),
        ] {
            assert_eq!(Location::parse(url).expect(url), location);
        }
    }

    #[test]
    fn a_url_that_names_nothing_is_refused() {
        for url in
            ["", "file:", "/objects", "s3:", "s3://", "s3:///a", "s3://a b", "s3://a//b", "s3://a/../b", "gs://u@b"]
        {
            let error = Location::parse(url).expect_err(url).to_string();
            assert!(error.contains("storage.url") && error.contains(&format!("`{url}`")), "{error}");
        }
    }

    #[test]
    fn a_setting_that_the_url_does_not_use_is_named() {
        let secret = || Some(SecretString::from("deep-secret"));
        let cases = [
            ("file:a", Storage { endpoint: Some("https://a".into()), ..Storage::default() }, "storage.endpoint"),
            ("memory:", Storage { presign: true, ..Storage::default() }, "storage.presign"),
            ("gs://a", Storage { region: Some("b".into()), ..Storage::default() }, "storage.region"),
            ("s3://a", Storage { account_key: secret(), ..Storage::default() }, "storage.account_key"),
            (
                "az://a",
                Storage { credentials_file: Some("f".into()), ..Storage::default() },
                "storage.credentials_file",
            ),
            ("s3://a", Storage { secret_access_key: secret(), ..Storage::default() }, "storage.access_key_id"),
            ("s3://a", Storage { endpoint: Some("bucket".into()), ..Storage::default() }, "storage.endpoint"),
            (
                "s3://a",
                Storage { endpoint: Some("http://10.0.0.1".into()), ..Storage::default() },
                "storage.allow_http",
            ),
            ("s3://a", Storage { timeout_seconds: 0, ..Storage::default() }, "storage.timeout_seconds"),
        ];
        for (url, storage, word) in cases {
            let error = storage.check(&Location::parse(url).expect(url)).expect_err(word).to_string();
            assert!(error.contains(word) && !error.contains("deep-secret"), "{error}");
        }
    }

    #[test]
    fn a_plain_endpoint_is_here_or_was_allowed() {
        for (endpoint, allow_http, fine) in [
            ("http://127.0.0.1:9000", false, true),
            ("http://[::1]:9000/a", false, true),
            ("http://localhost:9000", false, true),
            ("http://localhost.example", false, false),
            ("http://minio:9000", false, false),
            ("http://minio:9000", true, true),
            ("https://minio", false, true),
            ("ftp://minio", true, false),
            ("https://key:secret@minio", true, false),
        ] {
            assert_eq!(check_endpoint(endpoint, allow_http).is_ok(), fine, "{endpoint} {allow_http}");
        }
    }
}
