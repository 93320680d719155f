//! `/metrics`: what the server holds and does, in Prometheus' text format 0.0.4.
//!
//! What the database knows is asked for when somebody asks; only answered requests are counted here, from the server's start.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::{GaugeVec, HistogramOpts, HistogramVec, Opts, Registry, TextEncoder};

use super::App;
use super::error::{ApiError, ErrorBody, Result};
use super::request::NoParams;
use crate::store::counts;
use crate::types::attempt::TaskKind;
use crate::types::device::Device;
use crate::types::job::Status;
use crate::types::now_ms;

/// Upper ends of the histogram of answers, in seconds: a small read takes one millisecond, an upload minutes.
const SECONDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0];

/// What is counted while the server runs; clones share it.
#[derive(Debug, Clone)]
pub(super) struct ServerMetrics {
    requests: HistogramVec,
    /// What trainings run on.
    devices: Vec<Device>,
    started_at: Instant,
}

impl ServerMetrics {
    /// Nothing counted yet.
    pub(super) fn new(devices: &[Device]) -> Self {
        let help = "Time from a request to the head of its answer, by route, method and class of status";
        let options = HistogramOpts::new("lorad_http_request_duration_seconds", help).buckets(SECONDS.to_vec());
        let requests =
            HistogramVec::new(options, &["route", "method", "status"]).expect("a name and labels of letters");
        Self { requests, devices: devices.to_vec(), started_at: Instant::now() }
    }

    /// Counts an answered request. `route` is the template, not the path: there are only so many.
    pub(super) fn answered(&self, route: &str, method: &Method, status: StatusCode, elapsed: Duration) {
        let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS];
        let method = if known.contains(method) { method.as_str() } else { "other" };
        let class = format!("{}xx", status.as_u16() / 100);
        self.requests.with_label_values(&[route, method, &class]).observe(elapsed.as_secs_f64());
    }
}

/// One answer's registry: figures of this moment, and those that are counted all the time.
struct Page(Registry);

impl Page {
    /// Adds a figure for each value of a label.
    fn add(&self, name: &str, help: &str, label: &str, values: &[(&str, f64)]) -> prometheus::Result<()> {
        let gauges = GaugeVec::new(Opts::new(name, help), &[label])?;
        for (of, value) in values {
            gauges.with_label_values(&[of]).set(*value);
        }
        self.0.register(Box::new(gauges))
    }

    /// Adds a figure without labels.
    fn add_one(&self, name: &str, help: &str, value: f64) -> prometheus::Result<()> {
        let gauge = prometheus::Gauge::new(name, help)?;
        gauge.set(value);
        self.0.register(Box::new(gauge))
    }
}

/// What the database knows.
struct Figures {
    jobs: Vec<(Status, i64)>,
    oldest_queued_at_ms: Option<i64>,
    live_attempts: Vec<(TaskKind, i64)>,
    trained_tokens: i64,
    held_devices: Vec<String>,
    last_step_ms: Vec<(String, i64)>,
    stored: counts::Stored,
}

/// What the server holds and does, for Prometheus.
///
/// It tells of all jobs, so it needs a key where there is one.
#[utoipa::path(get, path = "/metrics", operation_id = "serverMetrics", tag = "Server",
    responses((status = 200, description = "Text format 0.0.4", body = String, content_type = "text/plain"), (status = "default", description = "An error", body = ErrorBody)))]
pub(super) async fn metrics(State(app): State<App>, _: NoParams) -> Result<Response> {
    let mut conn = app.jobs.store.read().await?;
    let figures = Figures {
        jobs: counts::jobs(&mut conn).await?,
        oldest_queued_at_ms: counts::oldest_queued_at_ms(&mut conn).await?,
        live_attempts: counts::live_attempts(&mut conn).await?,
        held_devices: counts::held_devices(&mut conn).await?,
        trained_tokens: counts::trained_tokens(&mut conn).await?,
        last_step_ms: counts::last_step_ms(&mut conn).await?,
        stored: counts::stored_bytes(&mut conn).await?,
    };
    drop(conn);
    let text = page(&app.metrics, &figures).map_err(|error| ApiError::internal(&error))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

fn page(counted: &ServerMetrics, figures: &Figures) -> prometheus::Result<String> {
    let page = Page(Registry::new());
    let number =
        |status: Status| figures.jobs.iter().find(|(of, _)| *of == status).map_or(0, |(_, count)| *count) as f64;
    let jobs: Vec<_> = Status::ALL.iter().map(|status| (status.as_str(), number(*status))).collect();
    page.add("lorad_jobs", "Jobs by state", "status", &jobs)?;
    page.add_one("lorad_queue_jobs", "Jobs that wait for a device", number(Status::Queued))?;
    let oldest_ms = figures.oldest_queued_at_ms.map_or(0, |at_ms| (now_ms() - at_ms).max(0));
    let help = "How long the job has waited for a device that has waited longest; 0: none waits";
    page.add_one("lorad_queue_oldest_seconds", help, oldest_ms as f64 / 1000.0)?;
    let live = |task: TaskKind| figures.live_attempts.iter().find(|(of, _)| *of == task).map_or(0, |(_, count)| *count);
    let live: Vec<_> = TaskKind::ALL.iter().map(|task| (task.as_str(), live(*task) as f64)).collect();
    page.add("lorad_live_attempts", "Attempts that have not ended, by task", "task", &live)?;
    let help = "Tokens that had a loss, of all jobs that are there: it falls when a job is deleted";
    page.add_one("lorad_trained_tokens", help, figures.trained_tokens as f64)?;
    let of_devices: BTreeSet<String> =
        counted.devices.iter().map(Device::to_string).chain(figures.held_devices.iter().cloned()).collect();
    let busy = |name: &String| f64::from(u8::from(figures.held_devices.contains(name)));
    let busy: Vec<_> = of_devices.iter().map(|name| (name.as_str(), busy(name))).collect();
    page.add("lorad_device_busy", "1: a training or an export holds the device; 0: it is free", "device", &busy)?;
    if !figures.last_step_ms.is_empty() {
        let help =
            "Time that the last step of the job took which trains on the device; absent while none has trained a step";
        let steps: Vec<_> = figures.last_step_ms.iter().map(|(of, step_ms)| (of.as_str(), *step_ms as f64)).collect();
        page.add("lorad_last_step_milliseconds", help, "device", &steps)?;
    }
    let counts::Stored { files, checkpoints, artifacts, upload_parts } = figures.stored;
    let stored = [
        ("files", files as f64),
        ("checkpoints", checkpoints as f64),
        ("artifacts", artifacts as f64),
        ("upload_parts", upload_parts as f64),
    ];
    page.add("lorad_stored_bytes", "Bytes in object storage, by kind", "kind", &stored)?;
    page.add_one("lorad_uptime_seconds", "Time since the server started", counted.started_at.elapsed().as_secs_f64())?;
    page.add("lorad_build_info", "The server's version, as a label", "version", &[(env!("CARGO_PKG_VERSION"), 1.0)])?;
    page.0.register(Box::new(counted.requests.clone()))?;
    TextEncoder::new().encode_to_string(&page.0.gather())
}
