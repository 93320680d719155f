//! Serving connections, and the patience that the server has with each: a client that trickles keeps nobody else waiting, and ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::error::ApiError;

/// Bytes of a body that must come within the time that the server waits for them.
const LEAST_BYTES: usize = 1024;

/// Serves connections until `shutdown` is cancelled, then those that are open to their end. A connection whose headers take
/// longer than `patience`, or that says nothing for so long, is closed.
pub async fn serve(mut listener: TcpListener, router: Router, patience: Duration, shutdown: CancellationToken) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(patience);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // A failure to accept is waited out in there.
            (io, _) = Listener::accept(&mut listener) => {
                connections.spawn(connection(builder.clone(), io, router.clone(), shutdown.clone()));
            }
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a connection's task panicked");
                }
            }
            () = shutdown.cancelled() => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection<Io>(builder: http1::Builder, io: Io, router: Router, shutdown: CancellationToken)
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke off");
    }
}

/// Answers 503 where the server waits for less than [`LEAST_BYTES`] of the body for `patience`.
pub(super) async fn watch_body(State(patience): State<Duration>, request: Request, next: Next) -> Response {
    let stalled = Arc::new(AtomicBool::new(false));
    let watched = request.map(|body| Body::from_stream(watch(body.into_data_stream(), patience, stalled.clone())));
    let response = next.run(watched).await;
    if !stalled.load(Ordering::Relaxed) {
        return response;
    }
    let seconds = patience.as_secs();
    ApiError::unavailable(format!("less than {LEAST_BYTES} bytes of the body came in {seconds} s")).into_response()
}

/// The chunks of a body; an error once it stalls. Only the time that the server waits counts, not what it does between.
fn watch(
    body: BodyDataStream,
    patience: Duration,
    stalled: Arc<AtomicBool>,
) -> impl Stream<Item = Result<Bytes, axum::Error>> {
    let start = (body, Duration::ZERO, 0);
    stream::unfold(start, move |(mut body, mut waited, mut came)| {
        let stalled = stalled.clone();
        async move {
            let began = Instant::now();
            let chunk = match timeout(patience.saturating_sub(waited), body.next()).await {
                Ok(chunk) => chunk?,
                Err(elapsed) => {
                    stalled.store(true, Ordering::Relaxed);
                    Err(axum::Error::new(elapsed))
                }
            };
            waited += began.elapsed();
            came += chunk.as_ref().map_or(0, Bytes::len);
            if came >= LEAST_BYTES {
                (waited, came) = (Duration::ZERO, 0);
            }
            Some((chunk, (body, waited, came)))
        }
    })
}
