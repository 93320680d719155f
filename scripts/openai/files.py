"""Section 1.1 of OpenAI's contract: files."""

import openai

EXPIRES = {"anchor": "created_at", "seconds": 7200}


def create(wire, content, name="rows.jsonl", **options):
    """Uploads a training file."""
    files = wire.client.files
    return wire.ask("File", lambda: files.create(file=(name, content), purpose="fine-tune", **options))


def files(run):
    """Upload, retrieve, wait, content, list, delete."""
    wire, check, files = run.wire, run.tally.check, run.wire.client.files
    content = run.rows
    # Versions that do not know `expires_after` send it all the same when they are told to.
    expiring = {"extra_body": {"expires_after": EXPIRES}} if run.is_old else {"expires_after": EXPIRES}
    file = create(wire, content, "née 1.jsonl", **expiring)
    check(file.filename == "née 1.jsonl" and file.bytes == len(content), f"name and bytes of {file}")
    check(file.model_extra["sha256"] == run.sha256(content), "lorad's own field is in model_extra")
    raw = wire.responses[0].json()
    check(raw["expires_at"] - raw["created_at"] == 7200, f"expires_after holds: {raw}")
    check(wire.ask("File", lambda: files.retrieve(file.id)).id == file.id, "files.retrieve")
    check(wire.ask("File", lambda: files.wait_for_processing(file.id)).status == "processed", "wait_for_processing")
    check(wire.ask(None, lambda: files.content(file.id)).read() == content, "files.content")
    for purpose in ("assistants", "batch", "vision", "user_data", "evals"):
        other = wire.ask("File", lambda: files.create(file=("a.bin", b"\xff\x00"), purpose=purpose))
        check(other.purpose == purpose, f"purpose {purpose}")
        check(wire.ask(None, lambda: files.content(other.id)).read() == b"\xff\x00", "bytes that are no text")
        listed = [item.id for item in wire.pages("File list", lambda: files.list(purpose=purpose), 10000)]
        check(other.id in listed and file.id not in listed, "files.list by purpose")
        wire.ask("FileDeleted", lambda: files.delete(other.id))
    gone = wire.ask("FileDeleted", lambda: files.delete(file.id))
    check(gone.deleted and gone.id == file.id, "files.delete")
    message = f"No such File object: {file.id}"
    for call in (files.retrieve, files.delete, files.content):
        error = wire.refused(openai.NotFoundError, 404, lambda: call(file.id), param="id", names=[file.id])
        check(error.body["message"] == message, f"OpenAI's words: {error}")


def pages(run):
    """Lists turn pages, both ways, and end."""
    wire, check, files = run.wire, run.tally.check, run.wire.client.files
    made = [create(wire, b"x").id for _ in range(4)]
    newest_first = [item.id for item in wire.pages("File list", lambda: files.list(limit=2, purpose="fine-tune"), 2)]
    check(newest_first[:4] == made[::-1], "newest first")
    oldest_first = [item.id for item in wire.pages("File list", lambda: files.list(limit=3, order="asc", purpose="fine-tune"), 3)]
    check(oldest_first == newest_first[::-1], "oldest first is the other way round")
    check(wire.ask("File list", lambda: files.list(after=made[1], order="desc", limit=1)).data[0].id == made[0], "after")
    end = wire.ask("File list", lambda: files.list(after=newest_first[-1], purpose="fine-tune"))
    check(end.data == [] and not end.has_next_page(), "past the end is nothing")
    for id in made:
        wire.ask("FileDeleted", lambda: files.delete(id))


def refusals(run):
    """Bad input: one request, a 400 that names field and value."""
    wire, files = run.wire, run.wire.client.files
    bad = lambda call, param, *names: wire.refused(openai.BadRequestError, 400, call, param=param, names=names)
    bad(lambda: files.create(file=("a", b"x"), purpose="fine-tuning"), "purpose", "fine-tuning")
    bad(lambda: files.create(file=("a", b"x"), purpose="fine-tune-results"), "purpose", "fine-tune-results")
    bad(lambda: files.create(file=("n" * 256, b"x"), purpose="fine-tune"), "file", "n" * 256)
    for field, value in (("seconds", 60), ("anchor", "last_active_at")):
        body = {"expires_after": {**EXPIRES, field: value}}
        call = lambda: files.create(file=("a", b"x"), purpose="fine-tune", extra_body=body)
        bad(call, f"expires_after[{field}]", str(value))
    bad(lambda: files.create(file=("a", b"x"), purpose="fine-tune", extra_body={"colour": "red"}), "colour", "colour")
    bad(lambda: files.list(limit=0), "limit", "0")
    bad(lambda: files.list(limit=10001), "limit", "10001")
    bad(lambda: files.list(order="up"), "order", "up")
    bad(lambda: files.list(after="file-x"), "after", "file-x")
    bad(lambda: files.list(purpose="pleasure"), "purpose", "pleasure")
    bad(lambda: files.list(extra_query={"colour": "red"}), "colour", "colour")
