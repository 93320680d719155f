"""Trains the same model on rows of the same length with lorad and with PEFT, in turn, and prints a table of ratios for f32 and
for bf16 (where the processor has no AVX512-BF16, f32 alone).

    bench_cpu.py LORAD BASE.gguf PYTHON WORK_DIR [ROUNDS] [STEPS]
"""

import csv
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys

ROWS, TOKENS, RANK = 4, 256, 16
WARM_UP = 2


def run(command):
    """Standard output of a command, and the largest resident size that it reached, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} ended with status {status}")
    return output, usage.ru_maxrss * 1024


def write_rows(path, count):
    """Rows that are longer than TOKENS tokens, so that every one is cut to exactly that many."""
    words = "river lantern harbour meadow copper window story winter garden letter bridge signal".split()
    source = random.Random(1)
    with open(path, "w") as out:
        for _ in range(count):
            text = " ".join(source.choices(words, k=2 * TOKENS))
            messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]
            out.write(json.dumps({"messages": messages}) + "\n")


def run_lorad(lorad, base, data, out, steps, compute):
    """Milliseconds of lorad's steps, and its peak resident size."""
    options = {
        "base": base, "data": data, "out": out, "max-steps": steps, "micro-batch-size": ROWS,
        "gradient-accumulation-steps": 1, "max-seq-length": TOKENS, "train-on": "all", "r": RANK, "alpha": 16, "compute": compute,
    }
    command = [lorad, "train"] + [word for key, value in options.items() for word in (f"--{key}", str(value))]
    _, peak = run(command)
    with open(out / "metrics.csv", newline="") as table:
        return [float(row["step_ms"]) for row in csv.DictReader(table)], peak


def run_peer(python, base, steps, compute):
    """Milliseconds of PEFT's steps, and its peak resident size."""
    script = pathlib.Path(__file__).with_name("peer_train.py")
    output, peak = run([python, script, base, *map(str, (ROWS, TOKENS, steps, RANK)), compute])
    return json.loads(output.splitlines()[-1]), peak


def main():
    lorad, base, python, work = sys.argv[1:5]
    rounds, steps = (int(value) for value in (sys.argv[5:7] + ["3", "8"][len(sys.argv[5:7]):]))
    work = pathlib.Path(work)
    write_rows(work / "rows.jsonl", ROWS * steps)
    has_bf16 = "avx512_bf16" in pathlib.Path("/proc/cpuinfo").read_text()
    for compute in ["f32", "bf16"] if has_bf16 else ["f32"]:
        results = {"lorad": [], "PEFT": []}
        for at in range(rounds):
            out = work / f"out-{compute}-{at}"
            results["lorad"].append(run_lorad(lorad, base, work / "rows.jsonl", out, steps, compute))
            results["PEFT"].append(run_peer(python, base, steps, compute))
        print_table(results, rounds, steps, compute)


def print_table(results, rounds, steps, compute):
    print(f"\n{ROWS} x {TOKENS} tokens a step, r {RANK} on all seven projections, {compute}, {os.cpu_count()} cores, "
          f"{rounds} rounds of {steps} steps in turn, the first {WARM_UP} of each left out\n")
    print("| trainer | tokens/s (median) | tokens/s by round | peak resident GB |")
    print("|---|---|---|---|")
    summary = {}
    for name, runs in results.items():
        by_round = [ROWS * TOKENS * 1000 / statistics.median(times[WARM_UP:]) for times, _ in runs]
        summary[name] = (statistics.median(by_round), max(peak for _, peak in runs) / 1e9)
        speeds = ", ".join(f"{speed:.0f}" for speed in by_round)
        print(f"| {name} | {summary[name][0]:.0f} | {speeds} | {summary[name][1]:.2f} |")
    speed, memory = (summary["lorad"][at] / summary["PEFT"][at] for at in (0, 1))
    print(f"| **lorad / PEFT** | **{speed:.2f}** | | **{memory:.2f}** |")


if __name__ == "__main__":
    main()
