//! `/v1/fine_tuning/jobs/{id}/logs`: what the workers of a job wrote, attempt by attempt, read in pieces.

use std::io::ErrorKind;
use std::time::Duration;

use axum::BoxError;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::{Stream, TryStreamExt, stream};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, Take};

use super::App;
use super::access::Owner;
use super::error::{ErrorBody, Result};
use super::fine_tuning_jobs::find;
use super::request::Params;
use crate::jobs::launcher::{ProcessIdentity, log_path};
use crate::store;
use crate::types::attempt::{Attempt, AttemptState};
use crate::types::ids::{AttemptId, JobId};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 << 10;
/// Time between two looks whether a log has grown.
const POLL: Duration = Duration::from_millis(500);

/// Read the logs of a job's workers, or follow them.
///
/// The log of every attempt that still has one, oldest first, each behind a line that names the attempt. With `stream=true`
/// the answer goes on until the job has come to its end.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/logs", operation_id = "readFineTuningLogs", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job"),
        ("stream" = Option<bool>, Query, description = "Go on until the job ends")),
    responses((status = 200, description = "The logs", body = String, content_type = "text/plain"), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn read(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    mut params: Params,
) -> Result<Response> {
    let following = params.take("stream")?.unwrap_or(false);
    params.finish()?;
    let job = find(&app, &owner, &id).await?.id;
    let reader = Reader { app, job, following, number: 0, log: None, in_line: false };
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((headers, Body::from_stream(reader.into_stream())).into_response())
}

struct Reader {
    app: App,
    job: JobId,
    following: bool,
    /// Number of the last attempt whose log was opened, or that has none.
    number: i64,
    log: Option<Log>,
    /// Whether what was read so far ends within a line.
    in_line: bool,
}

/// The log that is being read.
struct Log {
    attempt: AttemptId,
    /// Up to its length when it was opened, or its end where it is followed.
    file: Take<File>,
    /// Nothing writes to it any more.
    is_complete: bool,
}

impl Reader {
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, BoxError>> {
        let pieces = stream::try_unfold(self, |mut reader| async move {
            let piece = reader.next().await?;
            Ok(piece.map(|piece| (piece, reader)))
        });
        pieces.inspect_err(|error: &BoxError| tracing::error!(error, "a log breaks off"))
    }

    /// The next piece; `None`: that was all.
    async fn next(&mut self) -> Result<Option<Bytes>, BoxError> {
        loop {
            match &mut self.log {
                Some(log) => {
                    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
                    if log.file.read_buf(&mut piece).await? > 0 {
                        self.in_line = !piece.ends_with(b"\n");
                        return Ok(Some(piece.freeze()));
                    }
                    if log.is_complete || !self.following {
                        self.log = None;
                        continue;
                    }
                    // What came before this look is read after it.
                    let attempt = log.attempt;
                    log.is_complete = !is_written(&self.app, attempt).await?;
                    if log.is_complete {
                        continue;
                    }
                }
                None => {
                    // First the state, then the attempts: an end that is seen has its last attempt behind it.
                    let is_last = !self.following || self.is_over().await?;
                    if let Some(head) = self.open().await? {
                        return Ok(Some(head));
                    }
                    if is_last {
                        return Ok(None);
                    }
                }
            }
            tokio::select! {
                () = self.app.shutdown.cancelled() => return Ok(None),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    async fn is_over(&self) -> Result<bool, BoxError> {
        let job = store::job::get(&mut *self.app.jobs.store.read().await?, self.job).await?;
        Ok(job.is_none_or(|job| job.status.is_final()))
    }

    /// Opens the log of the next attempt that has one, and gives the line before it.
    async fn open(&mut self) -> Result<Option<Bytes>, BoxError> {
        let attempts = store::attempt::of_job(&mut *self.app.jobs.store.read().await?, self.job).await?;
        for attempt in attempts.into_iter().filter(|attempt| attempt.number > self.number) {
            let file = match File::open(log_path(&self.app.logs_dir, attempt.id)).await {
                Ok(file) => file,
                // It may get one yet.
                Err(error) if error.kind() == ErrorKind::NotFound && attempt.state != AttemptState::Ended => break,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
            let length = if self.following { u64::MAX } else { file.metadata().await?.len() };
            let Attempt { id, number, task, .. } = attempt;
            let new_line = if self.in_line { "\n" } else { "" };
            self.number = number;
            self.in_line = false;
            self.log = Some(Log { attempt: id, file: file.take(length), is_complete: false });
            return Ok(Some(Bytes::from(format!("{new_line}=== attempt {number}: {task} ({id}) ===\n"))));
        }
        Ok(None)
    }
}

/// Whether an attempt's worker may still write to its log: after its last word to the server it lives for a moment.
async fn is_written(app: &App, attempt: AttemptId) -> Result<bool, store::Error> {
    let attempt = store::attempt::find(&mut *app.jobs.store.read().await?, attempt).await?;
    let Some(attempt) = attempt else { return Ok(false) };
    let pid = attempt.pid.and_then(|pid| i32::try_from(pid).ok());
    let process = pid.zip(attempt.process_start_time).map(|(pid, start_time)| ProcessIdentity { pid, start_time });
    Ok(attempt.state != AttemptState::Ended || process.is_some_and(ProcessIdentity::is_alive))
}
