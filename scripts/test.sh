#!/usr/bin/env bash
# Every check of the repository: format, lints, documentation, tests, offline data, scripts. `.ci/run` calls it too.
# Everything is built in the release profile, so that nothing is built twice.
set -euo pipefail
cd "$(dirname "$0")/.."
# Without a database the sqlx macros read .sqlx/.
unset DATABASE_URL

step() { printf '\n== %s\n' "$*"; }

step "scripts parse"
scripts=(.ci/run scripts/*.sh)
for script in "${scripts[@]}"; do bash -n "$script"; done
if command -v shellcheck >/dev/null; then shellcheck -x "${scripts[@]}"; fi
python3 - scripts/*/*.py <<'EOF'
import ast, pathlib, sys
for path in sys.argv[1:]:
    ast.parse(pathlib.Path(path).read_text(), path)
EOF

step "cargo fmt"
cargo fmt --all --check

step "cargo clippy"
cargo clippy --release --workspace --all-targets --locked -- -D warnings

step "cargo clippy with CUDA"
# All code for GPUs but the kernels, without a toolkit of CUDA. `scripts/check-cuda.sh` compiles those too.
LORAD_SKIP_KERNELS=1 cargo clippy --release --workspace --all-targets --features cuda --locked -- -D warnings

step "cargo doc"
RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --release --workspace --no-deps --document-private-items --locked

step "sqlx offline data"
scripts/sqlx-prepare.sh --check

step "doctests"
cargo test --release --workspace --doc --locked

step "tests"
# Some tests need the real model. The test runner hides what a passing test prints, so what is skipped is said here.
if [ -z "${LORAD_SMOLLM2:-}" ] && LORAD_SMOLLM2=$(scripts/get-model.sh); then export LORAD_SMOLLM2; fi
[ -n "$LORAD_SMOLLM2" ] || echo "SKIPPED: tests against SmolLM2, no source has its file"
[ -d "${LORAD_SHARED_DATA:-../shared/data}" ] || echo "SKIPPED: tests against real data sets, LORAD_SHARED_DATA names no folder"
# Storage servers; one that could not be installed is told there, and the tests that need it pass without it.
if servers=$(scripts/storage-servers.sh); then eval "$servers"; else echo "SKIPPED: tests against storage servers"; fi
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release --workspace --locked --no-fail-fast
else
    cargo test --release --workspace --lib --bins --tests --examples --locked --no-fail-fast
fi
