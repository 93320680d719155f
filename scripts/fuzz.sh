#!/usr/bin/env bash
# Fuzzing of what strangers give: `fuzz.sh [SECONDS] [TARGET…]`, by default 600 seconds each of gguf, safetensors and dataset
# (fuzz/fuzz_targets), one after the other, with the address sanitizer, debug assertions and overflow checks. What is found lies
# in fuzz/artifacts/TARGET; the corpus, which the next run goes on from, in fuzz/corpus/TARGET. Not part of CI.
#
# Needs cargo-fuzz and a C++ compiler. The sanitizer's flags are for a nightly compiler; a stable one takes them too, as it is
# told with RUSTC_BOOTSTRAP.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=600
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    seconds=$1
    shift
fi
targets=("$@")
[ $# -gt 0 ] || targets=(gguf safetensors dataset)
for target in "${targets[@]}"; do
    [ -f "fuzz/fuzz_targets/$target.rs" ] || { echo "fuzz.sh: no target $target in fuzz/fuzz_targets" >&2; exit 2; }
done
cargo fuzz --version >/dev/null 2>&1 || { echo "fuzz.sh: cargo-fuzz is not installed: cargo install --locked cargo-fuzz" >&2; exit 1; }
command -v c++ >/dev/null || { echo "fuzz.sh: a C++ compiler is not installed" >&2; exit 1; }

export RUSTC_BOOTSTRAP=1
# Longest input: the largest seed, a whole model, has 39,392 bytes.
limits=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=1024 -max_len=40960 -detect_leaks=0)
found=0
for target in "${targets[@]}"; do
    echo "== $target, $seconds seconds"
    cargo fuzz build --fuzz-dir fuzz "$target"
    corpus=fuzz/corpus/$target seeds=fuzz/seeds/$target
    mkdir -p "$corpus" "$seeds" "fuzz/artifacts/$target"
    program=fuzz/target/x86_64-unknown-linux-gnu/release/$target
    LORAD_FUZZ_SEEDS=$seeds "$program"
    # A finding does not keep the other targets from running.
    "$program" "${limits[@]}" -dict="fuzz/dictionaries/$target.txt" -artifact_prefix="fuzz/artifacts/$target/" \
        -print_final_stats=1 "$corpus" "$seeds" || found=1
    rm -rf /dev/shm/lorad-fuzz-*
done
exit "$found"
