#!/usr/bin/env bash
# Compares `lorad train --estimate` with the peak memory of the run itself, over row lengths, ranks and checkpointing.
# Usage: scripts/bench-estimate.sh MODEL.gguf [ROW_LENGTH…]     Needs a built target/release/lorad and python3.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:?usage: scripts/bench-estimate.sh MODEL.gguf [ROW_LENGTH…]}
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - target/release/lorad "$model" "$work" "${@:-64 128 256 512}" <<'PYTHON'
import json, os, pathlib, shutil, subprocess, sys

lorad, model, work = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
lengths = [int(length) for argument in sys.argv[4:] for length in argument.split()]
rows = work / "rows.jsonl"
answer = " ".join(f"word {number} and" for number in range(1200))
message = lambda role, content: {"role": role, "content": content}
row = json.dumps({"messages": [message("user", "Count."), message("assistant", answer)]})
rows.write_text("\n".join([row] * 12) + "\n")

worst = 0.0
print("| tokens a row | r | checkpointing | optimizer | estimated MB | measured MB | off |\n|---|---|---|---|---|---|---|")
for length in lengths:
    for rank in (8, 64):
        for checkpointing in ("none", "full"):
            for optimizer in ("adamw", "adamw_8bit"):
                out = work / "out"
                shutil.rmtree(out, ignore_errors=True)
                command = [lorad, "train", "--base", model, "--data", rows, "--out", out, "--max-steps", "2", "--r", str(rank)]
                command += ["--micro-batch-size", "2", "--gradient-accumulation-steps", "2", "--max-seq-length", str(length)]
                command += ["--gradient-checkpointing", checkpointing, "--optimizer", optimizer]
                told = subprocess.run(command + ["--estimate"], check=True, capture_output=True, text=True).stdout
                estimated = int(dict(line.split() for line in told.splitlines())["peak_host_bytes"]) / 1e6
                with open(os.devnull, "w") as nothing:
                    run = subprocess.Popen(command, stdout=nothing, stderr=nothing)
                    _, status, usage = os.wait4(run.pid, 0)
                    run.returncode = os.waitstatus_to_exitcode(status)
                assert run.returncode == 0, command
                measured = usage.ru_maxrss * 1024 / 1e6
                off = estimated / measured - 1
                worst = max(worst, abs(off))
                print(f"| {length} | {rank} | {checkpointing} | {optimizer} | {estimated:.0f} | {measured:.0f} | {off:+.1%} |", flush=True)
print(f"\nworst: {worst:.1%}")
sys.exit(worst > 0.10)
PYTHON
