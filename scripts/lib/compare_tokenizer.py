"""Compares lorad's tokens with llama.cpp's: compare_tokenizer.py TOKENIZE LLAMA_TOKENIZE MODEL.gguf…

TOKENIZE is our example of that name. Every text is encoded twice, with the text of special tokens read as tokens and as text.
With `--golden FILE` llama.cpp's tokens of the first model are written there. `--characters` and `--data` make it minutes. Ends with status 1 where any text differs.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from hard_texts import TEXTS  # noqa: E402


def ours(program, model, texts, plain):
    """Our tokens of all texts."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(texts, file)
        file.flush()
        command = [program, model, file.name, *(["plain"] if plain else [])]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def llama_cpp(program, model, text, plain):
    """llama.cpp's tokens of one text; its program takes the bytes of a file as they are."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.write(text.encode())
        file.flush()
        command = [program, "-m", model, "-f", file.name, "--no-escape", "--ids", "--log-disable"]
        command += ["--no-parse-special"] if plain else []
        out = subprocess.run(command, check=True, capture_output=True).stdout
    return json.loads(out)


def first_difference(one, other):
    """Where two lists part."""
    return next((at for at, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


def long_texts(characters, data):
    """Every character of the first four planes, beside letters, digits and spaces; and what real files begin with."""
    codes = [c for c in range(1, 0x40000 if characters else 1) if not 0xD800 <= c < 0xE000]
    step = 1 << 15
    texts = ["".join(f"a{chr(c)}b {chr(c)}1{chr(c)}" for c in codes[at:at + step]) for at in range(0, len(codes), step)]
    for path in sorted(data.glob("*.json*")) if data else []:
        texts.append(path.read_text(encoding="utf-8")[:300_000])
    return texts


def compare(arguments, model):
    """Prints how many texts agree; returns how many differ, and llama.cpp's tokens of the short texts."""
    texts, differ, golden = TEXTS + long_texts(arguments.characters, arguments.data), 0, []
    tokens = characters = 0
    for plain in (False, True):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            theirs = list(pool.map(lambda text: llama_cpp(arguments.llama_tokenize, model, text, plain), texts))
        golden.append(theirs[:len(TEXTS)])
        for text, one, other in zip(texts, ours(arguments.tokenize, model, texts, plain), theirs):
            tokens, characters = tokens + len(other), characters + len(text)
            if one != other:
                differ += 1
                at = first_difference(one, other)
                print(f"  DIFFERS{' (plain)' if plain else ''}: {text[:60]!r} at token {at}: ours {one[at:at + 6]}, theirs {other[at:at + 6]}")
    print(f"{pathlib.Path(model).name}: {2 * len(texts) - differ} of {2 * len(texts)} texts agree, {characters} characters, {tokens} tokens")
    return differ, golden


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenize")
    parser.add_argument("llama_tokenize")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--golden", type=pathlib.Path)
    parser.add_argument("--characters", action="store_true", help="compare on every character too")
    parser.add_argument("--data", type=pathlib.Path, help="folder of JSON files to compare on too")
    arguments = parser.parse_args()
    results = [compare(arguments, model) for model in arguments.models]
    if arguments.golden:
        ids, plain_ids = results[0][1]
        content = {"texts": TEXTS, "ids": ids, "plain_ids": plain_ids}
        arguments.golden.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return 1 if any(differ for differ, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
