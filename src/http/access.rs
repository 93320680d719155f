//! Who may call: the key, the `Host` that stops DNS rebinding, and the browser pages that are kept out.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, Result};
use crate::config::Config;
use crate::store::{self, Store};
use crate::types::DEFAULT_OWNER;
use crate::types::api_key::Scope;

/// Routes that answer without a key: they tell nothing of anybody's.
const OPEN_PATHS: [&str; 4] = ["/healthz", "/readyz", "/openapi.json", "/openapi.yaml"];

/// A server that must not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration that would let anybody in.
    #[error(
        "server.listen is `{0}`, which is no loopback address: make a key with `lorad keys create`, or set auth.bootstrap_key, \
         first, or anybody could call"
    )]
    OpenDoor(std::net::SocketAddr),
    /// Whether there are keys cannot be found out.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// The rules for callers.
#[derive(Debug, Clone)]
pub struct Access {
    store: Store,
    bootstrap_sha256: Option<Arc<[u8; 32]>>,
    /// Whether a key was ever made: from then on one is needed. It never turns back.
    has_keys: Arc<AtomicBool>,
}

/// Whose request it is; every route that shows or changes something asks for it.
#[derive(Debug, Clone)]
pub(super) struct Owner(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Owner {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::unauthorized)
    }
}

impl Access {
    /// The rules that this configuration and the keys in the database ask for.
    ///
    /// # Errors
    /// No key, and a listener that others than this machine can reach; a database that failed.
    pub async fn new(config: &Config, store: Store) -> Result<Self, Error> {
        let key = config.auth.bootstrap_key.as_ref();
        let bootstrap_sha256 = key.map(|key| Arc::new(sha256(key.expose_secret())));
        let has_keys = store::api_key::any(&mut *store.read().await?).await?;
        if bootstrap_sha256.is_none() && !has_keys {
            if !config.server.listen.ip().is_loopback() {
                return Err(Error::OpenDoor(config.server.listen));
            }
            tracing::warn!(
                "no API key (lorad keys create) and no auth.bootstrap_key: whoever can reach the loopback address of this \
                 machine may call"
            );
        }
        Ok(Self { store, bootstrap_sha256, has_keys: Arc::new(AtomicBool::new(has_keys)) })
    }

    /// Whose request it is; `None`: nobody's, for a route that is open to all.
    async fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<Option<Owner>> {
        check_browser(uri, headers)?;
        if !self.needs_key().await? {
            check_host(uri, headers)?;
            return Ok(Some(Owner(DEFAULT_OWNER.to_owned())));
        }
        if OPEN_PATHS.contains(&uri.path()) {
            return Ok(None);
        }
        let given = sha256(bearer(headers).ok_or_else(ApiError::unauthorized)?);
        if self.bootstrap_sha256.as_ref().is_some_and(|expected| given.ct_eq(expected.as_ref()).into()) {
            return Ok(Some(Owner(DEFAULT_OWNER.to_owned())));
        }
        // Found by its hash: how long the search takes tells nothing of the key.
        let key = store::api_key::by_sha256(&mut *self.store.read().await?, &hex::encode(given)).await?;
        let key = key.ok_or_else(ApiError::unauthorized)?;
        if key.scope == Scope::Read && !method.is_safe() {
            return Err(ApiError::read_only(method));
        }
        Ok(Some(Owner(key.owner)))
    }

    /// Also a key that is made while the server runs closes the door, and one that is revoked does not open it.
    async fn needs_key(&self) -> Result<bool> {
        if self.bootstrap_sha256.is_some() || self.has_keys.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let has_keys = store::api_key::any(&mut *self.store.read().await?).await?;
        if has_keys {
            self.has_keys.store(true, Ordering::Relaxed);
        }
        Ok(has_keys)
    }
}

/// Lets a request through, or answers it.
pub(super) async fn guard(State(access): State<Access>, mut request: Request, next: Next) -> Response {
    match access.check(request.method(), request.uri(), request.headers()).await {
        Ok(None) => next.run(request).await,
        Ok(Some(owner)) => {
            tracing::Span::current().record("owner", owner.0.as_str());
            request.extensions_mut().insert(owner);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// What stands behind `Authorization: Bearer`.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn sha256(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

/// A page of another site must not use its visitor's place on the network.
fn check_browser(uri: &Uri, headers: &HeaderMap) -> Result<()> {
    if headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site") {
        return Err(ApiError::forbidden("requests from pages of other sites are refused"));
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let origin_host = origin.split_once("://").map(|(_, host)| host);
    if origin_host.is_some() && origin_host == host(uri, headers) {
        return Ok(());
    }
    Err(ApiError::forbidden(format!("requests from pages of other origins are refused, got origin `{origin}`")))
}

/// While there is no key, the name by which the caller found this server must be this machine's own.
fn check_host(uri: &Uri, headers: &HeaderMap) -> Result<()> {
    let host = host(uri, headers).unwrap_or_default();
    if is_this_machine(host) {
        return Ok(());
    }
    let message = format!("host must be localhost or a loopback address while no key is configured, got `{host}`");
    Err(ApiError::forbidden(message))
}

fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    match headers.get(header::HOST) {
        Some(host) => host.to_str().ok(),
        None => uri.authority().map(axum::http::uri::Authority::as_str),
    }
}

fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(address, _)| address),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::keys::{NewKey, create_key, revoke_key};

    #[test]
    fn only_names_of_this_machine_pass() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]:80", "0.0.0.0", "[::1", "::1"]
        {
            assert!(!is_this_machine(host), "{host}");
        }
    }

    #[tokio::test]
    async fn a_listener_for_all_needs_a_key() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&folder.path().join("lorad.db")).await.expect("a database");
        let mut config = Config::default();
        assert!(Access::new(&config, store.clone()).await.is_ok());
        config.server.listen = ([0, 0, 0, 0], 80).into();
        assert!(matches!(Access::new(&config, store.clone()).await, Err(Error::OpenDoor(_))));
        config.auth.bootstrap_key = Some("key".into());
        assert!(Access::new(&config, store.clone()).await.is_ok());
        config.auth.bootstrap_key = None;
        let key = NewKey { name: "n".into(), owner: "o".into(), scope: Scope::Read };
        let (made, _) = create_key(&store, key).await.expect("a key");
        assert!(Access::new(&config, store.clone()).await.is_ok());
        revoke_key(&store, made.id).await.expect("a revocation");
        assert!(Access::new(&config, store).await.is_ok());
    }
}
