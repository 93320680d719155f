//! What the clients of a run do: upload, ask for a job, follow its events, all over again whenever the server does not answer.

use std::time::{Duration, Instant};

use eventsource_stream::Eventsource;
use futures::StreamExt;
use reqwest::multipart::{Form, Part};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::plan::{JobPlan, Repeat, spec};

/// Longest time that a client tries, and that a job may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// Longest time of one request.
const TIMEOUT: Duration = Duration::from_secs(15);

/// A client of a server that comes and goes.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    http: Client,
    /// Where the server listens, while it does.
    pub(crate) address: watch::Receiver<Option<String>>,
}

/// A job as its client saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Its id.
    pub(crate) id: String,
    /// Its training file.
    pub(crate) file: String,
    /// The ids of the events that came, in order.
    pub(crate) events: Vec<String>,
}

impl Api {
    pub(crate) fn new(address: watch::Receiver<Option<String>>) -> Self {
        Self { http: Client::new(), address }
    }

    /// Sends a request until it is answered by something other than a fault of the server's, and gives status and text. `make`
    /// learns how often it was sent before.
    pub(crate) async fn call(&self, make: impl Fn(&Client, &str, u32) -> RequestBuilder) -> (u16, Vec<u8>) {
        let begin = Instant::now();
        let mut last = "nobody listens".to_owned();
        for count in 0.. {
            assert!(begin.elapsed() < PATIENCE, "no answer: {last}");
            let address = self.address.borrow().clone();
            if let Some(address) = address {
                let answer = async {
                    let response = make(&self.http, &address, count).timeout(TIMEOUT).send().await?;
                    let status = response.status();
                    Ok::<_, reqwest::Error>((status, response.bytes().await?))
                };
                match answer.await {
                    Ok((status, body)) if !status.is_server_error() => return (status.as_u16(), body.to_vec()),
                    Ok((status, body)) => last = format!("{status} {}", String::from_utf8_lossy(&body)),
                    Err(error) => last = error.to_string(),
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        unreachable!("the clients' patience ends before numbers do")
    }

    /// The body of a GET that must succeed.
    pub(crate) async fn bytes(&self, path: &str) -> Vec<u8> {
        let (status, body) = self.call(|http, address, _| http.get(format!("{address}{path}"))).await;
        assert_eq!(status, 200, "GET {path}: {}", String::from_utf8_lossy(&body));
        body
    }

    /// The JSON of a GET that must succeed.
    pub(crate) async fn get(&self, path: &str) -> Value {
        serde_json::from_slice(&self.bytes(path).await).expect("JSON")
    }

    /// A POST without a body; `false`: it was refused.
    pub(crate) async fn post(&self, path: &str) -> bool {
        let (status, body) = self.call(|http, address, _| http.post(format!("{address}{path}"))).await;
        assert!(status == 200 || status == 400, "POST {path}: {status} {}", String::from_utf8_lossy(&body));
        status == 200
    }

    /// Uploads a data set and gives its id.
    pub(crate) async fn upload(&self, content: &str) -> String {
        let make = |http: &Client, address: &str, _| {
            let part = Part::bytes(content.as_bytes().to_vec()).file_name("rows.jsonl");
            http.post(format!("{address}/files")).multipart(Form::new().text("purpose", "fine-tune").part("file", part))
        };
        let (status, body) = self.call(make).await;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        let file: Value = serde_json::from_slice(&body).expect("JSON");
        file["id"].as_str().expect("an id").to_owned()
    }

    /// Asks for a job, the request coming more than once, and gives its id.
    pub(crate) async fn create(&self, body: &Value, repeated: Repeat) -> String {
        let key = body["metadata"]["name"].as_str().expect("a name");
        let send = async |retries: u32| {
            let make = |http: &Client, address: &str, count: u32| {
                let request = http.post(format!("{address}/fine_tuning/jobs")).json(body);
                match repeated {
                    Repeat::ByKey => request.header("idempotency-key", key),
                    Repeat::AsRetry => request.header("x-stainless-retry-count", (retries + count).to_string()),
                }
            };
            let (status, body) = self.call(make).await;
            let job: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(status, 200, "{job}");
            job["id"].as_str().expect("an id").to_owned()
        };
        let (first, second) = match repeated {
            Repeat::ByKey => futures::join!(send(0), send(0)),
            Repeat::AsRetry => (send(0).await, send(1).await),
        };
        assert_eq!(first, second, "a repeated request made another job");
        first
    }

    /// Follows the events of a job to their end; the stream is dropped after so many events, and wherever the server drops it.
    async fn follow(&self, id: &str, drops_after: &[usize]) -> Vec<String> {
        let begin = Instant::now();
        let mut seen: Vec<String> = Vec::new();
        let mut drops = drops_after.iter().copied();
        loop {
            assert!(begin.elapsed() < PATIENCE, "the events of {id} do not end, {} came", seen.len());
            match self.follow_once(id, &mut seen, drops.next()).await {
                Ok(true) => return seen,
                Ok(false) => (),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// One connection of [`Api::follow`]; `true`: the job's story is told.
    async fn follow_once(&self, id: &str, seen: &mut Vec<String>, most: Option<usize>) -> anyhow::Result<bool> {
        let address = self.address.borrow().clone().ok_or_else(|| anyhow::anyhow!("nobody listens"))?;
        let request = self.http.get(format!("{address}/fine_tuning/jobs/{id}/events?stream=true"));
        let mut request = request.header("accept", "text/event-stream");
        if let Some(last) = seen.last() {
            request = request.header("last-event-id", last);
        }
        let response = tokio::time::timeout(TIMEOUT, request.send()).await??.error_for_status()?;
        let mut events = response.bytes_stream().eventsource();
        let mut left = most.unwrap_or(usize::MAX);
        while left > 0 {
            let Some(event) = tokio::time::timeout(TIMEOUT * 2, events.next()).await? else { return Ok(false) };
            let event = event?;
            if event.data == "[DONE]" {
                return Ok(true);
            }
            let data: Value = serde_json::from_str(&event.data)?;
            anyhow::ensure!(data["error"].is_null(), "the stream ends in an error");
            assert_eq!(data["id"], event.id.as_str(), "an event's two ids");
            seen.push(event.id);
            left -= 1;
        }
        Ok(false)
    }

    /// Everything that the client of a job does.
    pub(crate) async fn run_job(
        self,
        plan: JobPlan,
        name: String,
        files: Files,
        tell: watch::Sender<Option<String>>,
    ) -> Seen {
        tokio::time::sleep(Duration::from_millis(plan.at_ms)).await;
        let mut file = self.upload(&files.rows).await;
        if plan.uploads_twice {
            file = self.upload(&files.rows).await;
        }
        let mut body = spec(plan.spec, &files.held);
        body["model"] = json!("local:tiny.gguf");
        body["training_file"] = json!(file);
        body["metadata"] = json!({ "name": name });
        let id = self.create(&body, plan.repeated).await;
        tell.send_replace(Some(id.clone()));
        let events = self.follow(&id, &plan.drops_after).await;
        Seen { id, file, events }
    }
}

/// The data sets of all jobs.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    /// What they train on.
    pub(crate) rows: String,
    /// The id of what they evaluate on.
    pub(crate) held: String,
}
