"""Runs OpenAI's own client against a lorad server, then loads the adapter with stock PEFT and compares logits.

    interop.py URL LORAD BASE.gguf DATA.jsonl WORK_DIR

Everything is asserted; the last line says what was proven, and with which versions.
"""

import pathlib
import sys
import tarfile
import time
from hashlib import md5

import openai
import peft
import torch
from openai.types.fine_tuning import FineTuningJobEvent

from gguf_llama import load_model
from interop_check import check, logits_of_lorad

HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"


def refused(kind, call):
    """The error of a call that must fail with that class of the client."""
    try:
        call()
    except kind as error:
        return error
    sys.exit(f"{kind.__name__} expected, but the call went through")


def upload(client, path):
    """Uploads the data set and reads it back in every way there is."""
    file = client.files.create(file=open(path, "rb"), purpose="fine-tune")
    client.files.wait_for_processing(file.id)
    check(client.files.retrieve(file.id).bytes == path.stat().st_size, "files.create, wait_for_processing, retrieve")
    check(client.files.content(file.id).read() == path.read_bytes(), "files.content")
    check(file.id in [item.id for item in client.files.list(purpose="fine-tune")], "files.list")
    return file


def bad_requests(client, file):
    """Errors arrive as the client's own classes, with the field named."""
    jobs = client.fine_tuning.jobs
    refused(openai.NotFoundError, lambda: jobs.create(model="no-such-model", training_file=file.id))
    model = "smollm2-135m-instruct"
    error = refused(
        openai.BadRequestError,
        lambda: jobs.create(model=model, training_file=file.id, extra_body={"lora": {"rank": 8}}),
    )
    check("rank" in str(error), f"a typo is a 400 that names it: {error.param}")
    error = refused(openai.NotFoundError, lambda: jobs.retrieve("ftjob-00000000-0000-7000-8000-000000000000"))
    check(error.type == "invalid_request_error", "a missing job is a NotFoundError")


def follow(client, job):
    """The live events, by the client's own stream decoder."""
    stream = client.get(
        f"/fine_tuning/jobs/{job.id}/events",
        cast_to=FineTuningJobEvent,
        options={"params": {"stream": "true"}},
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
    )
    return list(stream)


def read_events(client, job):
    """Every event, in order, from the stream and from the pages; both must tell the same story."""
    streamed = [event.id for event in follow(client, job)]
    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    check([event.id for event in reversed(listed)] == streamed, f"{len(streamed)} events, streamed as listed")
    messages = [event.message for event in reversed(listed)]
    for text in ("Created fine-tuning job: ", "Validating training file: ", "Files validated, moving job to queued state",
                 "Fine-tuning job started", "New fine-tuned model created: ", "The job has successfully completed"):
        check(sum(message.startswith(text) for message in messages) == 1, f"event `{text.strip()}`, once")
    check(any(event.type == "metrics" and event.data["train_loss"] > 0 for event in listed), "metrics events")


def run_job(client, file):
    """A job from create to succeeded, with everything that hangs on it."""
    job = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=file.id,
        suffix="interop",
        seed=7,
        metadata={"made-by": "interop"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"lora": {"r": 8}, "training": {"learning_rate": 1e-3}, "artifacts": [{"type": "adapter"}]},
    )
    check(job.status in ("validating_files", "queued"), f"fine_tuning.jobs.create: {job.id}")
    read_events(client, job)
    job = client.fine_tuning.jobs.retrieve(job.id)
    check(job.status == "succeeded" and job.trained_tokens > 0, f"jobs.retrieve: {job.fine_tuned_model}")
    check(job.metadata == {"made-by": "interop"} and job.seed == 7, "metadata and seed are echoed")
    check(job.id in [item.id for item in client.fine_tuning.jobs.list()], "jobs.list")
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    check(len(checkpoints) >= 1 and ":ckpt-step-" in checkpoints[0].fine_tuned_model_checkpoint, "checkpoints.list")
    table = client.files.content(job.result_files[0]).text
    check(table.splitlines()[0] == HEADER, "result file")
    check(client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model, "models.retrieve")
    check(job.fine_tuned_model in [model.id for model in client.models.list()], "models.list")
    refused(openai.BadRequestError, lambda: client.fine_tuning.jobs.cancel(job.id))
    check(True, "cancel of a finished job is a BadRequestError")
    return job


def cancel_job(client, file):
    """A second job that is cancelled under way."""
    job = client.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id)
    check(client.fine_tuning.jobs.cancel(job.id).status == "cancelled", "jobs.cancel")


def pause_and_resume(client, file):
    """A job that is put aside and taken up again."""
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="smollm2-135m-instruct", training_file=file.id, extra_body={"priority": 1})
    check(jobs.pause(job.id).status == "paused", "jobs.pause")
    check(jobs.resume(job.id).status in ("validating_files", "queued"), "jobs.resume")
    jobs.cancel(job.id)


def upload_in_parts(client, path):
    """The data set in parts, by the client's own helper."""
    size = path.stat().st_size
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=size // 3, md5=md5(path.read_bytes()).hexdigest()
    )
    check(done.status == "completed" and done.file.bytes == size, "uploads.upload_file_chunked")
    check(client.files.content(done.file.id).read() == path.read_bytes(), "the parts are the file")
    client.files.delete(done.file.id)
    pending = client.uploads.create(bytes=1, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    check(client.uploads.cancel(pending.id).status == "cancelled", "uploads.create, uploads.cancel")


def download_adapter(client, job, work):
    """The adapter's folder, through the client's own transport."""
    artifacts = client.get(f"/fine_tuning/jobs/{job.id}/artifacts", cast_to=object)["data"]
    artifact = next(item for item in artifacts if item["type"] == "adapter")
    content = client.get(f"/artifacts/{artifact['id']}/content", cast_to=openai.HttpxBinaryResponseContent)
    archive = work / artifact["filename"]
    archive.write_bytes(content.read())
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    check(True, f"artifact {artifact['filename']}, {archive.stat().st_size} bytes")
    return next(work.rglob("adapter_config.json")).parent


def compare_logits(lorad, base, adapter):
    """Base and tuned logits over 64 tokens, stock PEFT against lorad."""
    tokens = [(7919 * place + 13) % 49000 for place in range(64)]
    model = load_model(base)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([tokens])).logits[0]
        tuned = peft.PeftModel.from_pretrained(model, adapter)(input_ids=torch.tensor([tokens])).logits[0]
    moved = (tuned - plain).abs().max().item()
    check(moved > 0.1, f"the adapter moves the logits by up to {moved:.2f}")
    for name, ours, theirs in (
        ("base", logits_of_lorad(lorad, base, tokens), plain),
        ("tuned", logits_of_lorad(lorad, base, tokens, adapter), tuned),
    ):
        apart = (ours - theirs).abs().max().item()
        check(apart < 1e-3, f"{name} logits of 64 tokens, lorad and PEFT at most {apart:.1e} apart")


def main():
    url, lorad, base, data, work = sys.argv[1:]
    data, work = pathlib.Path(data), pathlib.Path(work)
    started = time.monotonic()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    file = upload(client, data)
    bad_requests(client, file)
    job = run_job(client, file)
    cancel_job(client, file)
    pause_and_resume(client, file)
    upload_in_parts(client, data)
    adapter = download_adapter(client, job, work)
    compare_logits(lorad, base, adapter)
    unused = client.files.create(file=data.open("rb"), purpose="fine-tune")
    check(client.files.delete(unused.id).deleted, "files.delete")
    print(f"openai {openai.__version__}, peft {peft.__version__}, torch {torch.__version__}: all of it held, "
          f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
