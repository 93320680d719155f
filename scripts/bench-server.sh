#!/usr/bin/env bash
# Load figures of the server, a line each: adding a job to a queue of 10,000 and listing it, from a worker's event to its
# watcher, memory with 500 watchers, requests a second, how long the device idles between two jobs.
# Measure on an idle machine; each line tells the load beside its figure.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
build
base=()
if [ -n "${LORAD_SMOLLM2:-}" ]; then base=("$LORAD_SMOLLM2"); elif path=$(scripts/get-model.sh); then base=("$path"); fi
work_folder
# shellcheck disable=SC2154 # set by the functions above
python3 scripts/lib/bench_server.py "$lorad" "$work" "${base[@]}"
machine
