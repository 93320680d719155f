"""What the interop scripts share: a check that ends the run, and lorad's own logits."""

import json
import subprocess
import sys

import torch


def check(fine, what):
    """Prints what held, or ends with what did not."""
    print(f"  {'ok  ' if fine else 'FAIL'}  {what}", flush=True)
    if not fine:
        sys.exit(1)


def logits_of_lorad(lorad, base, tokens, adapter=None):
    """What `lorad logits` prints, as a tensor (tokens, vocabulary)."""
    command = [str(lorad), "logits", "--base", str(base), "--tokens", ",".join(map(str, tokens))]
    command += ["--adapter", str(adapter)] if adapter else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return torch.tensor([json.loads(line) for line in output.splitlines()])
