"""Compares loss curves: REFERENCE.csv, then pairs of OTHER.csv and how far each of its losses may be from the reference's, as a share."""

import csv
import sys


def losses(path):
    with open(path, newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


reference = losses(sys.argv[1])
failed = False
for path, most in zip(sys.argv[2::2], map(float, sys.argv[3::2])):
    other = losses(path)
    if len(other) != len(reference) or not reference:
        sys.exit(f"{path} has {len(other)} steps, {sys.argv[1]} has {len(reference)}")
    gaps = [abs(a - b) / abs(b) for a, b in zip(other, reference)]
    print(f"  {path}: {len(gaps)} steps, first {other[0]:.4f}, last {other[-1]:.4f} (reference {reference[-1]:.4f}), most apart {max(gaps):.2e}, mean {sum(gaps) / len(gaps):.2e}")
    failed |= max(gaps) > most
sys.exit("a curve is too far from the reference" if failed else 0)
