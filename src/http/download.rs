//! Handing out an object's bytes: ranges, validators, digest, and a name to save them under.

use std::ops::Range;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::TryStreamExt;
use secrecy::ExposeSecret;
use tracing::Span;

use utoipa::ToSchema;

use super::error::{ApiError, Result};
use crate::storage::{self, Expected, Storage};

/// The bytes of an object, as the specification describes them.
#[derive(Debug, ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it describes a body, which is streamed")]
pub(super) struct ObjectBytes(Vec<u8>);

/// An object and what its answer's headers tell of it.
#[derive(Debug)]
pub(super) struct Download<'a> {
    /// Where storage has the bytes.
    pub(super) object_key: &'a str,
    /// The name to save them under.
    pub(super) filename: &'a str,
    /// How many there are.
    pub(super) size_bytes: u64,
    /// Hash of the bytes, in hexadecimal digits.
    pub(super) sha256: &'a str,
}

/// What the `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Everything,
    Part(Range<u64>),
    Nothing,
}

/// Answers with the bytes, with a part of them, with `304`, or (where `storage.presign` is on) with where to get them.
pub(super) async fn serve(
    storage: &Storage,
    download: &Download<'_>,
    (method, request): (&Method, &HeaderMap),
) -> Result<Response> {
    let etag = format!("\"{}\"", download.sha256);
    let text = |name: HeaderName| request.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_NONE_MATCH).is_some_and(|tags| lists(tags, &etag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    // A part makes sense only if it is of the bytes that the client has the rest of.
    let unchanged = text(header::IF_RANGE).is_none_or(|tag| tag == etag);
    let range = text(header::RANGE).filter(|_| unchanged);
    let wanted = range.map_or(Wanted::Everything, |range| wanted(range, download.size_bytes));
    let (status, length) = match &wanted {
        Wanted::Nothing => return Ok(ApiError::range_not_satisfiable(download.size_bytes)),
        Wanted::Everything => (StatusCode::OK, download.size_bytes),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range.end - range.start),
    };
    let body = if method == Method::HEAD {
        // The database knows everything that the headers tell.
        Body::empty()
    } else if let Some(url) = storage.signed_url(download.object_key, &disposition(download.filename)).await? {
        return redirect(url.expose_secret());
    } else {
        let Download { object_key: key, size_bytes, sha256, .. } = *download;
        let expected = Expected { key, size_bytes, sha256: Some(sha256) };
        streamed(match &wanted {
            Wanted::Part(range) => storage.get_range(expected, range.clone()).await?,
            _ => storage.get(expected).await?,
        })
    };
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: String| {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    };
    set(header::CONTENT_TYPE, "application/octet-stream".into());
    set(header::CONTENT_LENGTH, length.to_string());
    set(header::CONTENT_DISPOSITION, disposition(download.filename));
    set(header::X_CONTENT_TYPE_OPTIONS, "nosniff".into());
    set(header::ACCEPT_RANGES, "bytes".into());
    set(header::ETAG, etag);
    if let Wanted::Part(Range { start, end }) = wanted {
        set(header::CONTENT_RANGE, format!("bytes {start}-{}/{}", end - 1, download.size_bytes));
    }
    // RFC 9530: the digest of the whole representation, on a part of it too.
    if let Ok(hash) = hex::decode(download.sha256) {
        set(HeaderName::from_static("repr-digest"), format!("sha-256=:{}:", BASE64_STANDARD.encode(hash)));
    }
    Ok(response)
}

/// Answers a worker with the whole object.
pub(super) async fn serve_whole(storage: &Storage, expected: Expected<'_>) -> Result<Response> {
    let body = streamed(storage.get(expected).await?);
    Ok(([(header::CONTENT_LENGTH, expected.size_bytes)], body).into_response())
}

/// A body that breaks the connection off where storage fails: a client must not take what it got for everything.
fn streamed(body: storage::Body) -> Body {
    let span = Span::current();
    Body::from_stream(body.inspect_err(move |error| {
        span.in_scope(|| tracing::error!(error = error as &dyn std::error::Error, "a download was broken off"));
    }))
}

/// Sends the client to a signed URL, which is a key for as long as it is good: nobody may keep it.
fn redirect(url: &str) -> Result<Response> {
    let mut location = HeaderValue::try_from(url).map_err(|error| ApiError::internal(&error))?;
    location.set_sensitive(true);
    let mut response = StatusCode::TEMPORARY_REDIRECT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, location);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}

fn lists(tags: &str, etag: &str) -> bool {
    tags.split(',').map(str::trim).any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

/// Reads one range; several at once, and what is no range, get everything, as RFC 9110 allows.
fn wanted(header: &str, size: u64) -> Wanted {
    let Some((unit, range)) = header.split_once('=') else { return Wanted::Everything };
    let Some((first, last)) = range.trim().split_once('-') else { return Wanted::Everything };
    let number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Wanted::Everything;
    }
    let range = match (first, last) {
        ("", last) => match number(last) {
            Some(length) => size.saturating_sub(length)..size,
            None => return Wanted::Everything,
        },
        (first, "") => match number(first) {
            Some(first) => first..size,
            None => return Wanted::Everything,
        },
        (first, last) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..size.min(last.saturating_add(1)),
            _ => return Wanted::Everything,
        },
    };
    if range.start < range.end { Wanted::Part(range) } else { Wanted::Nothing }
}

/// `attachment` with the name in ASCII for old clients and in UTF-8 as RFC 8187 spells it.
fn disposition(filename: &str) -> String {
    let is_plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '\\' && c != '%' || c == ' ';
    let ascii: String = filename.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
    let mut encoded = String::new();
    for byte in filename.bytes() {
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("attachment; filename=\"{ascii}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_what_there_is() {
        let cases = [
            ("bytes=0-0", Wanted::Part(0..1)),
            ("bytes=2-5", Wanted::Part(2..6)),
            ("bytes=2-", Wanted::Part(2..10)),
            ("bytes=5-99", Wanted::Part(5..10)),
            ("bytes=-3", Wanted::Part(7..10)),
            ("bytes=-99", Wanted::Part(0..10)),
            ("bytes=0-18446744073709551615", Wanted::Part(0..10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=10-12", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=5-2", Wanted::Everything),
            ("bytes=0-1,4-5", Wanted::Everything),
            ("bytes=+1-2", Wanted::Everything),
            ("bytes=a-b", Wanted::Everything),
            ("bytes=-", Wanted::Everything),
            ("lines=1-2", Wanted::Everything),
            ("bytes", Wanted::Everything),
        ];
        for (header, expected) in cases {
            assert_eq!(wanted(header, 10), expected, "{header}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Nothing);
        assert_eq!(wanted("bytes=-1", 0), Wanted::Nothing);
    }

    #[test]
    fn a_file_name_cannot_leave_its_quotes() {
        assert_eq!(disposition("a b.gguf"), "attachment; filename=\"a b.gguf\"; filename*=UTF-8''a%20b.gguf");
        assert_eq!(disposition("é\"\r\n"), "attachment; filename=\"____\"; filename*=UTF-8''%C3%A9%22%0D%0A");
    }
}
