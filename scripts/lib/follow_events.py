"""Reads a job's event stream on stdin, shows it with a progress bar, and exits 0 only if the job succeeded.

    curl -sN ".../v1/fine_tuning/jobs/ID/events?stream=true" | python3 follow_events.py

Needs nothing but Python's standard library.
"""

import json
import sys
import time

SUCCESS = "The job has successfully completed"
BARS = "▁▂▃▄▅▆▇█"


def sparkline(losses, width=49):
    """The losses as a row of bars, each the mean of the steps it stands for."""
    groups = [losses[at * len(losses) // width : (at + 1) * len(losses) // width] for at in range(width)]
    means = [sum(group) / len(group) for group in groups if group]
    top = max(means) or 1.0
    return "".join(BARS[min(7, int(mean / top * 7.999))] for mean in means)


class Progress:
    """One line that is drawn over and over on a terminal, and a line every few steps elsewhere."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.open = False
        self.started = None

    def step(self, step, total, loss):
        now = time.monotonic()
        self.started = self.started or (step, now)
        if not self.terminal and step % 10 and step != total:
            return
        first, since = self.started
        left = f"{(now - since) / (step - first) * (total - step):4.0f} s left" if step > first else ""
        filled = 30 * step // total
        line = f"  [{'#' * filled}{'.' * (30 - filled)}] step {step}/{total}  loss {loss:.3f}  {left}"
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)
        self.open = self.terminal

    def line(self, text):
        print(f"{chr(10) if self.open else ''}  {text}", flush=True)
        self.open = False


def events(lines):
    """The JSON of each event until the stream says that it is done."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        yield json.loads(data)


def main():
    progress, losses, succeeded = Progress(), {}, False
    for event in events(sys.stdin):
        if "error" in event:
            progress.line(f"error: {event['error']['message']}")
            break
        if event.get("type") == "metrics":
            data = event["data"]
            losses[data["step"]] = data["train_loss"]
            progress.step(data["step"], data["total_steps"], data["train_loss"])
        else:
            progress.line(event["message"])
            succeeded = succeeded or event["message"] == SUCCESS
    curve = [losses[step] for step in sorted(losses)]
    if curve:
        progress.line(f"loss {curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}")
    if not succeeded:
        sys.exit("the job did not succeed")
    if curve[-1] >= curve[0]:
        sys.exit(f"the loss did not fall: {curve[0]} to {curve[-1]}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
