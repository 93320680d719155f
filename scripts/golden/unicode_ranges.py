#!/usr/bin/env python3
"""Writes engine/src/tokenizer/unicode.rs: the code points that are letters (L), numbers (N) and punctuation (P).

Needs: pip install unicodedata2==15.1.0 (the version of Unicode that llama.cpp's own tables have)
Run from the repository's root: python scripts/golden/unicode_ranges.py
"""

import pathlib

import unicodedata2

OUT = pathlib.Path("engine/src/tokenizer/unicode.rs")
HEAD = '''//! Which code points are letters, numbers and punctuation (general categories L, N and P), as ranges in order.
//!
//! Written by scripts/golden/unicode_ranges.py from version {version} of Unicode.

/// Code points from the first to the second of each pair.
pub(super) type Ranges = [(u32, u32)];
'''


def ranges(category):
    """The ranges of a general category, surrogates left out: no text has them."""
    found = []
    for code in (c for c in range(0x110000) if not 0xD800 <= c < 0xE000):
        if unicodedata2.category(chr(code))[0] == category:
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return found


def table(name, what, pairs):
    """The Rust source of one table, many pairs a line."""
    lines, line = [], "   "
    for first, last in pairs:
        pair = f" (0x{first:X}, 0x{last:X}),"
        if len(line) + len(pair) > 118:
            lines.append(line)
            line = "   "
        line += pair
    body = "\n".join([*lines, line])
    return f"\n/// {what}.\n#[rustfmt::skip]\npub(super) const {name}: &Ranges = &[\n{body}\n];\n"


def main():
    source = HEAD.format(version=unicodedata2.unidata_version)
    for name, category, what in [("LETTERS", "L", "Letters"), ("NUMBERS", "N", "Numbers"), ("PUNCTUATION", "P", "Punctuation")]:
        source += table(name, what, ranges(category))
    OUT.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
