"""Quantizes one f16 file with lorad and with llama-quantize, and compares types, bytes and perplexity.

    compare_quantize.py CONVERT LLAMA_CPP_FOLDER WORK_DIR TEXT...

WORK_DIR holds f16.gguf. Ends with status 1 and what is wrong where a tensor's type differs, or a perplexity by more than 1%. Needs
nothing but Python's standard library.
"""

import collections
import pathlib
import re
import struct
import subprocess
import sys

QUANTIZATIONS = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"]
NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
         13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 30: "BF16"}
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
CHUNK = 128
BOUND = 0.01
# Characters of held text: some ten chunks.
TEXT = 5_000


class File:
    """The tensors of a GGUF file: name → (type, offset, end)."""

    def __init__(self, path):
        self.data = path.read_bytes()
        self.at = 4
        version, tensors, pairs = self.take("<IQQ")
        assert version == 3
        for _ in range(pairs):
            self.text()
            self.skip(self.take("<I")[0])
        found = []
        for _ in range(tensors):
            name = self.text()
            dimensions = self.take("<I")[0]
            self.at += 8 * dimensions
            found.append((name, *self.take("<IQ")))
        start = -(-self.at // 32) * 32
        ends = [offset for _, _, offset in found[1:]] + [len(self.data) - start]
        self.tensors = {name: (kind, start + offset, start + end) for (name, kind, offset), end in zip(found, ends)}

    def take(self, form):
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self):
        length = self.take("<Q")[0]
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def skip(self, kind):
        if kind == 8:
            self.text()
        elif kind == 9:
            inner, count = self.take("<IQ")
            for _ in range(count):
                self.skip(inner)
        else:
            self.at += SIZES[kind]

    def bytes(self, name):
        _, start, end = self.tensors[name]
        return self.data[start:end].rstrip(b"\0")


def perplexity(folder, model, text):
    command = [folder / "llama-perplexity", "-m", model, "-f", text, "-c", str(CHUNK), "-b", str(CHUNK)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", output.stdout + output.stderr)
    if found is None:
        sys.exit(f"llama-perplexity told no perplexity of {model}: {(output.stdout + output.stderr)[-300:]}")
    return float(found.group(1))


def main():
    convert, folder, work = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    text = work / "held.txt"
    text.write_text("\n".join(pathlib.Path(name).read_text() for name in sys.argv[4:])[:TEXT])
    base, ours, theirs = (work / name for name in ("f16.gguf", "ours.gguf", "theirs.gguf"))
    print("| quantization | byte-equal tensors by type | perplexity ours | theirs | ratio |")
    print("|---|---|---|---|---|")
    failures = []
    for name in QUANTIZATIONS:
        subprocess.run([convert, base, f"{name}={ours}"], check=True, capture_output=True)
        subprocess.run([folder / "llama-quantize", base, theirs, name], check=True, capture_output=True)
        mine, other = File(ours), File(theirs)
        kinds = [{tensor: NAMES[kind] for tensor, (kind, _, _) in file.tensors.items()} for file in (mine, other)]
        pairs = {tensor: [kind.get(tensor, "missing") for kind in kinds] for tensor in sorted(set(kinds[0]) | set(kinds[1]))}
        others = [f"{tensor} ({ours_is}, not {theirs_is})" for tensor, (ours_is, theirs_is) in pairs.items() if ours_is != theirs_is]
        if others:
            failures.append(f"{name}: {len(others)} tensors have another type than llama-quantize's: {', '.join(others[:3])}")
        counts = collections.defaultdict(lambda: [0, 0])
        for tensor, (kind, _, _) in other.tensors.items():
            counts[NAMES[kind]][0] += tensor in mine.tensors and mine.bytes(tensor) == other.bytes(tensor)
            counts[NAMES[kind]][1] += 1
        shares = ", ".join(f"{kind} {equal}/{count}" for kind, (equal, count) in sorted(counts.items()))
        first, second = perplexity(folder, ours, text), perplexity(folder, theirs, text)
        if not abs(first / second - 1) <= BOUND:
            failures.append(f"{name}: perplexity {first:.4f} is {first / second - 1:+.2%} off llama-quantize's {second:.4f}")
        print(f"| {name} | {shares} | {first:.4f} | {second:.4f} | {first / second:.4f} |", flush=True)
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
