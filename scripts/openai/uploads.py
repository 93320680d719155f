"""Section 1.2 of OpenAI's contract: uploads in parts."""

from hashlib import md5

import openai

from wire import post


def begin(wire, size, **options):
    """A new upload."""
    uploads = wire.client.uploads
    return wire.ask(
        "Upload",
        lambda: uploads.create(bytes=size, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune", **options),
    )


def uploads(run):
    """By hand, parts out of order, and by the client's own helper."""
    wire, check, client = run.wire, run.tally.check, run.wire.client
    half = len(run.rows) // 2
    upload = begin(wire, len(run.rows))
    check(upload.status == "pending" and upload.expires_at - upload.created_at == 3600, f"an hour: {upload}")
    second = wire.ask("UploadPart", lambda: client.uploads.parts.create(upload.id, data=run.rows[half:]))
    first = wire.ask("UploadPart", lambda: client.uploads.parts.create(upload.id, data=run.rows[:half]))
    check(first.upload_id == upload.id, "a part names its upload")
    digest = md5(run.rows).hexdigest()
    finish = lambda: client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=digest)
    done = wire.ask("Upload", finish)
    check(done.status == "completed" and done.file.bytes == len(run.rows), f"uploads.complete: {done}")
    check(wire.ask("Upload", finish).file.id == done.file.id, "completing again gives the same file")
    check(wire.ask(None, lambda: client.files.content(done.file.id)).read() == run.rows, "the parts are the file")
    wire.ask("FileDeleted", lambda: client.files.delete(done.file.id))
    # Beginning, four parts (the last one short), completing.
    size = len(run.rows)
    chunked = lambda: client.uploads.upload_file_chunked(
        file=run.data, mime_type="text/jsonl", purpose="fine-tune", part_size=size // 3, md5=digest
    )
    done = wire.ask(None, chunked, requests=2 + -(-size // (size // 3)))
    for response, shape in zip(wire.responses, ["Upload", *["UploadPart"] * (len(wire.responses) - 2), "Upload"]):
        wire.check_shape(response.json(), shape)
    check(wire.ask(None, lambda: client.files.content(done.file.id)).read() == run.rows, "upload_file_chunked")
    wire.ask("FileDeleted", lambda: client.files.delete(done.file.id))
    pending = begin(wire, 1, extra_body={"expires_after": {"anchor": "created_at", "seconds": 3600}})
    check(wire.ask("Upload", lambda: client.uploads.cancel(pending.id)).status == "cancelled", "uploads.cancel")


def refusals(run):
    """Bad input: one request, a 400 that names field and value."""
    wire, client = run.wire, run.wire.client
    bad = lambda call, param, *names: wire.refused(openai.BadRequestError, 400, call, param=param, names=names)
    fields = {"bytes": 3, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    for name, value in (("bytes", 0), ("bytes", -1), ("filename", ""), ("mime_type", ""), ("purpose", "pleasure")):
        bad(lambda: client.uploads.create(**{**fields, name: value}), name, *([str(value)] if value else []))
    bad(lambda: client.uploads.create(**fields, extra_body={"colour": "red"}), "colour", "colour")
    upload = begin(wire, 3)
    part = wire.ask("UploadPart", lambda: client.uploads.parts.create(upload.id, data=b"ab"))
    complete = lambda parts, **more: client.uploads.complete(upload.id, part_ids=parts, **more)
    bad(lambda: complete([part.id]), "part_ids", "2", "3")
    bad(lambda: complete([]), "part_ids")
    bad(lambda: complete(["part_x"]), "part_ids", "part_x")
    rest = wire.ask("UploadPart", lambda: client.uploads.parts.create(upload.id, data=b"c"))
    bad(lambda: complete([part.id, rest.id], md5="0" * 32), "md5")
    wire.ask("Upload", lambda: client.uploads.cancel(upload.id))
    bad(lambda: complete([part.id, rest.id]), "upload_id", "cancelled")
    bad(lambda: client.uploads.parts.create(upload.id, data=b"c"), "upload_id", "cancelled")
    gone = "upload_" + "0" * 32
    missing = lambda call: wire.refused(openai.NotFoundError, 404, call, param="upload_id", names=[gone])
    missing(lambda: client.uploads.parts.create(gone, data=b"c"))
    missing(lambda: client.uploads.complete(gone, part_ids=[part.id]))
    missing(lambda: client.uploads.cancel(gone))
    bad(lambda: post(client, "/uploads", object, bytes="3", filename="a", mime_type="a", purpose="fine-tune"), "bytes", "3")
