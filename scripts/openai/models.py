"""Section 1.4 of OpenAI's contract, as far as the server has it: models."""

import openai

# A name with a slash, which a client sends as `%2F`, and raw where it is old.
NESTED = "local:folder/model.gguf"


def models(run):
    """List and retrieve: base models, the tuned one and its checkpoints."""
    wire, check, models = run.wire, run.tally.check, run.wire.client.models
    listed = list(wire.ask("Model list", models.list))
    names = [model.id for model in listed]
    check(run.model in names and NESTED in names and run.tuned in names, f"models.list: {names}")
    check(any(name.startswith(f"{run.tuned}:ckpt-step-") for name in names), "checkpoints are listed")
    for model in listed:
        # The old client sends a name as it stands, so that its caller must write %2F.
        name = model.id.replace("/", "%2F") if run.is_old else model.id
        check(wire.ask("Model", lambda: models.retrieve(name)) == model, f"models.retrieve {name}")
        path = wire.requests[0].url.raw_path.decode()
        check(path.removeprefix("/v1/models/") == model.id.replace("/", "%2F"), f"`:` raw and `/` as %2F: {path}")


def refusals(run):
    """A name that is no model's, and models that cannot be deleted."""
    wire, models = run.wire, run.wire.client.models
    missing = lambda name: name.replace("/", "%2F") if run.is_old else name
    for name in ("gpt-4o-mini", "ft:smollm2-135m-instruct:lorad:nobody:abcd1234", "hf:nobody/nothing/nowhere.gguf", "a b%"):
        call = lambda: models.retrieve(missing(name))
        wire.refused(openai.NotFoundError, 404, call, param="model", code="model_not_found", names=[name])
        wire.refused(
            openai.NotFoundError, 404, lambda: models.delete(missing(name)), param="model", code="model_not_found", names=[name]
        )
    wire.refused(openai.BadRequestError, 400, lambda: models.delete(run.model), param="model", names=[run.model])


def deletion(run):
    """A checkpoint's model and the tuned one go; their job stays."""
    wire, check, models = run.wire, run.tally.check, run.wire.client.models
    checkpoint = next(model.id for model in models.list() if model.id.startswith(f"{run.tuned}:ckpt-step-"))
    for name in (checkpoint, run.tuned):
        deleted = wire.ask("ModelDeleted", lambda: models.delete(name))
        check(deleted.id == name and deleted.deleted, f"models.delete {name}: {deleted}")
        wire.refused(openai.NotFoundError, 404, lambda: models.retrieve(name), param="model", code="model_not_found", names=[name])
