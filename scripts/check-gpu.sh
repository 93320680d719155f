#!/usr/bin/env bash
# What must hold of the training on this machine's GPUs, with a real small model: 30 steps in f32 and in bf16 follow the CPU's loss curve;
# the same job over HTTP trains on a GPU, and where its worker is killed (kill -9) goes on to the same adapter, byte by byte. Where there
# are several GPUs of one kind: as many jobs at once, one on each, end with that adapter too.
# Needs a build with the feature `cuda` (LORAD_PROGRAM names one that is built already). usage: check-gpu.sh [MODEL.gguf]
set -euo pipefail
cd "$(dirname "$0")/.."

data=examples/persona.jsonl
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
[ -n "${LORAD_PROGRAM:-}" ] || fail "LORAD_PROGRAM must name a program that was built with --features cuda"
lorad=$LORAD_PROGRAM
model=${1:-$(scripts/get-model.sh)}
model=$(realpath "$model")

# curve NAME OPTIONS: 30 steps, its losses in $curves/NAME/metrics.csv.
curve() {
    local name=$1
    shift
    "$lorad" train --base "$model" --data "$data" --out "$curves/$name" --max-steps 30 --learning-rate 1e-3 --dropout 0.05 "$@" \
        >"$curves/$name.log" 2>&1 || { tail -n 20 "$curves/$name.log" >&2; fail "the run $name failed"; }
}

# A job over HTTP on the server that runs; sets `job`.
submit() {
    local answer
    answer=$(api /v1/fine_tuning/jobs -H 'content-type: application/json' -d "{\"model\": \"local:$(basename "$model")\",
        \"training_file\": \"$file\", \"seed\": 7, \"training\": {\"max_steps\": 60, \"learning_rate\": 1e-3, \"save_steps\": 10},
        \"lora\": {\"dropout\": 0.1}, \"artifacts\": [{\"type\": \"adapter\"}]}")
    job=$(json id <<<"$answer")
}

# Waits until the job has that many steps; kills its worker.
kill_worker_after() {
    local step=0 pids
    until [ "$step" -ge "$1" ]; do
        sleep 0.1
        step=$(api "/v1/fine_tuning/jobs/$job/metrics" | python3 -c 'import json, sys; print(max([0] + [row["step"] for row in json.load(sys.stdin)["data"]]))')
    done
    pids=$(pgrep -P "$server_pid" -f ' worker' || true)
    [ -n "$pids" ] || fail "the job has no worker to kill"
    # shellcheck disable=SC2086 # one argument a process
    kill -9 $pids
    echo "  killed the worker after step $step"
}

wait_for_job() {
    local status=queued
    until [ "$status" = succeeded ]; do
        sleep 0.3
        status=$(api "/v1/fine_tuning/jobs/$job" | json status)
        case $status in failed | cancelled) api "/v1/fine_tuning/jobs/$job"; fail "job $job is $status" ;; esac
    done
}

# The hash of the adapter's tensors.
adapter_hash() {
    local id
    id=$(api "/v1/fine_tuning/jobs/$job/artifacts" | json data 0 id)
    curl --silent --show-error --fail "$url/v1/artifacts/$id/content" | tar -xOf - --wildcards '*adapter_model.safetensors' | sha256sum | cut -d ' ' -f 1
}

trap_exit
"$lorad" devices
start_server "workers.checkpoint_seconds = 1
models.dir = \"$(dirname "$model")\""
curves="$work/curves"
mkdir "$curves"

say "1. Loss curves of 30 steps"
curve cpu --device cpu --compute f32
curve f32 --device cuda:0 --compute f32
curve bf16 --device cuda:0 --compute bf16
python3 scripts/lib/compare_curves.py "$curves/cpu/metrics.csv" "$curves/f32/metrics.csv" 0.002 "$curves/bf16/metrics.csv" 0.02

say "2. A job over HTTP, and again with its worker killed"
file=$(api /v1/files -F purpose=fine-tune -F "file=@$data" | json id)
submit
wait_for_job
straight=$(adapter_hash)
grep -o '"device":"[^"]*"\|device=[^ ]*' "$work/server.log" | sort | uniq -c
submit
kill_worker_after 15
wait_for_job
[ "$(adapter_hash)" = "$straight" ] || fail "the adapter of the killed run differs from that of the straight one"
echo "  the adapters are equal: $straight"
gpus=$("$lorad" devices | grep -c '^cuda:')
if [ "$gpus" -gt 1 ]; then
    say "3. $gpus jobs at once"
    logged=$(wc -l <"$work/server.log")
    jobs=()
    for ((i = 0; i < gpus; i++)); do
        submit
        jobs+=("$job")
    done
    for job in "${jobs[@]}"; do
        wait_for_job
        [ "$(adapter_hash)" = "$straight" ] || fail "the adapter of job $job differs from that of the straight one"
    done
    used=$(tail -n "+$((logged + 1))" "$work/server.log" | grep 'attempt claimed' | grep -o 'cuda:[0-9]*' | sort | uniq -c)
    echo "$used"
    [ "$(wc -l <<<"$used")" -eq "$gpus" ] || fail "not every GPU had a job"
    echo "  the adapters are equal"
fi
say "Done"
