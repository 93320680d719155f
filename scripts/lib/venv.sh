# For scripts that run other people's Python packages. Sourced, from the repository's root.

# Makes a virtual environment with the newest of these packages, or takes the one that LORAD_VENV names; sets `python`.
python_environment() {
    local folder=${LORAD_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/lorad/venv}
    python="$folder/bin/python"
    if [ -z "${LORAD_VENV:-}" ]; then
        [ -x "$python" ] || python3 -m venv "$folder"
        "$python" -m pip install --quiet --disable-pip-version-check --upgrade "$@"
    fi
    "$python" --version
}
