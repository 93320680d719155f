#!/usr/bin/env bash
# The stock `openai` client, in its oldest version that scripts still use and in its newest, against a lorad server, changing only
# base_url and key: every call for files, uploads, fine-tuning jobs and models, with a model that trains. Each answer's JSON is
# held against the shapes of the newest client, and each request is counted: an error that a client repeats is a mistake.
# Not part of CI: it needs a package index (without one it says so and ends well), and some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh

cache=${XDG_CACHE_HOME:-$HOME/.cache}/lorad
old=$cache/openai-1.55.3
new=$cache/openai-newest
key=sk-lorad-of-this-run

# environment FOLDER PACKAGE...: has these packages, in their newest versions where none is named.
environment() {
    local folder=$1
    shift
    "$folder/bin/python" -m pip --version >/dev/null 2>&1 || make_environment "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --upgrade "$@" || {
        echo "SKIPPED: pip cannot install $*, so no client was checked"
        exit 0
    }
}

check_tools
say "Clients"
# This version does not know the HTTP library's later ones.
environment "$old" openai==1.55.3 'httpx<0.28' jsonschema
environment "$new" openai jsonschema
say "Build"
build
scripts/get-model.sh
say "Server"
trap_exit
start_server "[auth]
bootstrap_key = \"$key\""
# Only its name matters.
mkdir -p "$work/data/models/folder"
: >"$work/data/models/folder/model.gguf"
echo "  $url"
"$new/bin/python" scripts/openai/schemas.py "$work/schemas.json"
failed=0
for folder in "$old" "$new"; do
    say "$("$folder/bin/python" -c 'import openai; print("openai", openai.__version__)')"
    "$folder/bin/python" scripts/openai/main.py "$url" "$key" smollm2-135m-instruct examples/persona.jsonl "$work/schemas.json" || failed=1
done
exit "$failed"
