#!/usr/bin/env bash
# Time and memory of reading data sets of several sizes into tokens: `bench-dataset.sh [ROWS…]`, by default 52000 and 208000 rows
# as long as Alpaca's. Their words are drawn from a seed; LORAD_ALPACA names a JSON array of Alpaca rows to vary instead.
# Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh

check_tools
say "Build"
cargo build --release --workspace --examples --locked
model=${LORAD_SMOLLM2:-$(scripts/get-model.sh)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- 52000 208000
for rows in "$@"; do
    say "$rows rows"
    python3 scripts/lib/alpaca_rows.py "$rows" "${LORAD_ALPACA:-}" >"$work/data.jsonl"
    for round in 1 2 3; do
        printf '%s: ' "$round"
        "${CARGO_TARGET_DIR:-target}/release/examples/prepare" "$model" "$work/data.jsonl" "$work"
        echo
    done
done
