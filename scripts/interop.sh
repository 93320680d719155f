#!/usr/bin/env bash
# What a job that the stock `openai` client asked for leaves: its adapter in stock `peft`, whose logits must be lorad's; then every
# export in PEFT, transformers and llama.cpp. (The client itself is the matter of openai-client.sh.) Sets up what it needs (several
# gigabytes of PyTorch; LORAD_VENV and LORAD_LLAMA_CPP name an environment and a folder that have it already). Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
say "Python environment"
python_environment openai peft transformers torch gguf safetensors
say "llama.cpp"
llama_cpp_tools llama-completion llama-quantize
say "Build"
build
base=$(scripts/get-model.sh)
say "Server"
trap_exit
start_server
echo "  $url"
say "Client"
"$python" scripts/lib/interop.py "$url" "$lorad" "$base" examples/persona.jsonl "$work"
say "Exports"
# shellcheck disable=SC2154 # set by llama_cpp_tools
"$python" scripts/lib/interop_export.py "$lorad" "$base" examples/persona.jsonl examples/questions.tsv "$llama_cpp" "$work"
