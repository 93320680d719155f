"""Makes engine/tests/golden/schedules.json: the learning rate of every step as transformers' schedules have it.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers
    /tmp/golden/bin/python scripts/golden/schedules.py
"""

import json
import pathlib

import torch
import transformers

OUT = pathlib.Path(__file__).parents[2] / "engine/tests/golden/schedules.json"
# (warmup_steps, total_steps): the usual, none, one step, a run that ends before its warm-up does.
RUNS = [(5, 42), (0, 17), (0, 1), (10, 4)]


def curve(name, warmup_steps, total_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    if name == "constant":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warmup_steps)
    else:
        make = {"linear": transformers.get_linear_schedule_with_warmup, "cosine": transformers.get_cosine_schedule_with_warmup}[name]
        schedule = make(optimizer, warmup_steps, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return {"lr_scheduler": name, "warmup_steps": warmup_steps, "total_steps": total_steps, "learning_rate": rates}


def main():
    runs = [curve(name, *run) for name in ("linear", "cosine", "constant") for run in RUNS]
    OUT.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")


if __name__ == "__main__":
    main()
