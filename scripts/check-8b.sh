#!/usr/bin/env bash
# What a job costs at the size that people train: Llama-3-8B's shapes in q4_k with random weights and Llama 3's tokenizer, rows like Alpaca's,
# 60 steps of 8 rows over HTTP, an adapter and a merged q4_k_m file, which is compared with what was trained before it is there.
# Needs Python with numpy, and a program in LORAD_PROGRAM; 16 GB of disk and, to merge, memory. LAYERS: 32 by default.
# usage: check-8b.sh VOCABULARY.gguf [LAYERS] [STEPS]        (scripts/golden/llama3_vocabulary.py writes the vocabulary)
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
[ -n "${LORAD_PROGRAM:-}" ] || fail "LORAD_PROGRAM must name a program that is built already"
[ $# -ge 1 ] || fail "usage: check-8b.sh VOCABULARY.gguf [LAYERS] [STEPS]"
[ -f "$1" ] || fail "there is no file $1: scripts/golden/llama3_vocabulary.py $1 writes it"
python3 -c 'import numpy' 2>/dev/null || fail "python3 has no numpy: pip install numpy, in the environment whose python3 is first on the PATH"
lorad=$LORAD_PROGRAM
vocabulary=$1 layers=${2:-32} steps=${3:-60}

trap_exit
"$lorad" devices
start_server
# Where `local:` names are looked up.
mkdir -p "$work/data/models"
say "The model"
python3 scripts/lib/make_8b_shaped.py "$work/data/models/8b.gguf" "$layers" 128256 q4_k "$vocabulary"
ls -l "$work/data/models"
python3 scripts/lib/alpaca_rows.py $((8 * steps)) >"$work/rows.jsonl"

say "The job"
file=$(api /v1/files -F purpose=fine-tune -F "file=@$work/rows.jsonl" | json id)
body="{\"model\": \"local:8b.gguf\", \"training_file\": \"$file\", \"training\": {\"max_steps\": $steps},
    \"artifacts\": [{\"type\": \"adapter\"}, {\"type\": \"gguf\", \"quantization\": \"q4_k_m\"}]}"
api /v1/fine_tuning/jobs/estimate -H 'content-type: application/json' -d "$body"
job=$(api /v1/fine_tuning/jobs -H 'content-type: application/json' -d "$body" | json id)
python3 scripts/lib/time_job.py "$url" "$job"
