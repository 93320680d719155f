"""Follows a job by its event stream and prints when what happened, then the speed of its steps: time_job.py URL JOB. Called by check-8b.sh."""

import json
import statistics
import sys
import time
import urllib.request

from follow_events import SUCCESS, events


def get(url):
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def main():
    url, job = sys.argv[1:]
    base, started = f"{url}/v1/fine_tuning/jobs/{job}", time.monotonic()
    succeeded = False
    with urllib.request.urlopen(f"{base}/events?stream=true") as stream:
        for event in events(line.decode() for line in stream):
            if event.get("type") == "metrics" and event["data"]["step"] % 10 > 1:
                continue
            print(f"  {time.monotonic() - started:6.1f} s  {event['message']}", flush=True)
            succeeded = succeeded or event["message"] == SUCCESS
    if not succeeded:
        sys.exit("the job did not succeed")
    metrics = get(f"{base}/metrics?limit=1000")["data"]
    steps = sorted(row["step_ms"] for row in metrics)
    trained = max(row["trained_tokens"] for row in metrics)
    report = get(f"{url}/v1/files/{get(base)['training_file']}/report?model=local:8b.gguf")["training"]
    print(f"  {report['rows']} rows of at most {report['longest']} tokens, {report['tokens']} in all")
    print(f"  {len(steps)} steps, ms: {steps[0]} to {steps[-1]}, median {statistics.median(steps)}, together {sum(steps) / 1000:.1f} s")
    print(f"  {trained} trained tokens, {trained / sum(steps) * 1000:,.0f} a second")
    for artifact in get(f"{base}/artifacts")["data"]:
        parity = artifact["parity"]
        print(f"  {artifact['filename']}: {artifact['bytes']} bytes, its logits on average {parity['mean_logit_difference']:.2g} from the trained "
              f"model's, whose deviation is {parity['logit_deviation']:.2g}")


main()
