//! A campaign of random faults against a real server with real workers: whatever happens to them, every job ends in the state
//! that its log says, with the bytes of an undisturbed run, no event lost or doubled, no object orphaned, no lease stuck.
//!
//! A run is drawn from a seed (`plan.rs`). `LORAD_CAMPAIGN_RUNS` says how many (3), `LORAD_CAMPAIGN_SEED` the seed of the first;
//! the next ones follow it, so that any run can be repeated alone. `LORAD_CAMPAIGN_KEEP` keeps the folder of a run that fails.

mod checks;
mod client;
mod disk;
mod plan;
#[path = "../shim/mod.rs"]
mod shim;
mod world;

use std::time::{Duration, Instant};

use tokio::sync::watch;

use checks::{Record, check};
use client::{Files, PATIENCE, Seen};
use plan::{JobPlan, Plan, Repeat, SPECS, rows};
use world::World;

/// The first seed, where none is given.
const SEED: u64 = 43;

fn number(variable: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{variable} must be a number, got `{text}`"))
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_survive_whatever_happens_to_them() {
    let (runs, first) = (number("LORAD_CAMPAIGN_RUNS", 3), number("LORAD_CAMPAIGN_SEED", SEED));
    let references = references().await;
    for seed in first..first + runs {
        let begin = Instant::now();
        let plan = Plan::draw(seed);
        let kinds: Vec<String> = plan.strikes.iter().map(|strike| format!("{:?}", strike.fault)).collect();
        let ends = run(plan, &references).await;
        let seconds = begin.elapsed().as_secs_f64();
        eprintln!("seed {seed}: {ends}, after {seconds:.1} s; {}", kinds.join(", "));
    }
}

/// What undisturbed jobs come to, one of each kind.
async fn references() -> Vec<Record> {
    let jobs =
        |spec| JobPlan { spec, at_ms: 0, repeated: Repeat::ByKey, uploads_twice: false, drops_after: Vec::new() };
    let plan = Plan { seed: 0, jobs: (0..SPECS).map(jobs).collect(), strikes: Vec::new() };
    let (world, seen) = work(plan).await;
    let mut references = Vec::new();
    for seen in &seen {
        let record = Record::of(&world.api(), seen).await;
        assert_eq!(record.status, "succeeded", "{record:#?}");
        references.push(record);
    }
    references
}

/// One run; tells how its jobs ended.
async fn run(plan: Plan, references: &[Record]) -> String {
    let specs: Vec<usize> = plan.jobs.iter().map(|job| job.spec).collect();
    let (mut world, seen) = work(plan).await;
    world.heal();
    let jobs: Vec<(Seen, &Record)> = seen.into_iter().zip(specs.iter().map(|spec| &references[*spec])).collect();
    check(&mut world, &jobs).await
}

/// Begins a world and lets everything of the plan happen, until all jobs have ended and all clients have seen it.
async fn work(plan: Plan) -> (World, Vec<Seen>) {
    let mut world = World::begin(plan.clone()).await;
    let held = world.api().upload(&rows(40..60)).await;
    let files = Files { rows: rows(0..40), held };
    let begin = Instant::now();
    let (mut ids, mut clients) = (Vec::new(), Vec::new());
    for (index, job) in plan.jobs.iter().enumerate() {
        let (tell, id) = watch::channel(None);
        ids.push(id);
        let client = world.api().run_job(job.clone(), format!("job {index}"), files.clone(), tell);
        clients.push(tokio::spawn(client));
    }
    for strike in &plan.strikes {
        tokio::time::sleep(Duration::from_millis(strike.at_ms).saturating_sub(begin.elapsed())).await;
        world.tend();
        world.strike(strike.fault, &ids).await;
    }
    while !world.is_calm() || clients.iter().any(|client| !client.is_finished()) {
        world.tend();
        assert!(begin.elapsed() < PATIENCE, "the jobs do not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut seen = Vec::new();
    for client in clients {
        seen.push(client.await.expect("a client that is content"));
    }
    (world, seen)
}
