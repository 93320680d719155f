"""Runs `lorad bench train` for each kind of work and holds its figures beside their bounds; called by scripts/bench-gpu.sh."""

import json
import subprocess
import sys

# What the peers reach on one H100 of 80 GB stands in docs/LOG.md; a bound is tokens a second, GiB at most.
LLAMA = "--shape llama-3-8b --quantization nf4 --rank 16"
WORK = [
    ("2 x 2048, no recompute", f"{LLAMA} --micro-batch-size 2 --max-seq-length 2048 --gradient-checkpointing none --dense-resident --max-memory-gib 20.85", 16_700, 20.9),
    ("8 x 2048, no recompute", f"{LLAMA} --micro-batch-size 8 --max-seq-length 2048 --gradient-checkpointing none --dense-resident --max-memory-gib 59.9", 17_000, 60.0),
    ("1 x 8192, no recompute", f"{LLAMA} --micro-batch-size 1 --max-seq-length 8192 --gradient-checkpointing none --dense-resident --max-memory-gib 34.9", 13_800, 35.0),
    ("2 x 2048, full recompute", f"{LLAMA} --micro-batch-size 2 --max-seq-length 2048 --gradient-checkpointing full", 11_000, 7.9),
    ("1 x 8192, full recompute", f"{LLAMA} --micro-batch-size 1 --max-seq-length 8192 --gradient-checkpointing full", 9_900, 9.6),
    ("2 x 2048, auto", f"{LLAMA} --micro-batch-size 2 --max-seq-length 2048 --gradient-checkpointing auto", 16_700, None),
    ("SmolLM2-135M bf16, 8 x 512", "--shape smollm2-135m --quantization bf16 --rank 16 --micro-batch-size 8 --max-seq-length 512 --gradient-checkpointing none", 102_755, None),
]


def measure(lorad, options):
    run = subprocess.run([lorad, "bench", "train", *options.split()], stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        return None
    return json.loads(run.stdout)


def main():
    lorad, results = sys.argv[1:]
    print("| work | tokens/s | must | wall | peak GiB | at most | kept layers | dequantized GiB | of the floor | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    missed, first = [], None
    with open(results, "a") as file:
        for name, options, must, most in WORK:
            it = measure(lorad, options)
            if it is None:
                missed.append(f"{name}: the run failed")
                continue
            first = first or it
            file.write(json.dumps(it) + "\n")
            speed, peak = it["tokens_per_second"], it["peak_gib"]
            dequantized = it["resident_weight_bytes"] / 2**30
            print(
                f"| {name} | {speed:,.0f} | {must:,} | {it['tokens_per_second_wall']:,.0f} | {peak:.2f} | {most or ''} "
                f"| {it['kept_layers']} | {dequantized:.1f} | {it['share_of_floor']:.0%} | {it['matrix_tflops']:.0f} |",
                flush=True,
            )
            if speed < must:
                missed.append(f"{name}: {speed:,.0f} tokens/s, must be {must:,}")
            if most is not None and peak > most:
                missed.append(f"{name}: {peak:.2f} GiB, may be {most}")
            if it["peak_bytes"] > 1.1 * it["estimated_bytes"] or it["peak_bytes"] < 0.9 * it["estimated_bytes"]:
                missed.append(f"{name}: {it['peak_bytes']} bytes at the peak, {it['estimated_bytes']} estimated")
    if first:
        print(f"\nA micro-step of the first, ms: {json.dumps(first['family_ms'])}, together {first['micro_step_ms']}")
    for line in missed:
        print(f"DOES NOT HOLD: {line}")
    sys.exit(1 if missed else 0)


main()
