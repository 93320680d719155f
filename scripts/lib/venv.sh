# For scripts that run other people's Python packages. Sourced, from the repository's root, after server.sh.

# Makes a virtual environment with the newest of these packages, or takes the one that LORAD_VENV names; sets `python`.
python_environment() {
    local folder=${LORAD_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/lorad/venv}
    python="$folder/bin/python"
    if [ -z "${LORAD_VENV:-}" ]; then
        "$python" -m pip --version >/dev/null 2>&1 || make_environment "$folder"
        "$python" -m pip install --quiet --disable-pip-version-check --upgrade "$@"
    fi
    "$python" --version
}

# Makes an environment with pip in it, or leaves nothing. (Python writes the folder's name into its scripts, which nothing here
# calls: `python -m pip` works under any name.)
make_environment() {
    local folder=$1 new
    mkdir -p "$(dirname "$folder")"
    new=$(mktemp -d "$folder.new-XXXXXX")
    if ! python3 -m venv "$new" || ! "$new/bin/python" -m pip --version >/dev/null; then
        rm -rf "$new"
        fail "python3 cannot make a virtual environment with pip in it (Debian: apt-get install python3-venv)"
    fi
    rm -rf "$folder"
    mv "$new" "$folder"
}
