"""Section 1.3 of OpenAI's contract: fine-tuning jobs, from create to the result."""

import openai
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from files import create as upload
from wire import post

HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
# What a paused and resumed job tells, and how often.
STORY = {
    "Created fine-tuning job: {job}": 1,
    "Validating training file: {training} and validation file: {validation}": 1,
    "Files validated, moving job to queued state": 1,
    "Fine-tuning job started": 2,
    "The job was paused": 1,
    "New fine-tuned model created: {model}": 1,
    "The job has successfully completed": 1,
}
SHORT = {"training": {"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 1}, "artifacts": [{"type": "adapter"}]}


def create(run, file, fields=None, options=None, **known):
    """A job. Versions before `method` and `metadata` send them through extra_body."""
    jobs = run.wire.client.fine_tuning.jobs
    fields = {**SHORT, **(fields or {})}
    if run.is_old:
        fields |= {name: known.pop(name) for name in ("method", "metadata") if name in known}
    call = lambda: jobs.create(model=run.model, training_file=file, extra_body=fields, **known, **(options or {}))
    return call


def change(run, job, what):
    """Pauses, resumes or cancels, by the client's method where it has one."""
    jobs = run.wire.client.fine_tuning.jobs
    method = getattr(jobs, what, None)
    return method(job) if method else post(run.wire.client, f"/fine_tuning/jobs/{job}/{what}", FineTuningJob)


def follow(run, job, after=None, **headers):
    """The live events, by the client's own stream decoder."""
    params = {"stream": "true", **({"after": after} if after else {})}
    return run.wire.client.get(
        f"/fine_tuning/jobs/{job}/events",
        cast_to=FineTuningJobEvent,
        options={"params": params, "headers": headers},
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
    )


def train(run):
    """A job with every field, paused after its first step, resumed, followed to its end."""
    wire, check = run.wire, run.tally.check
    run.training = upload(wire, run.rows).id
    run.validation = upload(wire, run.few_rows, "validation.jsonl").id
    hyperparameters = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    fields = {"lora": {"r": 8}, "training": {**SHORT["training"], "save_steps": 2, "eval_steps": 2}}
    known = {"suffix": "wire", "seed": 7, "metadata": {"run": run.label, "empty": ""}, "method": method}
    job = wire.ask("Job", create(run, run.training, fields, validation_file=run.validation, **known))
    run.job = job.id
    check(job.status in ("validating_files", "queued"), f"status of a new job: {job.status}")
    echoed = (job.seed, job.training_file, job.validation_file, job.model_extra["user_provided_suffix"])
    check(echoed == (7, run.training, run.validation, "wire"), f"what was asked for is echoed: {echoed}")
    check(job.model_extra["lora"]["r"] == 8 and job.model_extra["training"]["save_steps"] == 2, "lorad's fields are in model_extra")
    raw = wire.responses[0].json()
    check(raw["metadata"] == {"run": run.label, "empty": ""}, f"metadata: {raw['metadata']}")
    check(raw["integrations"] == [] and raw["error"] is None and raw["fine_tuned_model"] is None, "nothing is there yet")
    streamed = wire.ask(None, lambda: pause_and_resume(run, job.id), requests=3)
    for event in streamed:
        wire.check_shape(event.to_dict(mode="json"), "Event")
    check_end(run, streamed)


def pause_and_resume(run, job):
    """Every event of the stream, which stays open while the job is paused at its first step."""
    events = []
    with follow(run, job) as stream:
        for event in stream:
            events.append(event)
            if event.type == "metrics" and event.data["step"] == 1:
                paused = change(run, job, "pause")
                run.tally.check(paused.status == "paused", f"jobs.pause: {paused.status}")
                run.wire.check_shape(run.wire.responses[-1].json(), "Job")
                resumed = change(run, job, "resume")
                run.tally.check(resumed.status in ("queued", "running"), f"jobs.resume: {resumed.status}")
                run.wire.check_shape(run.wire.responses[-1].json(), "Job")
    return events


def check_end(run, streamed):
    """The finished job: its fields, its story, its checkpoints, its result file."""
    wire, check, client = run.wire, run.tally.check, run.wire.client
    jobs = client.fine_tuning.jobs
    job = wire.ask("Job", lambda: jobs.retrieve(run.job))
    check(job.status == "succeeded", f"the job is {job.status}: {job.error}")
    run.tuned = job.fine_tuned_model
    check(run.tuned.startswith(f"ft:{run.model}:") and ":wire:" in run.tuned, f"fine_tuned_model: {run.tuned}")
    check(job.trained_tokens > 0 and job.finished_at >= job.created_at, "trained_tokens, finished_at")
    hyperparameters = wire.responses[0].json()["hyperparameters"]
    check(all(isinstance(value, (int, float)) for value in hyperparameters.values()), f"numbers by now: {hyperparameters}")
    listed = wire.pages("Event list", lambda: jobs.list_events(job.id, limit=7), 7)
    check([event.id for event in reversed(listed)] == [event.id for event in streamed], "streamed as listed")
    messages = [event.message for event in streamed]
    names = {"job": job.id, "training": run.training, "validation": run.validation, "model": run.tuned}
    for text, times in STORY.items():
        check(messages.count(text.format(**names)) == times, f"`{text.format(**names)}` {times} times in {messages}")
    steps = [event.data for event in streamed if event.type == "metrics"]
    check([step["step"] for step in steps] == [1, 2, 3, 4], f"every step once: {steps}")
    check(all(step["total_steps"] == 4 and step["train_loss"] > 0 for step in steps), "figures of the steps")
    check(steps[1]["full_valid_loss"] > 0 and steps[3]["valid_loss"] > 0, "figures of the evaluations")
    words = [text for text in messages if text.startswith("Step 4/4: training loss=") and "full validation loss=" in text]
    check(len(words) == 1, "OpenAI's words of a step")
    checkpoints = wire.pages("Checkpoint list", lambda: jobs.checkpoints.list(job.id, limit=1), 1)
    check([checkpoint.step_number for checkpoint in checkpoints] == [4, 2], f"newest first: {checkpoints}")
    for checkpoint in checkpoints:
        name = f"{run.tuned}:ckpt-step-{checkpoint.step_number}"
        check(checkpoint.fine_tuned_model_checkpoint == name, f"checkpoint's name: {checkpoint}")
        check(checkpoint.metrics.step == checkpoint.step_number and checkpoint.metrics.train_loss > 0, "its figures")
        told = f"Checkpoint created at step {checkpoint.step_number} with Snapshot ID: {name}"
        check(messages.count(told) == 1, told)
    result = wire.ask("File", lambda: client.files.retrieve(job.result_files[0]))
    check(result.purpose == "fine-tune-results", "the result's purpose")
    table = wire.ask(None, lambda: client.files.content(result.id)).text.splitlines()
    check(table[0] == HEADER and len(table) == 5, f"the result file: {table}")


def streams(run):
    """Going on after an event: `after` and Last-Event-ID mean newer than, in the stream."""
    wire, check = run.wire, run.tally.check
    ids = [event.id for event in wire.ask(None, lambda: list(follow(run, run.job)))]
    check([event.id for event in wire.ask(None, lambda: list(follow(run, run.job, after=ids[3])))] == ids[4:], "stream, after")
    seen = wire.ask(None, lambda: list(follow(run, run.job, **{"Last-Event-ID": ids[3]})))
    check([event.id for event in seen] == ids[4:], "stream, Last-Event-ID")
    check(wire.requests[0].headers["accept"] == "application/json", "the client does not say that it streams")
    check(wire.responses[0].headers["content-type"] == "text/event-stream", "content type of a stream")
    seen = wire.ask(None, lambda: list(follow(run, run.job, Accept="text/event-stream")))
    check([event.id for event in seen] == ids, "a stream with id: lines ends well too")


def lists(run):
    """Pages and labels."""
    wire, check, jobs = run.wire, run.tally.check, run.wire.client.fine_tuning.jobs
    made = []
    for label in ({"run": run.label, "a:b/c d": f"é&={run.label}"}, {"run": run.label, "empty": ""}, None):
        job = wire.ask("Job", create(run, run.training, **({"metadata": label} if label else {})))
        check(wire.ask("Job", lambda: change(run, job.id, "cancel")).status == "cancelled", "jobs.cancel")
        check(wire.ask("Job", lambda: change(run, job.id, "cancel")).status == "cancelled", "jobs.cancel, once more")
        made.append(job.id)
    made.reverse()
    all_jobs = [job.id for job in wire.pages("Job list", lambda: jobs.list(limit=2), 2)]
    check(all_jobs[:4] == [*made, run.job], "newest first")
    check(wire.ask("Job list", lambda: jobs.list(after=made[0], limit=1)).data[0].id == made[1], "after")
    check(wire.ask("Job list", lambda: jobs.list(after=all_jobs[-1])).data == [], "past the end is nothing")

    def labelled(label):
        known = {"extra_query": {"metadata": label}} if run.is_old or label == "null" else {"metadata": label}
        return [job.id for job in wire.pages("Job list", lambda: jobs.list(limit=2, **known), 2)]

    check(labelled({"run": run.label}) == [made[1], made[2], run.job], "metadata[k]=v")
    check(b"metadata%5Brun%5D=" in wire.requests[0].url.raw_path, "brackets on the wire")
    if not run.is_old:
        # The old client leaves out what is empty.
        check(labelled({"run": run.label, "empty": ""}) == [made[1], run.job], "two labels, one of them empty")
    check(labelled({"a:b/c d": f"é&={run.label}"}) == [made[2]], "letters of every kind in a label")
    check(labelled({"a:b/c d": f"é&={run.label}", "run": "another"}) == [], "one of two labels is not enough")
    check(labelled({"run": "another"}) == [], "a label that no job has")
    check(made[0] in labelled("null") and made[1] not in labelled("null"), "metadata=null")


def failed(run):
    """A data set that cannot be trained on fails the job, with OpenAI's code."""
    wire, check, jobs = run.wire, run.tally.check, run.wire.client.fine_tuning.jobs
    file = upload(wire, b"".join(run.rows.splitlines(keepends=True)[:3]))
    job = wire.ask("Job", create(run, file.id))
    wire.ask(None, lambda: list(follow(run, job.id)))
    job = wire.ask("Job", lambda: jobs.retrieve(job.id))
    message = "Training file has 3 example(s), but must have at least 10 examples"
    told = (job.status, job.error.code, job.error.param, job.error.message)
    check(told == ("failed", "invalid_n_examples", "training_file", message), f"job.error: {told}")
    wire.ask("FileDeleted", lambda: wire.client.files.delete(file.id))


def repeats(run):
    """Idempotency-Key, and the client's own retry after an answer that was lost: one job each."""
    wire, check, jobs = run.wire, run.tally.check, run.wire.client.fine_tuning.jobs
    key = {"extra_headers": {"Idempotency-Key": f"key-{run.label}"}}
    first = wire.ask("Job", create(run, run.training, options=key, seed=11))
    again = wire.ask("Job", create(run, run.training, options=key, seed=11))
    check(first.id == again.id, "the same key and body, the same job")
    other = create(run, run.training, options=key, seed=12)
    names = [f"key-{run.label}", first.id]
    wire.refused(openai.BadRequestError, 400, other, param="Idempotency-Key", names=names)
    change(run, first.id, "cancel")
    before = len(list(jobs.list(limit=100)))
    lossy = run.lossy_wire()
    job = lossy.client.fine_tuning.jobs.create(model=run.model, training_file=run.training, seed=13, extra_body=SHORT)
    counts = [request.headers.get("x-stainless-retry-count") for request in lossy.requests]
    check(counts == ["0", "1"], f"the client sends it again: {counts}")
    change(run, job.id, "cancel")
    check(len(list(jobs.list(limit=100))) == before + 1, "a retry makes no second job")
