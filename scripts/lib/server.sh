# For scripts that start a server of their own: tools, build, start and stop. Sourced, from the repository's root.
# Sets `lorad` (the program), `url`, and `work` (a folder of this run). LORAD_PROGRAM names a program that is built already.

server_pid='' work=''

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { echo "${0##*/}: $*" >&2; exit 1; }

# need TOOL HOW-TO-GET-IT
need() { command -v "$1" >/dev/null || fail "$1 is not installed: $2"; }

# The value at a path of keys in the JSON on stdin: `json data 0 id`.
json() {
    python3 -c '
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1:]:
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value)' "$@"
}

# Calls the API; on an error status shows the answer and ends.
api() {
    local path=$1 body
    shift
    body=$(curl --silent --show-error --fail-with-body "$url$path" "$@") || fail "$path answered: $body"
    printf '%s\n' "$body"
}

check_tools() {
    need cargo "see https://rustup.rs"
    need cc "install your system's C compiler (Debian: apt-get install build-essential)"
    need python3 "install python3 (Debian: apt-get install python3 python3-pip)"
    need curl "install curl (Debian: apt-get install curl)"
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip (Debian: apt-get install python3-pip)"
}

# Whatever way the script ends: the server stops (and with it its workers), then the folder goes.
clean_up() {
    local status=$? try
    trap - EXIT
    trap '' INT TERM
    if [ -n "$server_pid" ]; then
        kill -TERM "$server_pid" 2>/dev/null || true
        for ((try = 0; try < 100; try++)); do
            kill -0 "$server_pid" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL "$server_pid" 2>/dev/null || true
    fi
    [ -z "$work" ] || rm -rf "$work"
    exit "$status"
}

# start_server [SETTINGS]: starts the server on a free port, with these lines in its lorad.toml, and sets `url` once it is ready.
start_server() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/lorad-XXXXXX")
    local port name
    # The defaults must hold, whatever this machine's own server is told by its environment and lorad.toml.
    printf '%s\n' "${1:-}" >"$work/lorad.toml"
    for name in "${!LORAD__@}"; do unset "$name"; done
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    # A process group of its own: Ctrl-C reaches this script, which then stops the server in order.
    set -m
    "$lorad" serve --config "$work/lorad.toml" --data-dir "$work/data" --listen "127.0.0.1:$port" >"$work/server.log" 2>&1 </dev/null &
    server_pid=$!
    set +m
    url="http://127.0.0.1:$port"
    until curl --silent --fail --max-time 2 --output /dev/null "$url/readyz"; do
        kill -0 "$server_pid" 2>/dev/null || { cat "$work/server.log" >&2; fail "the server did not start"; }
        sleep 0.2
    done
}

# Builds the program, with the very features that the tests' build has.
build() {
    local target
    if [ -n "${LORAD_PROGRAM:-}" ]; then
        lorad=$LORAD_PROGRAM
        return
    fi
    env -u DATABASE_URL cargo build --release --workspace --locked --bin lorad
    target=$(cargo metadata --format-version 1 --no-deps --locked)
    target=$(json target_directory <<<"$target")
    # shellcheck disable=SC2034 # for the script that reads this file
    lorad="$target/release/lorad"
}

# Makes every way out of the script a clean one.
trap_exit() {
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
