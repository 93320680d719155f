#!/usr/bin/env bash
# lorad's export to q4_k_m, with a LoRA of rank 16 merged in and the file read back, against llama.cpp's llama-quantize, which only
# quantizes: the same f16 file of Llama-3-8B's shapes with random weights, both on all cores and in turn.
# Measure on an idle machine. `scripts/bench-export.sh [ROUNDS] [LAYERS] [VOCABULARY]`; 32 layers need 26 GB of disk.
# LORAD_LLAMA_CPP names the folder of llama.cpp's tools; else they are built once.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
say "Tools"
python_environment numpy
llama_cpp_tools llama-quantize
build_examples convert
work_folder
say "Measuring"
# shellcheck disable=SC2154 # set by the functions above
"$python" scripts/lib/bench_export.py "$examples/convert" "$llama_cpp/llama-quantize" "$work" "$@"
machine
