"""Makes engine/tests/golden/nf4.json: what bitsandbytes' NF4 makes of some matrices on the CPU, and what it reads back.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch bitsandbytes
    /tmp/golden/bin/python scripts/golden/nf4.py

Values are made by a formula that the test repeats, so that the file holds results only.

On the CPU bitsandbytes 0.50 encodes f32 by a coarse lookup that is off by some codes near 0. Its GPU kernels take the nearest
value, and so does its own CPU code for other types: handed f64, the same factors are encoded exactly.
"""

import json
import pathlib

import bitsandbytes
import bitsandbytes.functional as functional
import torch

OUT = pathlib.Path(__file__).parents[2] / "engine/tests/golden/nf4.json"
# More than one block of factors and a part of one; rows across blocks; an odd number of values.
SHAPES = [(120, 172), (32, 64), (3, 33)]


def values(seed, length):
    state, out = (seed * 1_000_003 + 1) & 0xFFFFFFFF, []
    for _ in range(length):
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        uniform = (state >> 8) / (1 << 24) * 2.0 - 1.0
        out.append(uniform * uniform * uniform)
    return torch.tensor(out, dtype=torch.float64).float()


def bits(tensor):
    return tensor.flatten().view(torch.int32).numpy().astype(">u4").tobytes().hex()


def main():
    code_map = functional.create_dynamic_map()
    matrices = []
    for seed, (rows, columns) in enumerate(SHAPES):
        matrix = values(seed, rows * columns).reshape(rows, columns)
        packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
        absmax = state.absmax
        offset = absmax.mean()
        codes, nested = torch.ops.bitsandbytes.quantize_blockwise((absmax - offset).double(), code_map, 256)
        read = functional.dequantize_4bit(packed, state)
        state.absmax = functional.dequantize_blockwise(codes, absmax=nested, code=code_map, blocksize=256) + offset
        matrices.append(
            {
                "rows": rows,
                "columns": columns,
                "packed": bytes(packed.flatten().tolist()).hex(),
                "absmax": bits(absmax),
                "offset": bits(offset.reshape(1)),
                "absmax_codes": bytes(codes.tolist()).hex(),
                "nested_absmax": bits(nested),
                "every_31st": bits(read.flatten()[::31].contiguous()),
                "every_31st_double": bits(functional.dequantize_4bit(packed, state).flatten()[::31].contiguous()),
            }
        )
    golden = {
        "made_by": "scripts/golden/nf4.py",
        "versions": {module.__name__: module.__version__ for module in (torch, bitsandbytes)},
        "matrices": matrices,
    }
    OUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
