#!/usr/bin/env bash
# Writes .sqlx/, what sqlx's macros know about each query, from the migrations. With --check: fails if it is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - "$work/schema.db" migrations/*.sql <<'PYTHON'
import sqlite3, sys
if sqlite3.sqlite_version_info < (3, 37):
    sys.exit(f"sqlx-prepare: python3 has SQLite {sqlite3.sqlite_version}, the migrations' strict tables need 3.37 or newer")
database = sqlite3.connect(sys.argv[1])
for migration in sys.argv[2:]:
    database.executescript(open(migration, encoding="utf-8").read())
database.close()
PYTHON

mkdir "$work/sqlx"
touch src/lib.rs # the macros write only when they run again
DATABASE_URL="sqlite://$work/schema.db" SQLX_OFFLINE_DIR="$work/sqlx" cargo check --quiet --release --workspace --lib

if [ "${1:-}" = --check ]; then
    diff -r .sqlx "$work/sqlx" || { echo "error: .sqlx is out of date, run scripts/sqlx-prepare.sh" >&2; exit 1; }
else
    rm -rf .sqlx
    mv "$work/sqlx" .sqlx
    touch src/lib.rs
fi
