"""Reading prompts from files: text, one prompt a line, or JSONL, one object a line.

A JSONL line is a string, or an object with ``prompt`` (text or token ids) or ``messages`` (a chat),
and beside it any field of ``SamplingParams``, which overrides the command line for this line::

    {"prompt": "The sky is", "max_tokens": 8}
    {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0.7}
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.processor import Prompt
from common.sampling_params import SamplingParams

_PARAMS = frozenset(f.name for f in dataclasses.fields(SamplingParams)) - {"output_kind"}


@dataclass
class PromptLine:
    """One prompt of a file (or of the command line), or what is wrong with its line."""

    source: str  # for messages: "prompts.jsonl:3", "--prompt 1"
    prompt: Prompt | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_prompts(path: Path) -> list[PromptLine]:
    """All non-empty lines of a file; bad ones carry an error instead of a prompt.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has no prompt at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from error
    is_jsonl = path.suffix in (".jsonl", ".ndjson")
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            source = f"{path}:{number}"
            lines.append(_parse(source, line) if is_jsonl else PromptLine(source, line.strip("\r")))
    if not lines:
        raise ValueError(f"{path} has no prompts: give one a line")
    return lines


def _parse(source: str, line: str) -> PromptLine:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return PromptLine(source, error=f"not JSON: {error.msg} at column {error.colno}")
    if isinstance(value, str):
        return PromptLine(source, value)
    if not isinstance(value, dict):
        return PromptLine(source, error="a line must be a JSON string or object")
    prompt = value.pop("prompt", None)
    messages = value.pop("messages", None)
    if (prompt is None) == (messages is None):
        return PromptLine(source, error='give either "prompt" or "messages"')
    unknown = sorted(set(value) - _PARAMS)
    if unknown:
        return PromptLine(source, error=f"unknown field(s) {', '.join(unknown)}")
    if isinstance(value.get("logit_bias"), dict):
        try:  # JSON has no other keys than strings
            value["logit_bias"] = {int(token): bias for token, bias in value["logit_bias"].items()}
        except ValueError:
            return PromptLine(source, error='"logit_bias" must map token ids to numbers')
    chosen = messages if prompt is None else prompt
    if not isinstance(chosen, (str, list)) or (messages is not None and not _is_chat(messages)):
        return PromptLine(source, error='"prompt" is text or token ids, "messages" a list of '
                          'objects with "role" and "content"')
    return PromptLine(source, chosen, overrides=value)


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
