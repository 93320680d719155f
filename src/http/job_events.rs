//! `/v1/fine_tuning/jobs/{id}/events`: a job's story as a list (newest first) or as a stream (oldest first, then live).
//!
//! Both read the same table. A stream ends in `data: [DONE]` once the job has come to its end and everything was told.
//! `id:` lines and heartbeats are sent only to a client that says `Accept: text/event-stream`: the official client does not
//! say so, and its decoder takes a heartbeat after an `id:` for an event.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, stream};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::App;
use super::access::Owner;
use super::error::{ApiError, ErrorBody, Result};
use super::fine_tuning_jobs::find;
use super::list::List;
use super::request::Params;
use crate::store;
use crate::types::event::{Event, EventType, Level};
use crate::types::ids::{EventId, JobId};

/// Events that a stream reads at once.
const BATCH: i64 = 256;
/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Longest wait for news before looking anyway.
const POLL: Duration = Duration::from_secs(10);

/// An event, as OpenAI shows it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = FineTuningJobEvent)]
pub(super) struct EventView {
    /// Always `fine_tuning.job.event`.
    #[schema(value_type = String, example = "fine_tuning.job.event")]
    object: &'static str,
    /// Its id, `ftevent-…`.
    id: String,
    /// When it was written, in Unix seconds.
    created_at: i64,
    /// How serious it is.
    level: Level,
    /// The sentence.
    message: String,
    /// What it tells.
    #[serde(rename = "type")]
    kind: EventType,
    /// The figures of a step.
    #[schema(value_type = Option<Object>)]
    data: Option<Value>,
}

impl From<Event> for EventView {
    fn from(event: Event) -> Self {
        Self {
            object: "fine_tuning.job.event",
            id: event.id.to_string(),
            created_at: event.created_at_ms / 1000,
            level: event.level,
            message: event.message,
            kind: event.kind,
            data: event.data,
        }
    }
}

/// List a job's events, or follow them.
///
/// The list is newest first, and `after` means *older than*. With `stream=true` the answer is a stream of server-sent
/// events, oldest first, past ones and then live ones, until the job ends and `[DONE]`; there `after`, or the header
/// `Last-Event-ID`, means *newer than*.
#[utoipa::path(get, path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", operation_id = "listFineTuningEvents", tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "Id of the job"),
        ("after" = Option<String>, Query, pattern = "^ftevent-[0-9a-f]{32}$", description = "Id of an event"),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 1000, description = "1 to 1000, default 20; only for the list"),
        ("stream" = Option<bool>, Query, description = "Follow the events"),
        ("Last-Event-ID" = Option<String>, Header, description = "With stream=true: id of the last event that was seen")),
    responses((status = 200, description = "A page of the list, or the stream",
            content((List<EventView> = "application/json"), (String = "text/event-stream"))), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn list(
    State(app): State<App>,
    Owner(owner): Owner,
    Path(id): Path<String>,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response> {
    let job = find(&app, &owner, &id).await?;
    let streaming = params.take("stream")?.unwrap_or(false);
    let after = params.take::<EventId>("after")?;
    if streaming {
        params.finish()?;
        let seq = match after.map_or_else(|| last_event_id(&headers), |after| Ok(Some(after)))? {
            Some(after) => seq_of(&app, job.id, after).await?,
            None => 0,
        };
        return Ok(follow(app, job.id, seq, wants_sse(&headers)));
    }
    let limit = params.limit(20, 1000)?;
    params.finish()?;
    let below = match after {
        Some(after) => seq_of(&app, job.id, after).await?,
        None => i64::MAX,
    };
    let mut conn = app.jobs.store.read().await?;
    let events = store::event::older_than(&mut conn, job.id, below, limit + 1).await?;
    let events = events.into_iter().map(EventView::from).collect();
    Ok(Json(List::page(events, limit, |event: &EventView| event.id.clone())).into_response())
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<EventId>> {
    const NAME: &str = "last-event-id";
    let Some(value) = headers.get(NAME) else { return Ok(None) };
    let id = value.to_str().map_err(|error| error.to_string()).and_then(str::parse);
    id.map(Some).map_err(|error| ApiError::bad_request(NAME, format!("{NAME} {error}")))
}

async fn seq_of(app: &App, job: JobId, event: EventId) -> Result<i64> {
    let mut conn = app.jobs.store.read().await?;
    let seq = store::event::seq_of(&mut conn, job, event).await?;
    seq.ok_or_else(|| ApiError::bad_request("after", format!("job {job} has no event {event}")))
}

fn wants_sse(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accept.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("text/event-stream"))
}

fn follow(app: App, job: JobId, seq: i64, wants_sse: bool) -> Response {
    let news = app.jobs.event_news();
    let follower = Follower { app, job, seq, wants_sse, news, waiting: VecDeque::new(), ended: false };
    let stream = Sse::new(follower.into_stream());
    if wants_sse {
        stream.keep_alive(KeepAlive::new().interval(HEARTBEAT)).into_response()
    } else {
        stream.into_response()
    }
}

struct Follower {
    app: App,
    job: JobId,
    /// Number of the last event that was read.
    seq: i64,
    wants_sse: bool,
    news: watch::Receiver<u64>,
    waiting: VecDeque<sse::Event>,
    ended: bool,
}

impl Follower {
    fn into_stream(self) -> impl Stream<Item = Result<sse::Event, Infallible>> {
        stream::unfold(self, |mut follower| async move {
            let event = follower.next().await?;
            Some((Ok(event), follower))
        })
    }

    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.read().await {
                Ok(true) => {}
                Ok(false) => tokio::select! {
                    () = self.app.shutdown.cancelled() => return None,
                    _ = tokio::time::timeout(POLL, self.news.changed()) => {}
                },
                Err(error) => {
                    self.ended = true;
                    let body = serde_json::to_string(&error.body()).expect("an error body is JSON");
                    self.waiting.push_back(sse::Event::default().data(body));
                }
            }
        }
    }

    /// Reads what is new; `false`: nothing is, and the job goes on.
    async fn read(&mut self) -> Result<bool> {
        self.news.mark_unchanged();
        let mut conn = self.app.jobs.store.read().await?;
        let mut events = store::event::newer_than(&mut conn, self.job, self.seq, BATCH).await?;
        if events.is_empty() {
            // First the state, then the events once more: an end that is seen has its last event behind it.
            let job = store::job::get(&mut conn, self.job).await?;
            if job.is_some_and(|job| !job.status.is_final()) {
                return Ok(false);
            }
            events = store::event::newer_than(&mut conn, self.job, self.seq, BATCH).await?;
            if events.is_empty() {
                self.waiting.push_back(sse::Event::default().data("[DONE]"));
                self.ended = true;
                return Ok(true);
            }
        }
        for event in events {
            self.seq = event.seq;
            let id = event.id.to_string();
            let data = serde_json::to_string(&EventView::from(event)).expect("an event is JSON");
            let line = sse::Event::default().data(data);
            self.waiting.push_back(if self.wants_sse { line.id(id) } else { line });
        }
        Ok(true)
    }
}
