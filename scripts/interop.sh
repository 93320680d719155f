#!/usr/bin/env bash
# The newest stock `openai` client against a lorad server, changing only base_url and key; then the adapter in stock `peft`,
# whose logits must be lorad's. Sets up what it needs (several gigabytes of PyTorch; LORAD_VENV names an environment that
# has it already). Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

check_tools
say "Python environment"
python_environment openai peft transformers torch gguf safetensors
say "Build"
build
base=$(scripts/get-model.sh)
say "Server"
trap_exit
start_server
echo "  $url"
say "Client"
"$python" scripts/lib/interop.py "$url" "$lorad" "$base" examples/persona.jsonl "$work"
