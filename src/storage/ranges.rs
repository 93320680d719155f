//! The connection to a service, with one repair: rclone's S3 face gives the range that it was asked for and says `200` to it, where
//! the standard has `206`, which the client insists on.

use futures::future::BoxFuture;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};

/// Makes such connections.
#[derive(Debug, Default)]
pub(super) struct Connector(ReqwestConnector);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Service(self.0.connect(options)?)))
    }
}

#[derive(Debug)]
struct Service(HttpClient);

impl HttpService for Service {
    fn call<'a, 'future>(&'a self, request: HttpRequest) -> BoxFuture<'future, Result<HttpResponse, HttpError>>
    where
        'a: 'future,
        Self: 'future,
    {
        Box::pin(async move {
            let is_range = request.headers().contains_key(RANGE);
            let mut response = self.0.execute(request).await?;
            if is_range && response.status() == StatusCode::OK && response.headers().contains_key(CONTENT_RANGE) {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
            Ok(response)
        })
    }
}
