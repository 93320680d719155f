"""Runs every call of OpenAI's files, uploads, fine-tuning and models contract with the official client of this environment.

    main.py URL KEY MODEL DATA.jsonl SCHEMAS.json
"""

import hashlib
import json
import pathlib
import sys
import time

import openai

import files
import jobs
import models
import refusals
import uploads
from wire import Tally, Wire, httpx


class LosesTheFirstAnswer(httpx.HTTPTransport):
    """A connection on which the server gets the first request, and its answer never arrives."""

    lost = False

    def handle_request(self, request):
        response = super().handle_request(request)
        if self.lost:
            return response
        self.lost = True
        response.read()
        response.close()
        raise httpx.ReadTimeout("the answer is lost", request=request)


class Run:
    """What the groups of checks share; each adds the ids of what it made for the next ones."""

    def __init__(self, url, key, model, data, schemas):
        self.url, self.key, self.model, self.data = url, key, model, pathlib.Path(data)
        self.rows = self.data.read_bytes()
        self.few_rows = b"".join(self.rows.splitlines(keepends=True)[:10])
        self.is_old = openai.__version__.startswith("1.")
        self.label = f"{openai.__version__}-{time.time_ns()}"
        self.tally = Tally()
        self.wire = Wire(url, key, json.loads(pathlib.Path(schemas).read_text()), self.tally)

    def lossy_wire(self):
        """Another client, whose first answer is lost."""
        return Wire(self.url, self.key, self.wire.schemas, self.tally, transport=LosesTheFirstAnswer())

    @staticmethod
    def sha256(content):
        """Hash in hexadecimal digits."""
        return hashlib.sha256(content).hexdigest()


GROUPS = (
    ("files", files.files),
    ("pages of files", files.pages),
    ("files that are refused", files.refusals),
    ("uploads", uploads.uploads),
    ("uploads that are refused", uploads.refusals),
    ("a job, paused and resumed, to its result", jobs.train),
    ("streams that go on", jobs.streams),
    ("pages and labels of jobs", jobs.lists),
    ("a job that fails", jobs.failed),
    ("repeated requests", jobs.repeats),
    ("models", models.models),
    ("models that are refused", models.refusals),
    ("jobs that are refused", refusals.bad_jobs),
    ("jobs that have ended", refusals.ended_jobs),
    ("ids that nobody has", refusals.missing),
    ("files in use", refusals.files_in_use),
    ("callers that are refused", refusals.callers),
    ("models that are deleted", models.deletion),
)


def main():
    run = Run(*sys.argv[1:])
    started = time.monotonic()
    for name, group in GROUPS:
        with run.tally.group(name):
            group(run)
    seconds = time.monotonic() - started
    tally = run.tally
    print(f"openai {openai.__version__}: {tally.checks} checks in {len(GROUPS)} groups, {len(tally.failed)} of them failed; "
          f"{tally.refusals} calls were refused, each in one request; {seconds:.0f} s")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
