//! The figures of a job's steps: list, table, picture.

use lorad::types::attempt::TaskKind;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{TestApp, error, metric, text};

/// A job that has trained `steps` steps, the last one evaluated, and the path of its metrics.
async fn with_steps(steps: i64) -> (TestApp, String) {
    let app = TestApp::start().await;
    let job = app.create_job(json!({})).await;
    app.validate().await;
    let worker = app.take_up(TaskKind::Train).await;
    let mut metrics: Vec<Value> = (1..=steps).map(|step| metric(step, steps)).collect();
    if let Some(last) = metrics.last_mut() {
        last["valid_loss"] = json!(1.25);
        last["valid_mean_token_accuracy"] = json!(0.75);
    }
    for some in metrics.chunks(500) {
        worker.post("events", &json!({ "metrics": some })).await;
    }
    (app, format!("/v1/fine_tuning/jobs/{}/metrics", text(&job["id"])))
}

fn steps(list: &Value) -> Vec<i64> {
    let items = list["data"].as_array().expect("a list");
    items.iter().map(|item| item["step"].as_i64().expect("a number")).collect()
}

#[tokio::test]
async fn steps_are_listed_oldest_first_and_by_page() {
    let (app, path) = with_steps(5).await;
    let list = app.get_json(&path).await;
    assert_eq!((steps(&list), &list["object"], &list["has_more"]), ((1..=5).collect(), &json!("list"), &json!(false)));
    let mut first = list["data"][0].clone();
    assert!(first["created_at"].take().as_i64().is_some_and(|at| at > 1_700_000_000), "{list}");
    let expected = json!({
        "object": "fine_tuning.job.metric", "step": 1, "total_steps": 5, "epoch": 1.0, "train_loss": 2.0,
        "train_mean_token_accuracy": 0.5, "learning_rate": 0.0002, "grad_norm": 1.0, "trained_tokens": 10, "step_ms": 5,
        "valid_loss": null, "valid_mean_token_accuracy": null, "created_at": null,
    });
    assert_eq!(first, expected);
    assert_eq!(list["data"][4]["valid_loss"], 1.25);
    for (query, expected, has_more) in [
        ("limit=2", vec![1, 2], true),
        ("after=2&limit=2", vec![3, 4], true),
        ("after=4&limit=1", vec![5], false),
        ("after=5", vec![], false),
    ] {
        let page = app.get_json(&format!("{path}?{query}")).await;
        assert_eq!((steps(&page), &page["has_more"]), (expected, &json!(has_more)), "{query}");
    }
    for (query, param) in
        [("limit=0", "limit"), ("limit=10001", "limit"), ("after=x", "after"), ("colour=red", "colour")]
    {
        let error = error(app.get(&format!("{path}?{query}")).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(error["param"], param);
    }
}

#[tokio::test]
async fn the_table_has_every_step_however_many() {
    let (app, path) = with_steps(2001).await;
    let response = app.get(&format!("{path}.csv")).await;
    assert_eq!(response.headers()["content-type"], "text/csv; charset=utf-8");
    let table = response.text().await.expect("a body");
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(
        lines[0],
        "step,total_steps,epoch,train_loss,train_mean_token_accuracy,learning_rate,grad_norm,trained_tokens,step_ms,\
         valid_loss,valid_mean_token_accuracy,created_at"
    );
    assert_eq!(lines.len(), 2002);
    assert!(lines[1].starts_with("1,2001,1,2,0.5,0.0002,1,10,5,,,1"), "{}", lines[1]);
    assert!(lines[2001].starts_with("2001,2001,2001,"), "{}", lines[2001]);
    assert!(lines[2001].contains(",20010,5,1.25,0.75,1"), "{}", lines[2001]);
}

#[tokio::test]
async fn the_picture_is_drawn_by_the_server_and_can_do_nothing() {
    let (app, path) = with_steps(40).await;
    let response = app.get(&format!("{path}.svg")).await;
    let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
    assert_eq!(header("content-type"), "image/svg+xml");
    assert_eq!(header("content-security-policy"), "default-src 'none'; style-src 'unsafe-inline'");
    assert_eq!(header("x-content-type-options"), "nosniff");
    let picture = response.text().await.expect("a body");
    let job = path.split('/').nth(4).expect("an id");
    for part in [job, "local:tiny.gguf · running · step 40 of 40", "<polyline class=\"smooth\"", "class=\"valid\""] {
        assert!(picture.contains(part), "{part}: {picture}");
    }
    assert!(!picture.contains("<script") && !picture.contains("href"), "{picture}");
}

#[tokio::test]
async fn a_job_that_never_trained_has_empty_metrics_and_one_that_is_not_there_none() {
    let app = TestApp::start().await;
    let path = format!("/v1/fine_tuning/jobs/{}/metrics", text(&app.create_job(json!({})).await["id"]));
    assert_eq!(app.get_json(&path).await["data"], json!([]));
    assert_eq!(app.get(&format!("{path}.csv")).await.text().await.expect("a body").lines().count(), 1);
    assert!(app.get(&format!("{path}.svg")).await.text().await.expect("a body").contains("No step has been trained"));
    for form in ["", ".csv", ".svg"] {
        let missing = app.get(&format!("/v1/fine_tuning/jobs/ftjob-1/metrics{form}")).await;
        assert_eq!(error(missing, StatusCode::NOT_FOUND).await["code"], "fine_tune_not_found");
    }
}
