//! What comes in: query parameters, JSON bodies and ids, each refused with the name of what is wrong.

use std::str::FromStr;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;

use super::error::{ApiError, Result};

/// Longest JSON body.
pub(super) const MAX_JSON_BYTES: usize = 1 << 20;

/// The query parameters, to be taken out one by one; one that is left over is nobody's.
#[derive(Debug)]
pub(super) struct Params(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let pairs = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let pairs = pairs.map_err(|error| ApiError::bad_body(format!("the query cannot be read: {error}")))?;
        Ok(Self(pairs.0))
    }
}

impl Params {
    /// Takes out the parameter of that name; given twice, the last one counts.
    pub(super) fn take<T: FromStr>(&mut self, name: &str) -> Result<Option<T>>
    where
        T::Err: std::fmt::Display,
    {
        let mut last = None;
        self.0.retain_mut(|(key, value)| {
            let ours = key == name;
            if ours {
                last = Some(std::mem::take(value));
            }
            !ours
        });
        let Some(text) = last else { return Ok(None) };
        let value = text.parse();
        let value = value.map_err(|error| ApiError::bad_request(name, format!("{name} `{text}`: {error}")));
        value.map(Some)
    }

    /// Takes out `limit`.
    pub(super) fn limit(&mut self, default: i64, most: i64) -> Result<i64> {
        let limit = self.take("limit")?.unwrap_or(default);
        if (1..=most).contains(&limit) {
            return Ok(limit);
        }
        Err(ApiError::bad_request("limit", format!("limit must be from 1 to {most}, got `{limit}`")))
    }

    /// Takes out every `name[key]`.
    pub(super) fn map(&mut self, name: &str) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        self.0.retain_mut(|(key, value)| {
            let inner = key.strip_prefix(name).and_then(|rest| rest.strip_prefix('[')?.strip_suffix(']'));
            let Some(inner) = inner else { return true };
            pairs.push((inner.to_owned(), std::mem::take(value)));
            false
        });
        pairs
    }

    /// Refuses what is left over.
    pub(super) fn finish(self) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::bad_request(name, format!("unknown query parameter `{name}`"))),
        }
    }
}

/// For a route that has no query parameters: refuses the first one.
#[derive(Debug)]
pub(super) struct NoParams;

impl<S: Send + Sync> FromRequestParts<S> for NoParams {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        Params::from_request_parts(parts, state).await?.finish()?;
        Ok(Self)
    }
}

/// The bytes of a body that says that it is JSON, up to [`MAX_JSON_BYTES`].
#[derive(Debug)]
pub(super) struct JsonBytes(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for JsonBytes {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self> {
        check_content_type(request.headers())?;
        read_json_bytes(request.into_body()).await.map(Self)
    }
}

/// The bytes of a body that may be absent, which then has no content type or any; one that is there is as [`JsonBytes`].
#[derive(Debug)]
pub(super) struct OptionalJsonBytes(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for OptionalJsonBytes {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self> {
        let (parts, body) = request.into_parts();
        let bytes = read_json_bytes(body).await?;
        if !bytes.is_empty() {
            check_content_type(&parts.headers)?;
        }
        Ok(Self(bytes))
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<()> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim();
    let is_json = essence.eq_ignore_ascii_case("application/json");
    if is_json { Ok(()) } else { Err(ApiError::unsupported_media_type(content_type)) }
}

async fn read_json_bytes(body: Body) -> Result<Bytes> {
    let mut bytes = BytesMut::new();
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::bad_body(format!("the body could not be read: {error}")))?;
        if bytes.len() + chunk.len() > MAX_JSON_BYTES {
            return Err(ApiError::too_large(MAX_JSON_BYTES as u64));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

impl JsonBytes {
    /// Reads the body as a `T`.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        let mut deserializer = serde_json::Deserializer::from_slice(&self.0);
        serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
            let path = error.path().to_string();
            let message = format!("{path}: {}", error.into_inner());
            ApiError::bad_request(path, message)
        })
    }
}
