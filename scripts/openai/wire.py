"""The official client under watch: its requests are counted, and the raw JSON of each answer is held against OpenAI's shapes."""

import contextlib
import json
import sys
import traceback

import jsonschema
import openai

# The HTTP library that this version of the client is built on.
httpx = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]


class Failed(Exception):
    """Something is not as it must be."""


class Tally:
    """How many checks were made, how many calls were refused as they must be, and which groups failed."""

    def __init__(self):
        self.checks, self.refusals = 0, 0
        self.failed = []

    def check(self, fine, what):
        """Counts what holds, and ends the group with what does not."""
        self.checks += 1
        if not fine:
            raise Failed(what)

    @contextlib.contextmanager
    def group(self, name):
        """A line of the report. What is wrong ends its group only."""
        before = self.checks
        try:
            yield
            print(f"  ok    {name}: {self.checks - before} checks", flush=True)
        except Exception as error:
            self.failed.append(name)
            told = str(error) if isinstance(error, Failed) else "".join(traceback.format_exception(error))
            print(f"  FAIL  {name}: {told}", flush=True)


class Wire:
    """A client, and what goes over its connection."""

    def __init__(self, url, key, schemas, tally, transport=None, **options):
        self.tally = tally
        self.schemas = schemas
        self.heeds_has_more = int(openai.__version__.split(".")[0]) > 1
        self.requests, self.responses = [], []
        hooks = {"request": [self.requests.append], "response": [self.responses.append]}
        http = openai.DefaultHttpxClient(event_hooks=hooks, **({"transport": transport} if transport else {}))
        # With the client's own two retries: a request too many is what is looked for.
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http, **options)

    def ask(self, shape, call, requests=1):
        """What the call gives; it must make so many requests, each answered with a 200 of that shape (None: no JSON)."""
        self.requests.clear()
        self.responses.clear()
        result = call()
        self._count(requests)
        for response in self.responses:
            self.tally.check(response.status_code == 200, f"{self._last()} answered {response.status_code}")
            if shape is not None:
                self._check_json(response, shape)
        return result

    def pages(self, shape, pages, limit):
        """All items of a list that turns pages. The old client asks until a page is empty, newer ones heed `has_more`."""
        self.requests.clear()
        self.responses.clear()
        items = list(pages())
        self._count(max(1, -(-len(items) // limit)) + (1 if items and not self.heeds_has_more else 0))
        for response in self.responses:
            self._check_json(response, shape)
        ids = [item.id for item in items]
        self.tally.check(len(set(ids)) == len(ids), f"{self._last()}: an item came twice: {ids}")
        last = self.responses[-1].json()
        self.tally.check(last["has_more"] is False, f"{self._last()}: the last page says that more follow")
        return items

    def refused(self, kind, status, call, param=None, code=None, names=()):
        """The error of a call that must fail in one request, with the client's class, and name what is wrong."""
        self.requests.clear()
        self.responses.clear()
        check = self.tally.check
        try:
            call()
        except openai.APIStatusError as error:
            self._count(1)
            self._check_json(self.responses[0], "Error")
            told = f"{self._last()}: {error!r}"
            check(type(error) is kind and error.status_code == status, f"{kind.__name__} {status} expected, {told}")
            body = self.responses[0].json()["error"]
            check((error.param, error.code) == (body["param"], body["code"]), f"the client reads param and code, {told}")
            check(error.param == param and error.code == code, f"param `{param}` and code `{code}` expected, {told}")
            check(error.request_id is not None, f"a request id, {told}")
            self.tally.refusals += 1
            for name in names:
                check(name in body["message"], f"the message names `{name}`, {told}")
            return error
        raise Failed(f"{kind.__name__} {status} expected, but {self._last()} went through")

    def _count(self, expected):
        made = len(self.requests)
        self.tally.check(made == expected, f"{self._last()}: {expected} request(s) expected, {made} made")

    def _last(self):
        request = self.requests[-1]
        return f"{request.method} {request.url.raw_path.decode()}"

    def _check_json(self, response, shape):
        kind = response.headers.get("content-type")
        self.tally.check(kind == "application/json", f"{self._last()}: content-type `{kind}`")
        self.tally.check(response.headers.get("x-request-id"), f"{self._last()}: no x-request-id")
        self.check_shape(json.loads(response.content), shape)

    def check_shape(self, value, shape):
        """Holds a JSON value against a shape."""
        wrong = list(jsonschema.Draft202012Validator(self.schemas[shape]).iter_errors(value))
        told = "; ".join(f"{error.json_path}: {error.message}" for error in wrong[:3])
        self.tally.check(not wrong, f"{self._last()}: no {shape}: {told}")


def post(client, path, kind, **body):
    """A call that this version of the client has no method for."""
    return client.post(path, cast_to=kind, body=body) if body else client.post(path, cast_to=kind)
