//! Who may call: the key, the `Host` that stops DNS rebinding, and the browser pages that are kept out.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, Result};
use crate::config::Config;

/// Routes that answer without a key: they tell nothing of anybody's.
const OPEN_PATHS: [&str; 4] = ["/healthz", "/readyz", "/openapi.json", "/openapi.yaml"];

/// A configuration that would let anybody in.
#[derive(Debug, thiserror::Error)]
#[error("server.listen is `{0}`, which is no loopback address: set auth.bootstrap_key first, or anybody could call")]
pub struct OpenDoor(std::net::SocketAddr);

/// The rules for callers.
#[derive(Debug, Clone)]
pub struct Access {
    key_sha256: Option<Arc<[u8; 32]>>,
}

impl Access {
    /// The rules that this configuration asks for.
    ///
    /// # Errors
    /// No key, and a listener that others than this machine can reach.
    pub fn from_config(config: &Config) -> Result<Self, OpenDoor> {
        let key = config.auth.bootstrap_key.as_ref();
        if key.is_none() && !config.server.listen.ip().is_loopback() {
            return Err(OpenDoor(config.server.listen));
        }
        if key.is_none() {
            tracing::warn!("no auth.bootstrap_key: whoever can reach the loopback address of this machine may call");
        }
        Ok(Self { key_sha256: key.map(|key| Arc::new(sha256(key.expose_secret()))) })
    }

    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<()> {
        check_browser(uri, headers)?;
        let Some(expected) = &self.key_sha256 else { return check_host(uri, headers) };
        if OPEN_PATHS.contains(&uri.path()) {
            return Ok(());
        }
        let given = bearer(headers).ok_or_else(ApiError::unauthorized)?;
        let same = sha256(given).ct_eq(expected.as_ref());
        if bool::from(same) { Ok(()) } else { Err(ApiError::unauthorized()) }
    }
}

/// Lets a request through, or answers it.
pub(super) async fn guard(State(access): State<Access>, request: Request, next: Next) -> Response {
    match access.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
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

/// Without a key the name by which the caller found this server must be this machine's own.
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

    #[test]
    fn a_listener_for_all_needs_a_key() {
        let mut config = Config::default();
        assert!(Access::from_config(&config).is_ok());
        config.server.listen = ([0, 0, 0, 0], 80).into();
        assert!(Access::from_config(&config).is_err());
        config.auth.bootstrap_key = Some("key".into());
        assert!(Access::from_config(&config).is_ok());
    }
}
