//! Reading one object: resumed where the connection breaks, and checked against what the database knows of it.
//!
//! The last piece of an object is handed on only once the whole has the right hash, so that a reader that gets everything has
//! got the right bytes.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore};
use sha2::{Digest, Sha256};

use super::{Body, Error};

/// How often in a row a body that breaks off without another byte is gone on with.
const MOST_RESUMES: u32 = 3;

/// An object, as the database knows it.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Its key.
    pub key: &'a str,
    /// How many bytes it has.
    pub size_bytes: u64,
    /// Hash of its bytes in lower-case hex; `None`: the length is all that is known.
    pub sha256: Option<&'a str>,
}

/// Opens the whole object.
pub(super) async fn whole(backend: Arc<dyn ObjectStore>, expected: Expected<'_>) -> Result<Body, Error> {
    let body = open(backend, expected, 0..expected.size_bytes).await?;
    Ok(match expected.sha256 {
        Some(sha256) => verified(body, expected.key.to_owned(), sha256.to_owned()),
        None => body,
    })
}

/// Opens the bytes `range` of the object, which must lie inside it.
pub(super) async fn open(
    backend: Arc<dyn ObjectStore>,
    expected: Expected<'_>,
    range: Range<u64>,
) -> Result<Body, Error> {
    let Expected { key, size_bytes, .. } = expected;
    let path = Path::from(key);
    let part = (range != (0..size_bytes)).then(|| range.clone());
    let object = request(&*backend, &path, part).await.map_err(|error| match error {
        object_store::Error::NotFound { .. } => Error::NotFound(key.to_owned()),
        error => Error::Backend(error),
    })?;
    if object.meta.size != size_bytes {
        return Err(damaged(key, format!("it has {} bytes, expected were {size_bytes}", object.meta.size)));
    }
    let bytes = object.into_stream().boxed();
    let reading = Reading { backend, path, bytes, rest: range, resumes: 0 };
    Ok(stream::try_unfold(reading, Reading::next).boxed())
}

async fn request(backend: &dyn ObjectStore, path: &Path, range: Option<Range<u64>>) -> object_store::Result<GetResult> {
    let options = GetOptions { range: range.map(GetRange::Bounded), ..GetOptions::default() };
    backend.get_opts(path, options).await
}

/// A body under way.
struct Reading {
    backend: Arc<dyn ObjectStore>,
    path: Path,
    bytes: BoxStream<'static, object_store::Result<Bytes>>,
    /// The bytes that are still to come.
    rest: Range<u64>,
    /// How often it was gone on with since the last byte.
    resumes: u32,
}

impl Reading {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, Error> {
        loop {
            let error = match self.bytes.next().await {
                Some(Ok(chunk)) if chunk.is_empty() => continue,
                Some(Ok(chunk)) if chunk.len() as u64 > self.rest.end - self.rest.start => {
                    return Err(damaged(self.path.as_ref(), format!("more than {} bytes came", self.rest.end)));
                }
                Some(Ok(chunk)) => {
                    self.rest.start += chunk.len() as u64;
                    self.resumes = 0;
                    return Ok(Some((chunk, self)));
                }
                None if self.rest.is_empty() => return Ok(None),
                None => damaged(self.path.as_ref(), format!("it broke off before byte {}", self.rest.start)),
                Some(Err(error)) => Error::Backend(error),
            };
            if self.resumes == MOST_RESUMES || self.rest.is_empty() {
                return Err(error);
            }
            self.resumes += 1;
            tracing::debug!(key = %self.path, %error, "going on with a body that broke off");
            let object = request(&*self.backend, &self.path, Some(self.rest.clone())).await.map_err(Error::Backend)?;
            self.bytes = object.into_stream().boxed();
        }
    }
}

/// Holds the last piece back until the hash of everything is the right one.
fn verified(body: Body, key: String, sha256: String) -> Body {
    let state = (body, Sha256::new(), None::<Bytes>, (key, sha256));
    let pieces = stream::try_unfold(state, |(mut body, mut hash, mut held, wanted)| async move {
        loop {
            match body.try_next().await? {
                Some(chunk) => {
                    hash.update(&chunk);
                    if let Some(piece) = held.replace(chunk) {
                        return Ok(Some((piece, (body, hash, held, wanted))));
                    }
                }
                None => {
                    let (key, sha256) = &wanted;
                    // Nothing is held of an object without bytes, nor after the last piece was handed on.
                    let Some(piece) = held.take() else { return Ok(None) };
                    let found = hex::encode(hash.clone().finalize());
                    if found != *sha256 {
                        return Err(damaged(key, format!("its bytes have sha256 {found}, expected was {sha256}")));
                    }
                    return Ok(Some((piece, (stream::empty().boxed(), hash, None, wanted))));
                }
            }
        }
    });
    pieces.boxed()
}

fn damaged(key: &str, how: String) -> Error {
    Error::Damaged { key: key.to_owned(), how }
}
