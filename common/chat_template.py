"""Chat templates: jinja programs that come with a model and turn messages into its prompt format.

    render = compile_chat_template(template)
    text = render(messages=[...], add_generation_prompt=True, bos_token="<s>", eos_token="</s>")

They are code from strangers, so they run in jinja's sandbox, in the dialect that transformers
defined for them (docs: https://huggingface.co/docs/transformers/chat_templating_writing).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlock(Extension):
    """{% generation %}…{% endgeneration %}: marks the assistant's words for training, no more."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_chat_template(template: str) -> Callable[..., str]:
    """A function of the template's variables that returns the prompt.

    Raises ValueError here where the template is no valid jinja, and later where it refuses what
    it is given (some insist on alternating roles, for instance).
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template is not valid jinja: {error}") from error

    def render(**variables: Any) -> str:
        try:
            return compiled.render(**variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error

    return render


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
