#!/usr/bin/env python3
"""Renders the templates of engine/tests/golden/templates/ with transformers: engine/tests/golden/templates.json.

    pip install transformers jinja2 && python scripts/golden/templates.py

The templates are written for this test, in the styles that models use; the date is fixed as the engine fixes it.
"""

import datetime
import json
import pathlib

from transformers.utils import chat_template_utils

FOLDER = pathlib.Path(__file__).parents[2] / "engine/tests/golden"
BOS, EOS = "<s>", "</s>"

USER = {"role": "user", "content": "Wie spät ist es, and what's <b>new</b> today?"}
ANSWER = {"role": "assistant", "content": " It is 10 o'clock – \"no\" news.\nBye 👋 "}
MORE = [{"role": "user", "content": "And tomorrow?"}, {"role": "assistant", "content": "The same."}]
SYSTEM = {"role": "system", "content": "You are brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a town, in °C",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["town"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"town": "Köln", "days": 2}}}
    ],
}
RESULT = {"role": "tool", "content": '{"temperature": 21.5, "sky": "clear"}', "tool_call_id": "call00001"}

CONVERSATIONS = [
    ([USER], None, True),
    ([USER, ANSWER], None, False),
    ([USER, ANSWER, *MORE], None, False),
    ([SYSTEM, USER, ANSWER, MORE[0]], None, True),
    ([USER, USER], None, False),
    ([USER], TOOLS, True),
    ([SYSTEM, USER, CALL, RESULT], TOOLS[:1], True),
    ([USER, CALL, RESULT, ANSWER, *MORE], TOOLS, False),
    ([USER, CALL, RESULT, RESULT, ANSWER], None, False),
]


class FixedDate(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, tzinfo=tz)


def render(template, messages, tools, add_generation_prompt):
    """The text, or None where the template refuses the conversation."""
    compiled = chat_template_utils._compile_jinja_template(template)
    try:
        return compiled.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=BOS,
            eos_token=EOS,
        )
    except Exception as error:  # raise_exception raises jinja2's TemplateError
        if type(error).__name__ != "TemplateError":
            raise
        return None


def main():
    chat_template_utils.datetime = FixedDate
    cases = []
    for path in sorted((FOLDER / "templates").glob("*.jinja")):
        template = path.read_text()
        for messages, tools, add_generation_prompt in CONVERSATIONS:
            if path.stem not in ("chatml_tools", "headers", "inst_tools") and (tools or CALL in messages):
                continue
            text = render(template, messages, tools, add_generation_prompt)
            cases.append(
                {
                    "template": path.stem,
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                    "text": text,
                }
            )
    output = FOLDER / "templates.json"
    output.write_text(json.dumps({"bos_token": BOS, "eos_token": EOS, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
    print(f"{output}: {len(cases)} cases")


if __name__ == "__main__":
    main()
