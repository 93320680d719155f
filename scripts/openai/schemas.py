"""Writes JSON Schemas of OpenAI's answers, made from the models of the newest official client.

    schemas.py OUT.json

The client's models say which fields there are, their types and their words; they take every nullable field for optional. Where
the published specification says more than they do, `MORE` does.
"""

import json
import pathlib
import sys

from openai.types import FileDeleted, FileObject, Model, ModelDeleted, Upload
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from openai.types.uploads import UploadPart

OBJECTS = {
    "File": FileObject,
    "FileDeleted": FileDeleted,
    "Upload": Upload,
    "UploadPart": UploadPart,
    "Job": FineTuningJob,
    "Event": FineTuningJobEvent,
    "Checkpoint": FineTuningJobCheckpoint,
    "Model": Model,
    "ModelDeleted": ModelDeleted,
}

# Fields that the specification requires, null or not.
MORE = {
    "Job": ["error", "finished_at", "fine_tuned_model", "trained_tokens", "validation_file", "method", "integrations"],
    "Event": ["type", "data"],
}

PREFIXES = {
    "File": "file-",
    "Upload": "upload_",
    "UploadPart": "part_",
    "Job": "ftjob-",
    "Event": "ftevent-",
    "Checkpoint": "ftckpt_",
}

ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def schema_of(name, model):
    """The schema of one object, with what its model leaves open."""
    schema = model.model_json_schema()
    schema["required"] = sorted({*schema["required"], *MORE.get(name, [])})
    if name in PREFIXES:
        schema["properties"]["id"]["pattern"] = f"^{PREFIXES[name]}[0-9a-f]{{32}}$"
    if name == "Job":
        # The specification's own example of a pause answers with it.
        schema["properties"]["status"]["enum"].append("paused")
    if name == "File":
        # A purpose that the client may send, but does not read.
        schema["properties"]["purpose"]["enum"].append("evals")
    return schema


def list_of(name, item):
    """A page; `$defs` of the item move to the top, where its references look for them."""
    definitions = item.get("$defs", {})
    item = {key: value for key, value in item.items() if key != "$defs"}
    fields = ["object", "data"] if name == "Model" else ["object", "data", "has_more", "first_id", "last_id"]
    return {
        "type": "object",
        "required": fields,
        "$defs": definitions,
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "has_more": {"type": "boolean"},
            "first_id": {"type": ["string", "null"]},
            "last_id": {"type": ["string", "null"]},
        },
    }


def main():
    schemas = {name: schema_of(name, model) for name, model in OBJECTS.items()}
    schemas |= {f"{name} list": list_of(name, schemas[name]) for name in ("File", "Job", "Event", "Checkpoint", "Model")}
    schemas["Error"] = ERROR
    pathlib.Path(sys.argv[1]).write_text(json.dumps(schemas))


if __name__ == "__main__":
    main()
