//! A bound on this process's memory while it does what a stranger's chat template says.
//!
//! The template engine's fuel pays for texts, but it joins lists before it counts their items: `{% set x = x + x %}`, a few dozen
//! times, would take all memory there is. With the bound an allocation fails, which ends this process and no other.

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// What may be allocated beside what is there already, at least.
const LEAST_BYTES: u64 = 2 << 30;

/// The bound, which ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Bound {
    /// The soft and hard limit from before, where there is a bound.
    before: Option<(rlim_t, rlim_t)>,
}

impl Bound {
    /// From here on this process may allocate half of the machine's memory, or 2 GiB where that is more. A system that takes no
    /// limit gets a warning in the log.
    pub(crate) fn begin() -> Self {
        let before = set().inspect_err(|error| tracing::warn!("memory is not bounded: {error:#}")).ok();
        Self { before }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let Some((soft, hard)) = self.before else { return };
        if let Err(error) = setrlimit(Resource::RLIMIT_DATA, soft, hard) {
            tracing::warn!(%error, "the limit of memory stays as low as it was for the chat template");
        }
    }
}

fn set() -> anyhow::Result<(rlim_t, rlim_t)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_DATA).context("cannot read the limit of memory")?;
    let more = (kilobytes("/proc/meminfo", "MemTotal:")? * 1024 / 2).max(LEAST_BYTES);
    let bound = (kilobytes("/proc/self/status", "VmData:")? * 1024 + more).min(soft);
    setrlimit(Resource::RLIMIT_DATA, bound, hard).context("cannot set the limit of memory")?;
    Ok((soft, hard))
}

/// The number of kilobytes on a line of a file of the system.
fn kilobytes(path: &str, name: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    number.with_context(|| format!("{path} has no line {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_ends_when_it_is_dropped() {
        let before = getrlimit(Resource::RLIMIT_DATA).expect("a limit");
        let bound = Bound::begin();
        let within = getrlimit(Resource::RLIMIT_DATA).expect("a limit");
        assert!(within.0 >= LEAST_BYTES && within.0 <= before.0 && within.1 == before.1, "{within:?}, {before:?}");
        drop(bound);
        assert_eq!(getrlimit(Resource::RLIMIT_DATA).expect("a limit"), before);
    }
}
