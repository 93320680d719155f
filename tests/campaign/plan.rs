//! What happens in a run, drawn from its seed: jobs, what their clients do, and faults at moments.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::shim::SCRATCH;

/// Milliseconds of a run in which a job is expected to be worked on; faults fall into the time of all jobs.
const JOB_MS: u64 = 2500;

/// Files of object storage.
const OBJECTS: i32 = 1;
/// The database and its log.
const DATABASE: i32 = 2;
/// All files of the data folder, those of logs among them.
pub(crate) const EVERYTHING: i32 = 15;

/// A run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// What it was drawn from.
    pub(crate) seed: u64,
    /// Jobs, one after another.
    pub(crate) jobs: Vec<JobPlan>,
    /// Faults, by time.
    pub(crate) strikes: Vec<Strike>,
}

/// A job and what its client does.
#[derive(Debug, Clone)]
pub(crate) struct JobPlan {
    /// Which of [`SPECS`].
    pub(crate) spec: usize,
    /// When it is asked for.
    pub(crate) at_ms: u64,
    /// How the request is repeated.
    pub(crate) repeated: Repeat,
    /// Whether the training file is uploaded twice.
    pub(crate) uploads_twice: bool,
    /// After so many events the stream is dropped, again and again.
    pub(crate) drops_after: Vec<usize>,
}

/// How a request for a job comes twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// Under one `Idempotency-Key`, both at once.
    ByKey,
    /// Saying of itself that it is a repeated one.
    AsRetry,
}

/// A fault and its time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strike {
    /// When, in milliseconds since the begin.
    pub(crate) at_ms: u64,
    /// What.
    pub(crate) fault: Fault,
}

/// What goes wrong, or what somebody does at a bad moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9 of every worker.
    KillWorker,
    /// kill -9 of the server, which is back so much later.
    KillServer { away_ms: u64 },
    /// kill -9 of the server and its workers.
    KillBoth { away_ms: u64 },
    /// SIGTERM for the server, which ends what it can and is started again.
    Drain,
    /// The server does nothing for a while: SIGSTOP.
    HoldServer { for_ms: u64 },
    /// A worker does nothing for a while: SIGSTOP; longer than its lease it is replaced.
    HoldWorker { for_ms: u64 },
    /// Every read and write of objects, the database or the rest takes longer.
    SlowStorage { targets: i32, delay_ms: i32, for_ms: u64 },
    /// Reads and writes fail now and then with EIO.
    StorageErrors { targets: i32, one_in: i32, for_ms: u64 },
    /// Nothing more fits on the disk.
    FullDisk { for_ms: u64 },
    /// The wall clock jumps, forward or back.
    ClockJump { minutes: i64 },
    /// A job is paused and resumed.
    Pause { job: usize, for_ms: u64 },
    /// A job is cancelled.
    Cancel { job: usize },
}

impl Fault {
    /// Whether it is nothing where no worker is.
    pub(crate) fn is_for_workers(self) -> bool {
        match self {
            Self::KillWorker
            | Self::KillServer { .. }
            | Self::KillBoth { .. }
            | Self::Drain
            | Self::HoldWorker { .. }
            | Self::FullDisk { .. } => true,
            Self::HoldServer { .. }
            | Self::SlowStorage { .. }
            | Self::StorageErrors { .. }
            | Self::ClockJump { .. }
            | Self::Pause { .. }
            | Self::Cancel { .. } => false,
        }
    }
}

/// How many kinds of jobs there are.
pub(crate) const SPECS: usize = 4;

/// The kind of a job: everything of its request but its files. `held` is a data set to evaluate on.
pub(crate) fn spec(index: usize, held: &str) -> Value {
    let epochs = |count: u32| json!({"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": count}}});
    match index {
        0 => json!({
            "method": epochs(12), "lora": {"r": 4}, "training": {"learning_rate": 0.01},
            "artifacts": [{"type": "adapter"}, {"type": "gguf_lora"}],
        }),
        1 => json!({
            "lora": {"r": 4}, "training": {"max_steps": 150, "save_steps": 15, "learning_rate": 0.01},
            "artifacts": [{"type": "adapter"}],
        }),
        2 => json!({
            "method": epochs(15), "lora": {"r": 8, "dropout": 0.1}, "validation_file": held,
            "training": {"learning_rate": 0.01, "optimizer": "adamw_8bit", "lr_scheduler": "cosine", "eval_steps": 5, "save_steps": 7},
            "artifacts": [{"type": "adapter"}],
        }),
        _ => json!({
            "method": epochs(4), "lora": {"r": 4}, "training": {"learning_rate": 0.01},
            "artifacts": [{"type": "adapter"}, {"type": "gguf"}, {"type": "merged"}, {"type": "ollama"}],
        }),
    }
}

impl Plan {
    /// The run of that seed.
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let count = random.random_range(1..=3);
        let time_ms = JOB_MS * count as u64;
        let mut strikes: Vec<Strike> = (0..random.random_range(1..=4))
            .map(|_| Strike { at_ms: random.random_range(300..time_ms), fault: fault(&mut random, count) })
            .collect();
        strikes.sort_by_key(|strike| strike.at_ms);
        // A request that calls itself repeated is known for two minutes, by the wall clock.
        let jumps = strikes.iter().any(|strike| matches!(strike.fault, Fault::ClockJump { .. }));
        let jobs = (0..count)
            .map(|_| JobPlan {
                spec: random.random_range(0..SPECS),
                at_ms: random.random_range(0..1000),
                repeated: if jumps || random.random_bool(0.5) { Repeat::ByKey } else { Repeat::AsRetry },
                uploads_twice: random.random_bool(0.3),
                drops_after: (0..random.random_range(0..4)).map(|_| random.random_range(0..40)).collect(),
            })
            .collect();
        Self { seed, jobs, strikes }
    }

    /// Whether storage fails in it, so that a request or a worker may fail through no fault of the server's.
    pub(crate) fn storage_fails(&self) -> bool {
        let fails = |fault| matches!(fault, Fault::StorageErrors { .. } | Fault::FullDisk { .. });
        self.strikes.iter().any(|strike| fails(strike.fault))
    }
}

fn fault(random: &mut StdRng, jobs: usize) -> Fault {
    let targets = [OBJECTS, DATABASE, SCRATCH, EVERYTHING][random.random_range(0..4)];
    match random.random_range(0..13) {
        0 | 1 => Fault::KillWorker,
        2 => Fault::KillServer { away_ms: random.random_range(0..2000) },
        3 => Fault::KillBoth { away_ms: random.random_range(0..500) },
        4 => Fault::Drain,
        5 => Fault::HoldServer { for_ms: random.random_range(100..3000) },
        6 => Fault::HoldWorker { for_ms: random.random_range(100..9000) },
        7 => {
            Fault::SlowStorage { targets, delay_ms: random.random_range(1..40), for_ms: random.random_range(500..4000) }
        }
        8 => {
            Fault::StorageErrors { targets, one_in: random.random_range(1..20), for_ms: random.random_range(100..2500) }
        }
        9 => Fault::FullDisk { for_ms: random.random_range(100..2500) },
        10 => Fault::ClockJump { minutes: random.random_range(-120..=120) },
        11 => Fault::Pause { job: random.random_range(0..jobs), for_ms: random.random_range(0..1500) },
        _ => Fault::Cancel { job: random.random_range(0..jobs) },
    }
}

/// A data set of that many rows, in OpenAI's chat format.
pub(crate) fn rows(numbers: std::ops::Range<usize>) -> String {
    let row = |index: usize| {
        let question = format!("What is {index} times {}?", index + 3);
        let answer = format!("It is {}, as everybody knows.", index * (index + 3));
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    };
    numbers.map(|index| format!("{}\n", row(index))).collect()
}
