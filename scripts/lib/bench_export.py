"""Times lorad's export and llama-quantize on one file, in turn, and prints a table with their ratio.

    bench_export.py CONVERT LLAMA_QUANTIZE WORK_DIR [ROUNDS] [LAYERS] [VOCABULARY]
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time

RANK = 16


def run(command):
    """Seconds, processor seconds and peak resident bytes of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} ended with status {status}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main():
    convert, quantize, work = sys.argv[1:4]
    rounds, layers, vocabulary = (int(text) for text in (sys.argv[4:] + ["3", "32", "128256"][len(sys.argv[4:]):]))
    work = pathlib.Path(work)
    base, ours, theirs = (work / name for name in ("base.gguf", "ours.gguf", "theirs.gguf"))
    maker = pathlib.Path(__file__).with_name("make_8b_shaped.py")
    subprocess.run([sys.executable, maker, base, str(layers), str(vocabulary)], check=True)
    commands = {
        "lorad": [convert, base, f"q4_k_m={ours}", str(RANK)],
        "llama-quantize": [quantize, base, theirs, "q4_k_m", str(os.cpu_count())],
    }
    print(f"{layers} layers, vocabulary {vocabulary}, {base.stat().st_size / 1e9:.2f} GB of f16 to q4_k_m, "
          f"{os.cpu_count()} cores, {rounds} rounds in turn; lorad merges rank {RANK} and reads back\n")
    results = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(run(command))
            (ours if name == "lorad" else theirs).unlink()
    print("| program | s (median) | s by round | processor s | peak resident GB |")
    print("|---|---|---|---|---|")
    medians = {}
    for name, runs in results.items():
        medians[name] = statistics.median(seconds for seconds, _, _ in runs)
        by_round = ", ".join(f"{seconds:.1f}" for seconds, _, _ in runs)
        processor = statistics.median(processor for _, processor, _ in runs)
        peak = max(peak for _, _, peak in runs) / 1e9
        print(f"| {name} | {medians[name]:.1f} | {by_round} | {processor:.1f} | {peak:.2f} |")
    print(f"| **lorad / llama-quantize** | **{medians['lorad'] / medians['llama-quantize']:.2f}** | | | |")


if __name__ == "__main__":
    main()
