#!/usr/bin/env bash
# Every quantization of an export against llama.cpp's llama-quantize, from the same f16 file of SmolLM2: types and bytes of
# every tensor, and the perplexity of both files on held text, which may be 1% apart. LORAD_LLAMA_CPP names the folder of
# llama.cpp's tools; else they are built once. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
say "Tools"
llama_cpp_tools llama-quantize llama-perplexity
build_examples convert
base=$(scripts/get-model.sh)
work_folder
say "Comparing"
# shellcheck disable=SC2154 # set by the functions above
convert=$examples/convert
"$convert" "$base" "f16=$work/f16.gguf"
python3 scripts/lib/compare_quantize.py "$convert" "$llama_cpp" "$work" README.md docs/ARCHITECTURE.md docs/API.md
