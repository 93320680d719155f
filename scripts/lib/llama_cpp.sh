# For scripts that run llama.cpp's own tools. Sourced, from the repository's root, after server.sh.

# The Python package whose source distribution carries llama.cpp; pinned, so that measurements can be compared.
llama_cpp_package=llama-cpp-python==0.3.36

# Sets `llama_cpp`, the folder of the tools: the one that LORAD_LLAMA_CPP names, or one that is built here (once, some ten
# minutes on two cores, into the cache). Fails where it lacks a tool of these names: `llama_cpp_tools llama-quantize`.
llama_cpp_tools() {
    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/lorad tool missing=''
    llama_cpp=${LORAD_LLAMA_CPP:-$cache/llama.cpp/bin}
    for tool in "$@"; do
        [ -x "$llama_cpp/$tool" ] || missing+=" $tool"
    done
    [ -n "$missing" ] || return 0
    [ -z "${LORAD_LLAMA_CPP:-}" ] || fail "LORAD_LLAMA_CPP=$LORAD_LLAMA_CPP has no$missing"
    build_llama_cpp "$cache/llama.cpp" "$missing"
}

# Builds tools in the folder, with a PATH of its own. An interrupted build goes on where it stopped.
build_llama_cpp() (
    local folder=$1 tools=$2 source
    need c++ "install your system's C++ compiler (Debian: apt-get install build-essential)"
    mkdir -p "$folder"
    [ -x "$folder/venv/bin/python" ] || python3 -m venv "$folder/venv" ||
        fail "python3 cannot make a virtual environment (Debian: apt-get install python3-venv)"
    PATH="$folder/venv/bin:$PATH"
    python -m pip install --quiet --disable-pip-version-check cmake ninja scikit-build-core
    source=$(find "$folder" -maxdepth 3 -path '*/vendor/llama.cpp' -print -quit)
    if [ -z "$source" ]; then
        python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
            --dest "$folder" "$llama_cpp_package"
        tar -xzf "$folder"/llama_cpp_python-*.tar.gz -C "$folder"
        source=$(find "$folder" -maxdepth 3 -path '*/vendor/llama.cpp' -print -quit)
    fi
    cmake -G Ninja -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$folder/build.log"
    # shellcheck disable=SC2086 # several targets
    cmake --build "$folder/build" --target $tools >>"$folder/build.log" || fail "llama.cpp does not build: $folder/build.log"
    ln -sfn build/bin "$folder/bin"
)
