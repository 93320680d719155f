//! Uploads in parts that were begun in a bucket and never ended: the server was killed, or storage was away when they were to be
//! taken back. Their parts are in no list of objects, and are paid for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use object_store::aws::AmazonS3;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::signer::{SignedUrlOptions, Signer};
use reqwest::{Client, Method, StatusCode};
use serde::Deserialize;

use super::keys::is_key;
use super::{Error, SIGNED_FOR};

/// A bucket's uploads.
#[derive(Debug)]
pub(super) struct Abandoned {
    bucket: AmazonS3,
    prefix: Path,
    http: Client,
}

/// A page of the list of uploads.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page {
    #[serde(default)]
    upload: Vec<Upload>,
    #[serde(default)]
    is_truncated: bool,
    next_key_marker: Option<String>,
    next_upload_id_marker: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Upload {
    key: String,
    upload_id: String,
}

impl Abandoned {
    /// The uploads below `prefix`; a request may take as long as `timeout`.
    pub(super) fn new(bucket: AmazonS3, prefix: Path, timeout: Duration) -> Result<Self, Error> {
        let http = Client::builder().timeout(timeout).build().map_err(failed)?;
        Ok(Self { bucket, prefix, http })
    }

    /// Takes back the uploads of our objects that began longer than `age` ago, and counts them.
    pub(super) async fn abort_older_than(&self, age: Duration) -> Result<usize, Error> {
        let (mut markers, mut count) = (None, 0);
        loop {
            let Some(page) = self.page(markers.as_ref()).await? else { return Ok(count) };
            for Upload { key, upload_id } in page.upload {
                let Some(ours) = self.ours(&key).filter(|key| is_older(key, age)) else { continue };
                let path = Path::from_iter(self.prefix.parts().chain(Path::from(ours).parts()));
                match self.bucket.abort_multipart(&path, &upload_id).await {
                    // It may have come to its end meanwhile.
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => count += 1,
                    Err(error) => return Err(Error::Backend(error)),
                }
            }
            let next = page.next_key_marker.zip(page.next_upload_id_marker).filter(|_| page.is_truncated);
            // A service that gives the same page for ever would keep the sweep for ever.
            if next.is_none() || next == markers {
                return Ok(count);
            }
            markers = next;
        }
    }

    /// The key as we know it, if the upload is one of ours.
    fn ours<'a>(&self, key: &'a str) -> Option<&'a str> {
        let key = match self.prefix.as_ref() {
            "" => key,
            prefix => key.strip_prefix(prefix)?.strip_prefix('/')?,
        };
        is_key(key).then_some(key)
    }

    /// One page of the list; `None`: the service has no such list.
    async fn page(&self, markers: Option<&(String, String)>) -> Result<Option<Page>, Error> {
        let prefix = self.prefix.as_ref();
        let mut query = vec![("uploads", String::new()), ("prefix", prefix.to_owned())];
        if let Some((key, id)) = markers {
            query.extend([("key-marker", key.clone()), ("upload-id-marker", id.clone())]);
        }
        let options = SignedUrlOptions::new().with_query(query);
        let bucket = Path::default();
        let url = self.bucket.signed_url_opts(Method::GET, &bucket, SIGNED_FOR, &options).await;
        let response = self.http.get(url.map_err(Error::Backend)?).send().await.map_err(failed)?;
        match response.status() {
            StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED | StatusCode::METHOD_NOT_ALLOWED => return Ok(None),
            _ => (),
        }
        let text = response.error_for_status().map_err(failed)?.text().await.map_err(failed)?;
        quick_xml::de::from_str(&text).map(Some).map_err(|error| generic(Box::new(error)))
    }
}

/// The id that a key ends in tells when it was made.
fn is_older(key: &str, age: Duration) -> bool {
    let digits = key.rsplit(['-', '_', '/']).next().unwrap_or_default();
    let made = uuid::Uuid::try_parse(digits).ok().and_then(|id| id.get_timestamp()).map(|at| at.to_unix());
    made.is_some_and(|(seconds, nanos)| {
        let made = UNIX_EPOCH + Duration::new(seconds, nanos);
        SystemTime::now().duration_since(made).is_ok_and(|elapsed| elapsed > age)
    })
}

/// The URL stays out of it: it is signed.
fn failed(error: reqwest::Error) -> Error {
    generic(Box::new(error.without_url()))
}

fn generic(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Backend(object_store::Error::Generic { store: "S3", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{checkpoint_key, file_key, upload_part_key};
    use crate::types::ids::{CheckpointId, FileId, JobId, PartId, UploadId};

    #[test]
    fn a_key_tells_its_age() {
        for key in [
            file_key(&FileId::new().to_string()),
            checkpoint_key(&JobId::new().to_string(), &CheckpointId::new().to_string()),
            upload_part_key(&UploadId::new().to_string(), &PartId::new().to_string()),
        ] {
            std::thread::sleep(Duration::from_millis(2));
            assert!(is_key(&key) && is_older(&key, Duration::ZERO), "{key}");
            assert!(!is_older(&key, Duration::from_secs(3600)), "{key}");
        }
        assert!(!is_older("files/notes.txt", Duration::ZERO));
    }

    #[test]
    fn a_list_is_read() {
        let xml = "<ListMultipartUploadsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Bucket>b</Bucket>\
                   <NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>2</NextUploadIdMarker><IsTruncated>true</IsTruncated>\
                   <Upload><Key>a</Key><UploadId>1</UploadId><Initiated>x</Initiated></Upload>\
                   <Upload><Key>b</Key><UploadId>2</UploadId></Upload></ListMultipartUploadsResult>";
        let page: Page = quick_xml::de::from_str(xml).expect("a page");
        assert!(page.is_truncated && page.upload.len() == 2 && page.upload[1].upload_id == "2");
        let page: Page = quick_xml::de::from_str("<ListMultipartUploadsResult/>").expect("a page");
        assert!(!page.is_truncated && page.upload.is_empty());
    }
}
