#!/usr/bin/env bash
# Every quantization of an export against llama.cpp's llama-quantize, from the same f16 file of SmolLM2: types and bytes of
# every tensor, and the perplexity of both files on held text. LORAD_LLAMA_CPP names the folder of llama.cpp's tools; else they are
# built once. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
# shellcheck source=scripts/lib/llama_cpp.sh
. scripts/lib/llama_cpp.sh

check_tools
say "Tools"
llama_cpp_tools llama-quantize llama-perplexity
cargo build --release --workspace --locked --example convert
convert=$(json target_directory <<<"$(cargo metadata --format-version 1 --no-deps --locked)")/release/examples/convert
base=$(scripts/get-model.sh)
trap_exit
work=$(mktemp -d "${TMPDIR:-/tmp}/lorad-compare-XXXXXX")
say "Comparing"
"$convert" "$base" "f16=$work/f16.gguf"
python3 scripts/lib/compare_quantize.py "$convert" "$llama_cpp" "$work" README.md docs/ARCHITECTURE.md docs/API.md
