"""Writes rows in Alpaca's format to standard output: alpaca_rows.py COUNT [ALPACA.json]

With a file its rows are repeated, each with a number of its own; without, words are made of syllables drawn from a seed, and the
texts are about as long as those of Stanford's Alpaca.
"""

import json
import random
import sys

SYLLABLES = "a be con de ex for ge hy in ja ka lo ment na or pre qui re sion ter un ver with you zen".split()


def text(draw, words):
    """That many words, in sentences."""
    made = []
    for at in range(words):
        word = "".join(draw.choices(SYLLABLES, k=draw.randint(1, 3)))
        made.append(word.capitalize() if at % 12 == 0 else word + (". " if at % 12 == 11 else ""))
    return " ".join(made) + "."


def made_rows(count):
    """Rows of drawn words."""
    draw = random.Random(3407)
    for _ in range(count):
        given = text(draw, draw.randint(5, 40)) if draw.random() < 0.4 else ""
        yield {"instruction": text(draw, draw.randint(6, 16)), "input": given, "output": text(draw, draw.randint(5, 90))}


def varied_rows(count, path):
    """A file's rows again and again, no two alike."""
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    for at in range(count):
        row = rows[at % len(rows)]
        yield {**row, "instruction": f"{row['instruction']} ({at})"}


def main():
    count, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    for row in varied_rows(count, path) if path else made_rows(count):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
