#!/usr/bin/env bash
# The whole build with CUDA: every kernel for every default architecture, lints, all tests compiled. Runs none of it, so it needs no GPU.
# nvcc is that of CUDA_HOME, or of the PATH; where there is none, scripts/cuda-toolkit.sh brings one into the cache.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ] && ! command -v nvcc >/dev/null; then
    toolkit="${XDG_CACHE_HOME:-$HOME/.cache}/lorad/cuda-13.0"
    scripts/cuda-toolkit.sh "$toolkit"
    # shellcheck source=/dev/null
    source "$toolkit/env.sh"
fi
# What narrows a build while one develops.
unset CUDA_COMPUTE_CAP LORAD_SKIP_KERNELS DATABASE_URL

cargo clippy --release --workspace --all-targets --features cuda --locked -- -D warnings
cargo test --release --workspace --features cuda --locked --no-run
cargo build --release --workspace --features cuda --bin lorad --locked

# A program without a driver says so, and does not fail to start.
target="${CARGO_TARGET_DIR:-target}/release/lorad"
"$target" devices
