"""Makes engine/tests/golden/adamw_8bit.json: tables, and codes after some steps, of bitsandbytes' AdamW8bit on the CPU.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch bitsandbytes
    /tmp/golden/bin/python scripts/golden/adamw_8bit.py

Parameters and gradients are made by a formula that the test repeats, so that the file holds results only.

On the CPU bitsandbytes 0.50 encodes f32 by a coarse lookup that is off by some codes near 0. Its GPU kernels take the nearest
value, and so does its own CPU code for other types: handed f64, the same values are encoded exactly.
"""

import json
import pathlib

import bitsandbytes
import bitsandbytes.backends.cpu.ops as cpu_ops
import bitsandbytes.functional
import torch

OUT = pathlib.Path(__file__).parents[2] / "engine/tests/golden/adamw_8bit.json"
STEPS, LEARNING_RATE, WEIGHT_DECAY = 6, 1e-3, 0.01
# A block and a part of one; whole blocks; a tensor that is too small for 8 bits.
LENGTHS = [4096 + 300, 4096, 1000]


def values(seed, step, length):
    state, out = (seed * 1_000_003 + step * 7919 + 1) & 0xFFFFFFFF, []
    for _ in range(length):
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        uniform = (state >> 8) / (1 << 24) * 2.0 - 1.0
        out.append(uniform * uniform * uniform)
    return torch.tensor(out, dtype=torch.float64).float()


def encode_exactly(values, table, factors, codes, block):
    exact_codes, exact_factors = torch.ops.bitsandbytes.quantize_blockwise(values.double(), table, block)
    codes.copy_(exact_codes)
    factors.copy_(exact_factors)


def main():
    cpu_ops._quant_blockwise_fp32_direct = encode_exactly
    torch.set_num_threads(1)
    parameters = [torch.nn.Parameter(values(seed, 0, length)) for seed, length in enumerate(LENGTHS)]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(1, STEPS + 1):
        for seed, parameter in enumerate(parameters):
            parameter.grad = values(seed, step, len(parameter))
        optimizer.step()
    tensors = []
    for seed, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        is_8bit = state["state1"].dtype == torch.uint8
        tensors.append(
            {
                "length": len(parameter),
                "seed": seed,
                "steps": STEPS,
                "m_codes": bytes(state["state1"].tolist()).hex() if is_8bit else None,
                "v_codes": bytes(state["state2"].tolist()).hex() if is_8bit else None,
                "m_factors": state["absmax1"].tolist() if is_8bit else None,
                "v_factors": state["absmax2"].tolist() if is_8bit else None,
                "every_16th_parameter": [float(f"{value:.7g}") for value in parameter.tolist()[::16]],
            }
        )
    golden = {
        "made_by": "scripts/golden/adamw_8bit.py",
        "versions": {module.__name__: module.__version__ for module in (torch, bitsandbytes)},
        "signed_map": bitsandbytes.functional.create_dynamic_map(signed=True).tolist(),
        "unsigned_map": bitsandbytes.functional.create_dynamic_map(signed=False).tolist(),
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "tensors": tensors,
    }
    OUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
