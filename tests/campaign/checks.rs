//! What must hold after a run, whatever happened in it.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lorad::store::{self, Store, job::Filter};
use lorad::types::attempt::{Attempt, AttemptOutcome};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::client::{Api, PATIENCE, Seen};
use super::world::World;

/// How long the sweep may take once the server has started.
const SWEEP: Duration = Duration::from_secs(20);
/// Age that objects are given so that the sweep looks at them: the sweep spares what is younger than a day.
const AGE: Duration = Duration::from_secs(2 * 24 * 3600);

/// What a job came to, without what differs from job to job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) status: String,
    error: Value,
    /// Its events, oldest first.
    story: Vec<String>,
    /// Type and hash of its artifacts, as downloaded.
    artifacts: Vec<(String, String)>,
    /// Hash of the result file.
    result: Option<String>,
}

/// Events that tell of the job's state: how many there are depends on what happened to it.
const OF_STATE: [&str; 5] =
    ["The job was paused", "The job was resumed", "The job was cancelled", "The job failed", "Fine-tuning job started"];

impl Record {
    /// Reads it from the API.
    pub(crate) async fn of(api: &Api, seen: &Seen) -> Self {
        let path = format!("/fine_tuning/jobs/{}", seen.id);
        let job = api.get(&path).await;
        let model = job["fine_tuned_model"].as_str().unwrap_or("no model").to_owned();
        let events = api.get(&format!("{path}/events?limit=1000")).await;
        assert_eq!(events["has_more"], false);
        let told = |event: &Value| {
            let text = format!("{} {} {}", event["level"], event["message"], event["data"]);
            // The model of a job that did not end well has a name as well, in the names of its checkpoints.
            let text = text.split(" with Snapshot ID").next().unwrap_or_default();
            let text = text.split(" and validation file").next().unwrap_or_default();
            text.replace(&seen.id, "JOB").replace(&seen.file, "FILE").replace(&model, "MODEL")
        };
        let story = events["data"].as_array().expect("a list").iter().rev().map(told).collect();
        let mut artifacts = Vec::new();
        for artifact in api.get(&format!("{path}/artifacts")).await["data"].as_array().expect("a list") {
            let hash = hash(api, &format!("/artifacts/{}/content", text(&artifact["id"]))).await;
            assert_eq!(artifact["sha256"], hash.as_str(), "{artifact}");
            artifacts.push((text(&artifact["type"]), hash));
        }
        artifacts.sort();
        let result = match job["result_files"][0].as_str() {
            Some(id) => Some(hash(api, &format!("/files/{id}/content")).await),
            None => None,
        };
        Self { status: text(&job["status"]), error: job["error"].clone(), story, artifacts, result }
    }

    /// The events that every run of the same job has.
    fn core(&self) -> Vec<&String> {
        self.story.iter().filter(|line| !OF_STATE.iter().any(|told| line.contains(told))).collect()
    }

    /// The job ended as its story says, and what it did is what an undisturbed one does, or the beginning of it.
    fn check(&self, reference: &Self, was_cancelled: bool) {
        let last = self.story.last().expect("an event");
        let told = match self.status.as_str() {
            "succeeded" => "The job has successfully completed",
            "cancelled" => "The job was cancelled",
            "failed" => "The job failed: ",
            other => panic!("a job that has not ended: {other}"),
        };
        assert!(last.contains(told), "the status is {} and the last event {last}", self.status);
        assert_eq!(self.status == "cancelled", was_cancelled, "{self:#?}");
        for (line, undisturbed) in self.core().into_iter().zip(reference.core()) {
            assert_eq!(line, undisturbed, "{self:#?}");
        }
        if self.status == "succeeded" {
            assert_eq!(self.core().len(), reference.core().len(), "{self:#?}");
            assert_eq!((&self.artifacts, &self.result), (&reference.artifacts, &reference.result));
        } else {
            assert!(self.core().len() < reference.core().len(), "{self:#?}");
            assert!(self.artifacts.iter().all(|artifact| reference.artifacts.contains(artifact)), "{self:#?}");
        }
    }
}

async fn hash(api: &Api, path: &str) -> String {
    hex::encode(Sha256::digest(api.bytes(path).await))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("a text, got {value}")).to_owned()
}

/// Checks everything, and tells how the jobs ended and how many attempts it took. `jobs` are what their clients saw, each beside its undisturbed twin.
pub(crate) async fn check(world: &mut World, jobs: &[(Seen, &Record)]) -> String {
    let api = world.api();
    let mut records = Vec::new();
    for (index, (seen, reference)) in jobs.iter().enumerate() {
        let record = Record::of(&api, seen).await;
        record.check(reference, world.was_cancelled(index));
        records.push(record);
    }
    until("the end of workers and scratch folders", PATIENCE, || {
        world.workers().is_empty() && files(&world.data().join("scratch")).is_empty()
    })
    .await;
    let status = world.stop_server().await;
    assert!(status.success(), "{status}");
    for file in objects(world) {
        let file = File::options().write(true).open(file).expect("an object");
        file.set_modified(SystemTime::now() - AGE).expect("a file of ours");
    }
    let store = Store::open(&world.copy_of_database()).await.expect("a database");
    world.start_server().await;
    let named = store::object::named(&mut store.read().await.expect("a connection")).await.expect("keys");
    let named: BTreeSet<String> = named.into_iter().collect();
    let begin = Instant::now();
    while stored(world) != named {
        let stored = stored(world);
        let (orphans, lost) = (stored.difference(&named), named.difference(&stored));
        assert!(
            begin.elapsed() < SWEEP,
            "orphans: {:?}, lost: {:?}",
            orphans.collect::<Vec<_>>(),
            lost.collect::<Vec<_>>()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let lost = check_database(&store, jobs, &records).await;
    store.close().await;
    let status = world.stop_server().await;
    assert!(status.success(), "{status}");
    let ends: Vec<String> = records.into_iter().map(|record| record.status).collect();
    format!("{}; {lost} attempts lost or stopped", ends.join(", "))
}

/// Looks into the database itself; gives how many attempts did not come to their end.
async fn check_database(store: &Store, jobs: &[(Seen, &Record)], records: &[Record]) -> usize {
    let mut lost = 0;
    let mut conn = store.read().await.expect("a connection");
    let live = store::attempt::live(&mut conn).await.expect("attempts");
    assert!(live.is_empty(), "a lease is stuck: {live:?}");
    let filter = Filter { limit: 1000, ..Filter::default() };
    let listed = store::job::list(&mut conn, "default", &filter).await.expect("jobs");
    assert_eq!(listed.len(), jobs.len(), "a request made a job twice, or none");
    for ((seen, _), record) in jobs.iter().zip(records) {
        let id = seen.id.parse().expect("an id");
        let events = store::event::newer_than(&mut conn, id, 0, 10_000).await.expect("events");
        assert!(events.iter().map(|event| event.seq).eq(1..=events.len() as i64), "events of {id} have gaps");
        let ids: Vec<String> = events.iter().map(|event| event.id.to_string()).collect();
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "an event is doubled");
        assert_eq!(seen.events, ids, "a watcher of {id} saw other events than there are");
        let steps = store::metric::list(&mut conn, id).await.expect("metrics");
        assert!(steps.iter().map(|metric| metric.step).eq(1..=steps.len() as i64), "steps of {id} have gaps");
        let told = events.iter().filter_map(|event| event.data.as_ref()?["step"].as_i64());
        assert!(told.eq(1..=steps.len() as i64), "each step of {id} is told once, in order");
        let attempts = store::attempt::of_job(&mut conn, id).await.expect("attempts");
        lost += attempts.iter().filter(|attempt| attempt.outcome != Some(AttemptOutcome::Succeeded)).count();
        if record.status == "failed" {
            assert_eq!(record.error["code"], "worker_crashed", "{record:#?}");
            assert!(crashed_three_times(&attempts), "{attempts:#?}");
        }
    }
    lost
}

/// The last of the attempts that count were crashes, three of them.
fn crashed_three_times(attempts: &[Attempt]) -> bool {
    let counts = |attempt: &&Attempt| {
        !matches!(
            attempt.outcome,
            Some(AttemptOutcome::ServerEnded | AttemptOutcome::NotStarted | AttemptOutcome::Stopped)
        )
    };
    let last: Vec<_> = attempts.iter().rev().filter(counts).take(3).collect();
    last.len() == 3 && last.iter().all(|attempt| attempt.outcome == Some(AttemptOutcome::Crashed))
}

/// The files of object storage.
fn objects(world: &World) -> Vec<PathBuf> {
    files(&world.data().join("objects"))
}

/// Their keys.
fn stored(world: &World) -> BTreeSet<String> {
    let root = world.data().join("objects");
    let key = |file: PathBuf| file.strip_prefix(&root).expect("a file in it").to_string_lossy().into_owned();
    objects(world).into_iter().map(key).collect()
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    // A folder that is not there, or not any more, has none.
    let Ok(items) = fs::read_dir(folder) else { return Vec::new() };
    let below = |path: PathBuf| if path.is_dir() { files(&path) } else { vec![path] };
    items.flatten().flat_map(|item| below(item.path())).collect()
}

async fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < patience, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
