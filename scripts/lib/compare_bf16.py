"""Trains in f32 and in bf16 from the same seed and compares the losses step by step.

    compare_bf16.py LORAD BASE.gguf WORK_DIR [STEPS]

Run from the repository's root. Ends with status 1 where a step, the mean of ten steps or the validation loss is more than 1% apart,
or where the loss comes so near to 0 that a ratio of losses says nothing. Needs nothing but Python's standard library.
"""

import csv
import json
import pathlib
import random
import statistics
import subprocess
import sys

ROWS, TOKENS, VALIDATION_ROWS, WINDOW = 4, 48, 32, 10
BOUND, LEAST_LOSS = 0.01, 0.5


def example_texts():
    """The turns of both examples."""
    for line in pathlib.Path("examples/persona.jsonl").read_text(encoding="utf-8").splitlines():
        yield "\n".join(message["content"] for message in json.loads(line)["messages"])
    for line in pathlib.Path("examples/alpaca.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield "\n".join(row[key] for key in ("instruction", "input", "output") if row.get(key))


def passages():
    """Passages of some 250 characters of the repository's documents, programs and scripts."""
    paths = [path for folder, ending in (("docs", "md"), ("engine/src", "rs"), ("src", "rs"), ("scripts", "py"))
             for path in sorted(pathlib.Path(folder).rglob(f"*.{ending}"))]
    for path in paths:
        passage = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            passage += line + "\n"
            if len(passage) > 250:
                yield passage
                passage = ""


def write_rows(work, count):
    """A training and a validation file without a row in common."""
    draw = random.Random(3407)
    rows, examples = list(passages()), list(example_texts())
    draw.shuffle(rows)
    held, rows = rows[:VALIDATION_ROWS], rows[VALIDATION_ROWS:]
    rows = (examples + rows)[:count]
    if len(rows) < count:
        sys.exit(f"the repository has {len(rows)} rows, {count} are needed")
    for name, some in (("train.jsonl", rows), ("valid.jsonl", held)):
        (work / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in some), encoding="utf-8")


def train(lorad, base, work, steps, compute):
    """The rows of metrics.csv."""
    out = work / compute
    options = {
        "base": base, "data": work / "train.jsonl", "validation": work / "valid.jsonl", "out": out, "max-steps": steps,
        "micro-batch-size": ROWS, "gradient-accumulation-steps": 1, "max-seq-length": TOKENS, "eval-steps": 50, "compute": compute,
    }
    command = [lorad, "train", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    with open(out / "metrics.csv", newline="") as table:
        return list(csv.DictReader(table))


def moving(losses):
    return [statistics.mean(losses[at:at + WINDOW]) for at in range(len(losses) - WINDOW + 1)]


def main():
    lorad, base, work = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 200
    write_rows(work, ROWS * steps)
    tables = {compute: train(lorad, base, work, steps, compute) for compute in ("f32", "bf16")}
    losses = {compute: [float(row["train_loss"]) for row in table] for compute, table in tables.items()}
    valid = {compute: [float(row["valid_loss"]) for row in table if row["valid_loss"]] for compute, table in tables.items()}
    curves = {
        "loss of a step": losses,
        f"mean of {WINDOW} steps": {compute: moving(values) for compute, values in losses.items()},
        "validation loss": valid,
    }
    seconds = {compute: sum(float(row["step_ms"]) for row in table) / 1000 for compute, table in tables.items()}
    print(f"{steps} steps of {ROWS} rows of at most {TOKENS} tokens, {tables['f32'][-1]['trained_tokens']} trained tokens, "
          f"f32 {seconds['f32']:.0f} s, bf16 {seconds['bf16']:.0f} s\n")
    print("| | f32 first | last | least | bf16 off: largest | mean | mean, signed |")
    print("|---|---|---|---|---|---|---|")
    failures = []
    for name, curve in curves.items():
        pairs = list(zip(curve["f32"], curve["bf16"], strict=True))
        off = [theirs / ours - 1 for ours, theirs in pairs]
        largest, least = max(map(abs, off)), min(curve["f32"])
        print(f"| {name} | {pairs[0][0]:.4f} | {pairs[-1][0]:.4f} | {least:.4f} | {largest:.3%} | "
              f"{statistics.mean(map(abs, off)):.3%} | {statistics.mean(off):+.4%} |")
        if not largest <= BOUND:
            failures.append(f"{name}: bf16 is {largest:.2%} off, more than {BOUND:.0%}")
        if not least >= LEAST_LOSS:
            failures.append(f"{name}: f32 falls to {least:.4f}, where 1% says nothing")
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
