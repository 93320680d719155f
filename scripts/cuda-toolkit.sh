#!/usr/bin/env bash
# Sets up the compiler of CUDA 13.0 in a folder of its own, from NVIDIA's packages on PyPI: for machines without a system CUDA.
#   scripts/cuda-toolkit.sh FOLDER && source FOLDER/env.sh
# It is what kernels are compiled with, nvcc, its parts and headers, and no more: a program of ours opens the libraries of CUDA when a
# training starts. Needs python3 with pip and a C++ compiler, and 210 MB. A folder that is complete is left as it is.
set -euo pipefail
[ $# = 1 ] || { echo "usage: scripts/cuda-toolkit.sh FOLDER" >&2; exit 2; }

mkdir -p "$1"
folder=$(cd "$1" && pwd)
if [ -e "$folder/env.sh" ]; then
    echo "$folder is complete: source $folder/env.sh"
    exit 0
fi
command -v g++ >/dev/null || { echo "cuda-toolkit: g++ is not installed, nvcc calls it" >&2; exit 1; }

# Of one release: parts of different ones do not fit each other.
packages=(
    nvidia-cuda-nvcc==13.0.88    # nvcc, and the assembler and linker that it calls
    nvidia-nvvm==13.0.88         # the compiler behind it
    nvidia-cuda-crt==13.0.88     # headers that it includes by itself
    nvidia-cuda-runtime==13.0.96 # cuda.h, cuda_bf16.h …
    nvidia-cuda-cccl==13.0.85    # nv/target, which those include
)
unpacked=$(mktemp -d "$folder/unpacked.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile --target "$unpacked" "${packages[@]}"
for part in bin nvvm include; do
    rm -rf "${folder:?}/$part"
    mv "$unpacked/nvidia/cu13/$part" "$folder/$part"
done
chmod -R u+x "$folder/bin" "$folder/nvvm/bin"

echo '__global__ void nothing() {}' >"$unpacked/nothing.cu"
"$folder/bin/nvcc" -fatbin -gencode arch=compute_90a,code=sm_90a -o "$unpacked/nothing.fatbin" "$unpacked/nothing.cu"

# Last, since it says that the folder is complete.
cat >"$folder/env.sh" <<ENV
export CUDA_HOME='$folder'
export PATH='$folder/bin':"\$PATH"
ENV
"$folder/bin/nvcc" --version | grep release
echo "source $folder/env.sh"
