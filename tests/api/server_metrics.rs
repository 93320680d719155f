//! `/metrics`, as Prometheus reads it.

use lorad::types::attempt::TaskKind;
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{TestApp, error, metric, text};

/// The value of a sample, by its name and labels.
fn value(page: &str, sample: &str) -> Option<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '))?;
    Some(line.parse().expect("a number"))
}

async fn page(app: &TestApp) -> String {
    app.get("/metrics").await.text().await.expect("a body")
}

#[tokio::test]
async fn the_figures_are_those_of_the_database() {
    let app = TestApp::start().await;
    let empty = page(&app).await;
    for (sample, expected) in [
        ("lorad_jobs{status=\"queued\"}", Some(0.0)),
        ("lorad_queue_jobs", Some(0.0)),
        ("lorad_queue_oldest_seconds", Some(0.0)),
        ("lorad_live_attempts{task=\"train\"}", Some(0.0)),
        ("lorad_trained_tokens", Some(0.0)),
        ("lorad_last_step_milliseconds{device=\"cpu\"}", None),
        ("lorad_device_busy{device=\"cpu\"}", Some(0.0)),
        ("lorad_stored_bytes{kind=\"files\"}", Some(0.0)),
    ] {
        assert_eq!(value(&empty, sample), expected, "{sample}: {empty}");
    }
    for _ in 0..3 {
        app.create_job(json!({})).await;
    }
    app.validate().await;
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    worker.post("events", &json!({"metrics": [metric(1, 9), metric(2, 9)]})).await;
    worker.put_checkpoint(2, true, b"checkpoint").await;

    let response = app.get("/metrics").await;
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let page = response.text().await.expect("a body");
    let rows = 3 * 10 * crate::support::ROWS.len();
    for (sample, expected) in [
        ("lorad_jobs{status=\"validating_files\"}", 1.0),
        ("lorad_jobs{status=\"queued\"}", 1.0),
        ("lorad_jobs{status=\"running\"}", 1.0),
        ("lorad_queue_jobs", 1.0),
        ("lorad_live_attempts{task=\"train\"}", 1.0),
        ("lorad_live_attempts{task=\"validate\"}", 0.0),
        ("lorad_trained_tokens", 20.0),
        ("lorad_last_step_milliseconds{device=\"cpu\"}", 5.0),
        ("lorad_device_busy{device=\"cpu\"}", 1.0),
        ("lorad_stored_bytes{kind=\"files\"}", rows as f64),
        ("lorad_stored_bytes{kind=\"checkpoints\"}", 10.0),
        ("lorad_stored_bytes{kind=\"artifacts\"}", 0.0),
        ("lorad_stored_bytes{kind=\"upload_parts\"}", 0.0),
        (concat!("lorad_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
    ] {
        assert_eq!(value(&page, sample), Some(expected), "{sample}: {page}");
    }
    assert!(value(&page, "lorad_queue_oldest_seconds").is_some_and(|seconds| (0.0..600.0).contains(&seconds)));
    assert!(value(&page, "lorad_uptime_seconds").is_some_and(|seconds| seconds > 0.0));
    assert!(page.contains("# TYPE lorad_jobs gauge\n"), "{page}");
}

#[tokio::test]
async fn requests_are_counted_by_the_templates_of_their_routes() {
    let app = TestApp::start().await;
    let job = text(&app.create_job(json!({})).await["id"]);
    for id in [job.as_str(), job.as_str(), "ftjob-1"] {
        app.get(&format!("/v1/fine_tuning/jobs/{id}")).await;
    }
    for path in ["/nowhere", "/v1/elsewhere/ftjob-1"] {
        error(app.get(path).await, StatusCode::NOT_FOUND).await;
    }
    let odd = Method::from_bytes(b"BREW").expect("a method");
    app.request(odd, "/nowhere").send().await.expect("an answer");
    let page = page(&app).await;
    let count = |route: &str, method: &str, status: &str| {
        let labels = format!("{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}}");
        value(&page, &format!("lorad_http_request_duration_seconds_count{labels}"))
    };
    const JOB: &str = "/v1/fine_tuning/jobs/{fine_tuning_job_id}";
    assert_eq!(count(JOB, "GET", "2xx"), Some(2.0), "{page}");
    assert_eq!(count(JOB, "GET", "4xx"), Some(1.0), "{page}");
    assert_eq!(count("none", "GET", "4xx"), Some(2.0), "{page}");
    assert_eq!(count("none", "other", "4xx"), Some(1.0), "{page}");
    assert!(!page.contains("elsewhere") && !page.contains("ftjob-"), "{page}");
    assert!(page.contains("# TYPE lorad_http_request_duration_seconds histogram\n"), "{page}");
    let bucket = format!(
        "lorad_http_request_duration_seconds_bucket{{method=\"GET\",route=\"{JOB}\",status=\"2xx\",le=\"+Inf\"}}"
    );
    assert_eq!(value(&page, &bucket), Some(2.0), "{page}");
}

#[tokio::test]
async fn the_figures_of_all_jobs_need_the_key() {
    let app = TestApp::start_with(|config| config.auth.bootstrap_key = Some("sk-secret".into())).await;
    error(app.get("/metrics").await, StatusCode::UNAUTHORIZED).await;
    let request = app.request(Method::GET, "/metrics").bearer_auth("sk-secret");
    let page = request.send().await.expect("an answer").text().await.expect("a body");
    assert!(page.contains("{method=\"GET\",route=\"/metrics\",status=\"4xx\"} 1\n"), "{page}");
}
