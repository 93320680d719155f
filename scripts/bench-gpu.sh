#!/usr/bin/env bash
# The training's speed and memory on this machine's first GPU, on random weights of real shapes: a line a kind of work beside what must hold
# on an H100 of 80 GB, and where a micro-step of the first goes. Ends with 1 where a bound does not hold. Give it the card for itself.
# Needs a build with the feature `cuda` (LORAD_PROGRAM names one that is built already). usage: bench-gpu.sh [RESULTS.jsonl]
set -euo pipefail
cd "$(dirname "$0")/.."

lorad=${LORAD_PROGRAM:-${CARGO_TARGET_DIR:-target}/release/lorad}
[ -x "$lorad" ] || { echo "bench-gpu.sh: build with --features cuda first, or set LORAD_PROGRAM" >&2; exit 2; }
devices=$("$lorad" devices)
echo "$devices"
grep -q '^cuda:' <<<"$devices" || exit 2
exec python3 scripts/lib/bench_gpu.py "$lorad" "${1:-/dev/null}"
