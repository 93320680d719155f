#!/usr/bin/env bash
# The loss curve of `--compute bf16` beside that of f32: 200 steps on SmolLM2 from the same seed over rows that never repeat (the
# examples, and passages of this repository's own text). Ends with an error where the curves are more than 1% apart.
# `scripts/compare-bf16.sh [STEPS]`; needs a processor with AVX512-BF16. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
grep -q avx512_bf16 /proc/cpuinfo || fail "this processor has no AVX512-BF16"
say "Build"
build
base=${LORAD_SMOLLM2:-$(scripts/get-model.sh)}
work_folder
say "Training"
python3 scripts/lib/compare_bf16.py "$lorad" "$base" "$work" "$@"
machine
