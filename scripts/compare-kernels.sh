#!/usr/bin/env bash
# Whose machine code changed since a commit: each file of kernels/ there and here, compiled and compared instruction by instruction.
# Needs the CUDA toolkit (nvcc, cuobjdump) and no GPU: what is the same needs no new run on one. Ends with 1 where a file differs.
# usage: compare-kernels.sh COMMIT [ARCHITECTURES], those comma-separated as in CUDA_COMPUTE_CAP; default 80,89,90a
set -euo pipefail
cd "$(dirname "$0")/.."

commit=${1:?usage: compare-kernels.sh COMMIT [ARCHITECTURES]}
IFS=, read -ra architectures <<<"${2:-80,89,90a}"
home=${CUDA_HOME:-${CUDA_PATH:-}}
PATH="${home:+$home/bin:}$PATH"
for tool in nvcc cuobjdump; do
    command -v "$tool" >/dev/null || { echo "compare-kernels.sh: $tool is not there: set CUDA_HOME, or run scripts/cuda-toolkit.sh" >&2; exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/before"
git archive "$commit" kernels | tar -x -C "$work/before"
ln -s "$PWD" "$work/after"

# instructions SIDE NAME ARCHITECTURE: its machine code, without the lines that tell of the file; nothing where the side has no such file.
instructions() {
    local source="$work/$1/kernels/$2.cu" cubin="$work/$1-$2-$3.cubin"
    [ -e "$source" ] || return 0
    nvcc -cubin -std=c++17 -O3 -lineinfo -arch="sm_$3" -o "$cubin" "$source"
    cuobjdump -sass "$cubin" | grep -vE '^(Fatbin|host|compile_size|identifier|producer)'
}

compare() {
    local before="$work/$1-$2.before" after="$work/$1-$2.after"
    instructions before "$1" "$2" >"$before"
    instructions after "$1" "$2" >"$after"
    if cmp -s "$before" "$after"; then
        echo "same     sm_$2 $1"
    else
        echo "differs  sm_$2 $1"
    fi
}

mapfile -t names < <({ ls "$work/before/kernels" kernels; } | sed -n 's/\.cu$//p' | sort -u)
export work
export -f instructions compare
for architecture in "${architectures[@]}"; do
    printf '%s\n' "${names[@]}" | xargs -P "$(nproc)" -I{} bash -euo pipefail -c "compare {} '$architecture'"
done | sort -k 3 | tee "$work/told"
if grep -q '^differs' "$work/told"; then exit 1; fi
