"""Trains through OpenAI's own client against a lorad server, then loads the adapter with stock PEFT and compares logits.

    interop.py URL LORAD BASE.gguf DATA.jsonl WORK_DIR

Everything is asserted; the last line says what was proven, and with which versions.
"""

import pathlib
import sys
import tarfile
import time

import openai
import peft
import torch

from gguf_llama import load_model
from interop_check import check, logits_of_lorad


def run_job(client, data):
    """A job that makes an adapter, from its file to its end."""
    file = client.files.create(file=data, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="smollm2-135m-instruct",
        training_file=file.id,
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"lora": {"r": 8}, "training": {"learning_rate": 1e-3}, "artifacts": [{"type": "adapter"}]},
    )
    while job.status in ("validating_files", "queued", "running"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    check(job.status == "succeeded", f"job {job.id} is {job.status}")
    return job


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
    job = run_job(client, data)
    adapter = download_adapter(client, job, work)
    compare_logits(lorad, base, adapter)
    print(f"openai {openai.__version__}, peft {peft.__version__}, torch {torch.__version__}: all of it held, "
          f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
