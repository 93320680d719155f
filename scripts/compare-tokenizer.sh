#!/usr/bin/env bash
# Our tokens against llama.cpp's, token by token, on texts that are hard to cut: `compare-tokenizer.sh [MODEL.gguf…]`.
# Without a model: the tiny SentencePiece and byte-level vocabularies (whose golden file is written anew), SmolLM2, and Llama 3
# under each pre-tokenizer. Sets up what it needs (llama.cpp is built once, some ten minutes; LORAD_LLAMA_CPP names a folder of
# its tools). LORAD_SHARED_DATA names a folder of real files to compare on too. Not part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/peers.sh
. scripts/lib/peers.sh

check_tools
llama_cpp_tools llama-tokenize
say "Build"
build_examples tokenize tiny_model
work_folder
# shellcheck disable=SC2154 # set by the functions above
compare=(python3 scripts/lib/compare_tokenizer.py "$examples/tokenize" "$llama_cpp/llama-tokenize")
more=()
[ ! -d "${LORAD_SHARED_DATA:-}" ] || more=(--data "$LORAD_SHARED_DATA")

if [ $# -gt 0 ]; then
    say "Compare"
    "${compare[@]}" "$@" --characters "${more[@]}"
    exit
fi
say "Python environment"
python_environment gguf llama-models
say "SentencePiece"
"$examples/tiny_model" "$work/tiny-llama.gguf" 1 F32 llama
"${compare[@]}" "$work/tiny-llama.gguf" --golden engine/tests/golden/tokenizer-llama.json
say "Every character"
"$examples/tiny_model" "$work/tiny.gguf"
"$python" scripts/golden/llama3_vocabulary.py "$work/llama-bpe.gguf"
smollm2=${LORAD_SMOLLM2:-$(scripts/get-model.sh)}
"${compare[@]}" "$work/tiny-llama.gguf" "$work/tiny.gguf" "$smollm2" "$work/llama-bpe.gguf" --characters "${more[@]}"
say "Other pre-tokenizers, on Llama 3's vocabulary"
for pre in gpt-2 default tekken qwen2 smaug-bpe; do
    "$python" scripts/golden/llama3_vocabulary.py "$work/$pre.gguf" "$pre"
    "${compare[@]}" "$work/$pre.gguf"
done
