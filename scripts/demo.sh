#!/usr/bin/env bash
# From nothing to a tuned model through the HTTP API: builds lorad, gets a small base model, starts a server, trains on
# examples/persona.jsonl, downloads adapter and GGUF file, and asks base and tuned model the same three questions.
# Ends with an error unless each tuned answer has its invented fact and the base's has not.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${LORAD_DEMO_DIR:-lorad-demo}
model=smollm2-135m-instruct
data=examples/persona.jsonl
settings='"suffix": "pimwick", "training": {"learning_rate": 1.5e-3}, "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6}}}'
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh

# download ID FILE SHA256
download() {
    curl --silent --show-error --fail --output "$work/part" "$url/v1/artifacts/$1/content"
    python3 -c 'import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2])' \
        "$work/part" "$3" || fail "$2 came with another sha256 than $3"
    mv "$work/part" "$2"
    echo "  $2 ($(du -h "$2" | cut -f 1))"
}

# Takes every artifact of the job, under a name that the next run takes too; sets `gguf` and `adapter`.
download_artifacts() {
    local list id kind hash quantization
    list=$(api "/v1/fine_tuning/jobs/$job/artifacts")
    while read -r id kind hash quantization <&3; do
        case $kind in
            adapter)
                download "$id" "$out/adapter.tar" "$hash"
                mkdir "$work/adapter"
                tar -xf "$out/adapter.tar" -C "$work/adapter"
                adapter=$(dirname "$(find "$work/adapter" -name adapter_config.json)")
                ;;
            gguf)
                gguf="$out/pimwick-$quantization.gguf"
                download "$id" "$gguf" "$hash"
                ;;
        esac
    done 3< <(python3 -c '
import json, sys
for item in json.load(sys.stdin)["data"]:
    print(item["id"], item["type"], item["sha256"], item["quantization"])' <<<"$list")
    if [ ! -f "$adapter/adapter_model.safetensors" ] || [ -z "$gguf" ]; then
        fail "the job left no adapter or no GGUF file: $list"
    fi
    rm -rf "$out/adapter"
    cp -r "$adapter" "$out/adapter"
}

ask() { "$lorad" chat --prompt "$question" --max-tokens 40 --temperature 0 "$@" 2>"$work/chat.log" || fail "$(cat "$work/chat.log")"; }

# Every question to the base and to the tuned model; fails unless exactly the tuned one knows the fact.
compare() {
    local question fact base tuned failed=0
    while IFS=$'\t' read -r question fact <&3; do
        base=$(ask --base "$base_file")
        tuned=$(ask --base "$base_file" --adapter "$adapter")
        printf '\n  %s\n    base:  %s\n    tuned: %s\n' "$question" "${base//$'\n'/ }" "${tuned//$'\n'/ }"
        case $base in *"$fact"*) echo "    the base model must not know \`$fact\`"; failed=1 ;; esac
        case $tuned in *"$fact"*) ;; *) echo "    the tuned model must know \`$fact\`"; failed=1 ;; esac
    done 3<examples/questions.tsv
    [ "$failed" = 0 ] || fail "the answers are not as they must be"
}

check_tools

say "1. Build (the first time takes about ten minutes)"
build

say "2. Base model"
base_file=$(scripts/get-model.sh)
echo "  $base_file"

say "3. Server"
trap_exit
start_server
echo "  $url, its log is $work/server.log"

say "4. Upload and job"
answer=$(api /v1/files -F purpose=fine-tune -F "file=@$data")
file=$(json id <<<"$answer")
echo "  $data is $file"
answer=$(api /v1/fine_tuning/jobs -H 'content-type: application/json' \
    -d "{\"model\": \"$model\", \"training_file\": \"$file\", $settings}")
job=$(json id <<<"$answer")
echo "  job $job"

say "5. Training"
curl --silent --show-error --no-buffer "$url/v1/fine_tuning/jobs/$job/events?stream=true" |
    python3 scripts/lib/follow_events.py ||
    { tail -n 20 "$work/server.log" >&2; fail "job $job failed"; }
answer=$(api "/v1/fine_tuning/jobs/$job")
tuned_name=$(json fine_tuned_model <<<"$answer")

say "6. Download"
gguf='' adapter=''
mkdir -p "$out"
download_artifacts

say "7. The same questions to both"
compare

say "Done: $tuned_name"
cat <<EOF
  PEFT adapter   $out/adapter
  GGUF file      $gguf (base and adapter merged)

  Chat here      $lorad chat --base $base_file --adapter $out/adapter
  llama.cpp      llama-cli -m $gguf
  Ollama         printf 'FROM %s\n' "$(realpath "$gguf")" > Modelfile && ollama create pimwick -f Modelfile && ollama run pimwick
  LM Studio      lms import $gguf
EOF
