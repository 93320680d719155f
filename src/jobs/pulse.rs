//! When each worker last got on with its work, as its heartbeats tell: a worker that is alive and stands still is stuck.
//!
//! Kept in memory only: after a restart of the server a stuck worker is given its time anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::types::ids::AttemptId;

/// The pulses of all live attempts; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    attempts: Arc<Mutex<HashMap<AttemptId, Last>>>,
}

#[derive(Debug)]
struct Last {
    progress: Option<u64>,
    changed_at: Instant,
}

impl Pulse {
    /// Takes note of a heartbeat's `progress`.
    pub fn beat(&self, attempt: AttemptId, progress: Option<u64>) {
        self.note(attempt, progress, Instant::now());
    }

    /// For how long an attempt's progress has stood still; the first call counts from now.
    pub fn standing_still(&self, attempt: AttemptId) -> Duration {
        self.standing_still_at(attempt, Instant::now())
    }

    /// Forgets an attempt that has ended.
    pub fn forget(&self, attempt: AttemptId) {
        self.attempts.lock().expect("no holder of this lock panics").remove(&attempt);
    }

    fn standing_still_at(&self, attempt: AttemptId, now: Instant) -> Duration {
        let mut attempts = self.attempts.lock().expect("no holder of this lock panics");
        let last = attempts.entry(attempt).or_insert(Last { progress: None, changed_at: now });
        now.saturating_duration_since(last.changed_at)
    }

    fn note(&self, attempt: AttemptId, progress: Option<u64>, now: Instant) {
        let mut attempts = self.attempts.lock().expect("no holder of this lock panics");
        let last = attempts.entry(attempt).or_insert(Last { progress: None, changed_at: now });
        if last.progress != progress {
            *last = Last { progress, changed_at: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_number_is_progress() {
        let (pulse, attempt) = (Pulse::default(), AttemptId::new());
        let (begin, hour) = (Instant::now(), Duration::from_secs(3600));
        pulse.note(attempt, Some(1), begin);
        pulse.note(attempt, Some(1), begin + hour);
        assert_eq!(pulse.standing_still_at(attempt, begin + 2 * hour), 2 * hour);
        pulse.note(attempt, Some(2), begin + 2 * hour);
        assert_eq!(pulse.standing_still_at(attempt, begin + 3 * hour), hour);
        assert_eq!(pulse.standing_still_at(AttemptId::new(), begin), Duration::ZERO);
    }
}
