#!/usr/bin/env bash
# lorad against stock PEFT on this machine's CPU: the same weights, 4 x 256 tokens a step, both trainers in turn.
# Sets up the peer (several gigabytes of PyTorch; LORAD_VENV names an environment that has it already).
# Measure on an idle machine. `scripts/bench-cpu.sh [ROUNDS] [STEPS]`
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
say "Python environment"
python_environment peft transformers torch gguf safetensors
say "Build"
build
base=$(scripts/get-model.sh)
work_folder
say "Measuring"
"$python" scripts/lib/bench_cpu.py "$lorad" "$base" "$python" "$work" "$@"
machine
