# For scripts that compare lorad with other programs, or measure it. Sourced, from the repository's root.
# shellcheck source=scripts/lib/server.sh
. scripts/lib/server.sh
# shellcheck source=scripts/lib/venv.sh
. scripts/lib/venv.sh
# shellcheck source=scripts/lib/llama_cpp.sh
. scripts/lib/llama_cpp.sh

# Sets `work`, a folder that goes when the script ends.
work_folder() {
    trap_exit
    work=$(mktemp -d "${TMPDIR:-/tmp}/lorad-XXXXXX")
}

# Builds the engine's examples of these names and sets `examples`, the folder that they are in.
build_examples() {
    local target name names=()
    for name in "$@"; do names+=(--example "$name"); done
    cargo build --release --workspace --locked "${names[@]}"
    target=$(cargo metadata --format-version 1 --no-deps --locked)
    target=$(json target_directory <<<"$target")
    # shellcheck disable=SC2034 # for the script that reads this file
    examples="$target/release/examples"
}

# The machine that a measurement is of.
machine() {
    uname -srm
    sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1
}
