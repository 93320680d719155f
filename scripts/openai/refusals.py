"""Section 1.0 of OpenAI's contract: errors. Each is the client's own class, after one request, and names field and value."""

import openai

from jobs import SHORT, change, create
from wire import Wire, post


def bad_jobs(run):
    """Fields that cannot be: a 400 that names field and value."""
    wire = run.wire
    bad = lambda fields, param, *names: wire.refused(
        openai.BadRequestError, 400, create(run, run.training, fields), param=param, names=names or [param]
    )
    bad({"lora": {"rank": 8}}, "lora.rank")
    bad({"lora": {"r": 0}}, "lora.r", "lora.r", "0")
    bad({"lora": {"r": "eight"}}, "lora.r", "lora.r", "eight")
    bad({"lora": {"target_modules": ["q_prj"]}}, "lora.target_modules", "q_prj")
    bad({"training": {"learning_rate": 3}}, "training.learning_rate", "3")
    bad({"training": {"lr_scheduler": "steep"}}, "training.lr_scheduler", "steep")
    bad({"training": {"eval_steps": 1}}, "training.eval_steps", "validation_file")
    bad({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "0")
    bad({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "many")
    bad({"hyperparameters": {"beta": 1}}, "hyperparameters.beta")
    bad({"method": {"type": "dpo", "dpo": {}}}, "method.type", "dpo")
    bad({"suffix": "s" * 65}, "suffix", "s" * 65)
    bad({"suffix": "a/b"}, "suffix", "a/b")
    bad({"seed": -1}, "seed", "-1")
    bad({"metadata": {"k" * 65: "v"}}, "metadata", "k" * 65)
    bad({"metadata": {"k": "v" * 513}}, "metadata.k", "513")
    bad({"metadata": {str(number): "v" for number in range(17)}}, "metadata", "17")
    bad({"metadata": {"k": 3}}, "metadata.k", "3")
    bad({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb")
    bad({"priority": 1001}, "priority", "1001")
    bad({"artifacts": [{"type": "gguf", "quantization": "q4_k_x"}]}, "artifacts[0].quantization", "q4_k_x")
    bad({"artifacts": []}, "artifacts", "[]")
    bad({"validation_file": "file-x"}, "validation_file", "file-x")
    bad({"colour": "red"}, "colour")
    gone = "file-" + "0" * 32
    jobs = wire.client.fine_tuning.jobs
    for file in ("file-x", gone):
        call = lambda: jobs.create(model=run.model, training_file=file)
        wire.refused(openai.BadRequestError, 400, call, param="training_file", names=[file])
    for model in ("gpt-4o-mini", "local:../secret.gguf", "local:/etc/passwd"):
        call = lambda: jobs.create(model=model, training_file=run.training)
        wire.refused(openai.NotFoundError, 404, call, param="model", code="model_not_found", names=[model])
    call = lambda: post(wire.client, "/fine_tuning/jobs", object, training_file=run.training)
    wire.refused(openai.BadRequestError, 400, call, param="model", names=["model"])
    key = {"extra_headers": {"Idempotency-Key": "k" * 256}}
    call = create(run, run.training, options=key)
    wire.refused(openai.BadRequestError, 400, call, param="Idempotency-Key", names=["k" * 256])
    for param, value in (("limit", 0), ("limit", 1001), ("after", "ftjob-x"), ("metadata", "x"), ("colour", "red")):
        names = [param if param == "colour" else str(value)]
        call = lambda: jobs.list(extra_query={param: value})
        wire.refused(openai.BadRequestError, 400, call, param=param, names=names)


def ended_jobs(run):
    """What cannot be done to a job that has ended: a 400, for a 409 the client would send again."""
    wire = run.wire
    for what in ("cancel", "pause", "resume"):
        call = lambda: change(run, run.job, what)
        names = [run.job, "succeeded"]
        wire.refused(openai.BadRequestError, 400, call, param="fine_tune_id", code="job_has_ended", names=names)


def missing(run):
    """Ids that nobody has: a 404 in OpenAI's words."""
    wire, jobs = run.wire, run.wire.client.fine_tuning.jobs
    for id in ("ftjob-x", "ftjob-" + "0" * 32, "ftjob-a:b%2Fc"):
        shown = id.replace("%2F", "/")
        sent = id if run.is_old else shown
        calls = [jobs.retrieve, jobs.list_events, jobs.checkpoints.list, lambda job: change(run, job, "cancel")]
        if "/" not in shown:
            calls += [lambda job: change(run, job, "pause"), lambda job: change(run, job, "resume")]
        for call in calls:
            error = wire.refused(
                openai.NotFoundError, 404, lambda: call(sent), param="fine_tune_id", code="fine_tune_not_found", names=[shown]
            )
            run.tally.check(error.body["message"] == f"Could not find fine tune: {shown}", f"OpenAI's words: {error}")
    for call in (jobs.list_events, jobs.checkpoints.list):
        wire.refused(openai.BadRequestError, 400, lambda: call(run.job, limit=0), param="limit", names=["0"])
        wire.refused(openai.BadRequestError, 400, lambda: call(run.job, after="x"), param="after", names=["x"])


def files_in_use(run):
    """A file that an unfinished job needs cannot be deleted."""
    wire, files = run.wire, run.wire.client.files
    job = wire.ask("Job", create(run, run.training, {"priority": -1}))
    wire.refused(
        openai.BadRequestError, 400, lambda: files.delete(run.training), param="id", code="file_in_use", names=[run.training, job.id]
    )
    wire.ask("Job", lambda: change(run, job.id, "cancel"))
    paper = wire.ask("File", lambda: files.create(file=("a", b"x"), purpose="batch"))
    wire.refused(openai.BadRequestError, 400, create(run, paper.id), param="training_file", names=["fine-tune", "batch"])
    wire.ask("FileDeleted", lambda: files.delete(paper.id))


def callers(run):
    """Keys, pages of other sites, routes and methods that are not there, bodies that are too long."""
    def other(key=run.key, **options):
        return Wire(run.url, key, run.wire.schemas, run.tally, **options)

    for key in ("sk-another", run.key + "x", run.key[:-1]):
        wire = other(key)
        cancel = lambda: wire.client.fine_tuning.jobs.cancel(run.job)
        for call in (wire.client.models.list, wire.client.files.list, cancel):
            error = wire.refused(openai.AuthenticationError, 401, call, code="invalid_api_key")
            run.tally.check(key not in error.message, "a key is not repeated")
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        wire = other(default_headers=headers)
        wire.refused(openai.PermissionDeniedError, 403, wire.client.models.list, names=["other"])
    wire, client = run.wire, run.wire.client
    wire.refused(openai.NotFoundError, 404, lambda: client.get("/nowhere", cast_to=object), names=["/v1/nowhere"])
    call = lambda: client.delete("/models", cast_to=object)
    wire.refused(openai.APIStatusError, 405, call, names=["/v1/models", "DELETE"])
    long = {"metadata": {"k": "v" * (1 << 20)}}
    wire.refused(openai.APIStatusError, 413, create(run, run.training, long), names=[str(1 << 20)])
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    call = lambda: client.fine_tuning.jobs.create(model="m", training_file="f", extra_headers=form, extra_body=SHORT)
    wire.refused(openai.APIStatusError, 415, call, names=["application/json", "urlencoded"])
