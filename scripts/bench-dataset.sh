#!/usr/bin/env bash
# Time and memory of reading data sets of several sizes into tokens: `bench-dataset.sh [ROWS…]`, by default 52000 and 208000 rows
# as long as Alpaca's. Their words are drawn from a seed; LORAD_ALPACA names a JSON array of Alpaca rows to vary instead.
# Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
say "Build"
build_examples prepare
model=${LORAD_SMOLLM2:-$(scripts/get-model.sh)}
work_folder
[ $# -gt 0 ] || set -- 52000 208000
for rows in "$@"; do
    say "$rows rows"
    python3 scripts/lib/alpaca_rows.py "$rows" "${LORAD_ALPACA:-}" >"$work/data.jsonl"
    for round in 1 2 3; do
        printf '%s: ' "$round"
        # shellcheck disable=SC2154 # set by build_examples
        "$examples/prepare" "$model" "$work/data.jsonl" "$work"
        echo
    done
done
