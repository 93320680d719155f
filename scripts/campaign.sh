#!/usr/bin/env bash
# The fault campaign at length: `scripts/campaign.sh [RUNS] [SEED]`, 50 runs from seed 1. A run that fails prints its seed:
# `scripts/campaign.sh 1 SEED` repeats it alone.
set -euo pipefail
cd "$(dirname "$0")/.."

env -u DATABASE_URL LORAD_CAMPAIGN_RUNS="${1:-50}" LORAD_CAMPAIGN_SEED="${2:-1}" \
    cargo test --release --workspace --locked --test campaign -- --nocapture
