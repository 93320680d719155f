"""Load figures of a server: prints one line each, with the bound that it must keep.

    bench_server.py LORAD WORK_DIR [BASE_GGUF]

The queue, the streams and the requests are measured with a stand-in for the worker that this program plays itself, over the
workers' own protocol; the idle gap with real workers, and only where there is a base model.
"""

import asyncio
import atexit
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import uuid

QUEUE = 10_000
WATCHERS = 500
EVENTS = 200
GAP_JOBS = 6
VERSION = re.search(r'VERSION: &str = "(\w+)"', (pathlib.Path(__file__).parents[2] / "src/types/worker_protocol.rs").read_text())[1]
ROW = json.dumps({"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is said."}]})


def percentiles(seconds):
    """Median, 99th percentile and maximum in milliseconds, as text and the second of them as a number."""
    seconds = sorted(seconds)
    at = lambda share: seconds[min(len(seconds) - 1, int(share * len(seconds)))] * 1000
    return f"p50 {at(0.5):.2f} ms, p99 {at(0.99):.2f} ms, max {seconds[-1] * 1000:.2f} ms", at(0.99)


def report(what, figure, bound=None, holds=True):
    load = os.getloadavg()[0]
    verdict = "" if bound is None else f" (must be < {bound}: {'holds' if holds else 'DOES NOT HOLD'})"
    print(f"{what}: {figure}{verdict}; load {load:.1f}", flush=True)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("worker")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


class Server:
    """`lorad serve` in a folder of its own."""

    def __init__(self, lorad, folder, environment):
        self.lorad, self.folder, self.environment = lorad, folder, environment
        self.data = folder / "data"
        (folder / "models").mkdir(parents=True)
        self.start()

    def start(self):
        keep = {name: value for name, value in os.environ.items() if not name.startswith("LORAD__")}
        log = self.folder / "server.log"
        before = log.stat().st_size if log.exists() else 0
        command = [self.lorad, "serve", "--data-dir", self.data, "--models-dir", self.folder / "models", "--listen", "127.0.0.1:0"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, env=keep | self.environment, cwd=self.folder, stdout=output, stderr=output)
        atexit.register(self.end)
        while not (found := re.search(r"listening on http://127\.0\.0\.1:(\d+)/", log.read_text()[before:])):
            if self.process.poll() is not None:
                sys.exit(f"the server does not start:\n{log.read_text()}")
            time.sleep(0.02)
        self.port = int(found[1])
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port)

    def end(self):
        """Lets it end, and its workers with it, if it has not already."""
        self.process.terminate()
        return self.process.wait(60)

    def stop(self):
        if self.end():
            sys.exit(f"the server ended with status {self.process.returncode}")

    def call(self, method, path, body=None, kind="application/json", connection=None, headers=()):
        connection = connection or self.connection
        data = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, path, data, {"content-type": kind, **dict(headers)})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"{method} {path}: {answer.status} {text.decode()}")
        return json.loads(text)

    def upload(self):
        boundary = uuid.uuid4().hex
        part = lambda head, content: f"--{boundary}\r\ncontent-disposition: form-data; {head}\r\n\r\n{content}\r\n"
        body = part('name="purpose"', "fine-tune") + part('name="file"; filename="rows.jsonl"', f"{ROW}\n" * 20) + f"--{boundary}--\r\n"
        return self.call("POST", "/v1/files", body, f"multipart/form-data; boundary={boundary}")["id"]

    def rss(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def query(self, sql, *values):
        with sqlite3.connect(self.data / "lorad.db") as database:
            return database.execute(sql, values).fetchall()


def timed(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def wait_for(what, ask, seconds=60):
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            sys.exit(f"waited too long for {what}")
        time.sleep(0.0005)
    return answer


def fill_queue(server):
    job = {"model": "local:tiny.gguf", "training_file": server.upload()}
    create = lambda: server.call("POST", "/v1/fine_tuning/jobs", job)
    times = [timed(create) for _ in range(QUEUE)]
    report(f"adding {QUEUE} jobs to an empty server, one after another", f"{QUEUE / sum(times):.0f} jobs/s, {percentiles(times)[0]}")
    # As if every data set had been read: what waits then waits for the device.
    server.stop()
    server.query("update job set status = 'queued', validated_at_ms = created_at_ms where status = 'validating_files'")
    server.start()
    count = server.query("select count(*) from job where status = 'queued'")[0][0]
    times = [timed(create) for _ in range(1000)]
    text, p99 = percentiles(times)
    report(f"adding a job to a queue of {count}", text, "10 ms", p99 < 10)
    for what, path in [("first page of the list", "?limit=20"), ("page of 100", "?limit=100"), ("jobs with a label that none has", "?metadata[a]=b")]:
        times = [timed(lambda: server.call("GET", f"/v1/fine_tuning/jobs{path}")) for _ in range(100)]
        report(f"{what}, with {count} queued", percentiles(times)[0])


def claim(server):
    """From the cancellation of the job that trains to the claim of the next: the old process ends in between."""
    times = []
    running = lambda: server.query("select job_id, id from attempt where task = 'train' and state <> 'ended' and pid is not null")
    for _ in range(20):
        job, attempt = wait_for("an attempt", running)[0]
        begin = time.perf_counter()
        server.call("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
        wait_for("the next attempt", lambda: [row for row in running() if row[1] != attempt])
        times.append(time.perf_counter() - begin)
    report(f"from cancelling the running job to the next one's process, with {QUEUE} queued", percentiles(times)[0])


class Attempt:
    """Plays the worker of the attempt that trains."""

    def __init__(self, server, tokens):
        self.server = server
        self.connection = UnixConnection(server.data / "worker.sock")
        self.job = wait_for("the token of the running attempt", lambda: self.find(tokens))

    def find(self, tokens):
        """The job of the first token, newest first, whose attempt trains and has not ended."""
        for path in sorted(tokens.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)[:10]:
            self.headers = {"authorization": f"Bearer {path.read_text()}", "lorad-worker-protocol": VERSION}
            self.connection.request("GET", "/internal/v1/worker/task", headers=self.headers)
            answer = self.connection.getresponse()
            text = answer.read()
            if answer.status == 200 and (task := json.loads(text))["kind"] == "train":
                return task["job_id"]
        return None

    def step(self, step):
        metric = {"step": step, "total_steps": 100_000, "epoch": step / 10, "train_loss": 2.0, "train_mean_token_accuracy": 0.5,
                  "learning_rate": 2e-4, "grad_norm": 1.0, "trained_tokens": step * 10, "step_ms": 5}
        self.server.call("POST", "/internal/v1/worker/events", {"events": [], "metrics": [metric]}, connection=self.connection,
                         headers=self.headers.items())


async def watch(port, job, arrived, ready):
    """Follows a job's events on a socket and notes when the event of each step came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/fine_tuning/jobs/{job}/events?stream=true HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n".encode())
    ready.release()
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"step":' in line:
            arrived.setdefault(json.loads(line[6:])["data"]["step"], []).append(time.perf_counter())


async def streams(server, attempt):
    first = 1
    for watchers in (1, WATCHERS):
        arrived, ready = {}, asyncio.Semaphore(0)
        before = server.rss()
        tasks = [asyncio.create_task(watch(server.port, attempt.job, arrived, ready)) for _ in range(watchers)]
        for _ in tasks:
            await ready.acquire()
        await asyncio.sleep(2)
        sent = {}
        for step in range(first, first + EVENTS):
            sent[step] = time.perf_counter()
            await asyncio.to_thread(attempt.step, step)
            await asyncio.sleep(0.05 if watchers == 1 else 0.25)
        await asyncio.sleep(2)
        counts = {len(arrived.get(step, ())) for step in sent}
        if counts != {watchers}:
            sys.exit(f"{watchers} watchers, but an event came {counts} times")
        text, p99 = percentiles([time - sent[step] for step in sent for time in arrived[step]])
        bound = ("100 ms", p99 < 100) if watchers == 1 else ()
        report(f"from the worker's event sent to its arrival, {watchers} watcher(s)", text, *bound)
        if watchers > 1:
            grown = server.rss() - before
            report(f"growth of resident memory with {watchers} watchers of one job", f"{grown / 1e6:.1f} MB", "100 MB", grown < 100e6)
        for task in tasks:
            task.cancel()
        first += EVENTS


async def requests(port, path, connections=16, seconds=5):
    async def client(end):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request, count = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode(), 0
        while time.monotonic() < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                sys.exit(head.decode())
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            count += 1
        return count
    end = time.monotonic() + seconds
    return sum(await asyncio.gather(*(client(end) for _ in range(connections)))) / seconds


def with_stand_in(lorad, work):
    tokens = work / "tokens"
    tokens.mkdir()
    worker = work / "worker"
    worker.write_text(f"#!/bin/sh\nIFS= read -r token\nprintf %s \"$token\" >'{work}/'$$\nmv '{work}/'$$ '{tokens}/'\nexec sleep 100000\n")
    worker.chmod(0o700)
    server = Server(lorad, work / "queue", {
        "LORAD__WORKERS__EXECUTABLE": str(worker), "LORAD__WORKERS__LEASE_SECONDS": "3600",
        "LORAD__WORKERS__STALL_SECONDS": "604800", "LORAD__WORKERS__PAUSE_SECONDS": "1", "RUST_LOG": "warn,lorad::cli=info",
    })
    (server.folder / "models/tiny.gguf").write_text("the server never looks inside")
    fill_queue(server)
    claim(server)
    attempt = Attempt(server, tokens)
    rate = asyncio.run(requests(server.port, f"/v1/fine_tuning/jobs/{attempt.job}"))
    report("GET of a job, 16 connections, the client on the same processors", f"{rate:.0f} requests/s")
    asyncio.run(streams(server, attempt))
    server.stop()


def idle_gap(lorad, work, base):
    server = Server(lorad, work / "gap", {"HF_HUB_OFFLINE": "1"})
    shutil.copy(base, server.folder / "models/base.gguf")
    job = {"model": "local:base.gguf", "training_file": server.upload(), "training": {"max_steps": 1},
           "artifacts": [{"type": "adapter"}]}
    ids = [server.call("POST", "/v1/fine_tuning/jobs", job)["id"] for _ in range(GAP_JOBS)]
    done = lambda: all(server.call("GET", f"/v1/fine_tuning/jobs/{id}")["status"] == "succeeded" for id in ids)
    wait_for("the jobs", lambda: time.sleep(0.2) or done(), 600)
    ends = server.query("select job_id, id, created_at_ms, ended_at_ms from attempt where task = 'train' order by created_at_ms")
    parse = lambda text: time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone + float("0" + text[19:].rstrip("Z"))
    claimed, working, training = [], [], []
    for (_, _, _, ended), (_, attempt, created, _) in zip(ends, ends[1:]):
        log = re.sub(r"\x1b\[[0-9;]*m", "", (server.data / "logs" / f"{attempt}.log").read_text())
        at = lambda words: next(parse(line.split()[0]) for line in log.splitlines() if words in line)
        claimed.append((created - ended) / 1000)
        working.append(at("attempt started") - ended / 1000)
        training.append(at("training total_steps") - ended / 1000)
    report(f"device idle between {GAP_JOBS} jobs, from one's end to the next one's claim", percentiles(claimed)[0])
    text, p99 = percentiles(working)
    report("device idle, to the next worker's start of work", text, "2 s", p99 < 2000)
    report("device idle, to the next one's first step (model loaded, data read)", percentiles(training)[0])
    server.stop()


def main():
    lorad, work = sys.argv[1], pathlib.Path(sys.argv[2])
    with_stand_in(lorad, work)
    if len(sys.argv) > 3:
        idle_gap(lorad, work, sys.argv[3])
    else:
        print("SKIPPED: the idle gap, for want of a base model")


if __name__ == "__main__":
    main()
