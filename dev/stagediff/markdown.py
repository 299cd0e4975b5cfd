"""The notes' Markdown as HTML that stands alone."""

from __future__ import annotations

import base64
import mimetypes
import os
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

# HTML is let through: the notes fold their solutions with it, and they are ours.
_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
_LINE = MarkdownIt("commonmark", {"html": False})


def render_inline(text: str) -> Markup:
    """One line of Markdown, without a paragraph around it."""
    return Markup(_LINE.renderInline(text))


def render_section(text: str, folder: Path, place: Path) -> Markup:
    """A section of a note.

    Args:
        folder: where the note lies, which its links and pictures are relative to.
        place: where the page will lie. Pictures are put into it, links are made to lead from it.
    """
    tokens = _MARKDOWN.parse(text)
    for token in tokens:
        for child in token.children or []:
            _make_independent(child, folder, place)
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


def _make_independent(token: Token, folder: Path, place: Path) -> None:
    if token.type == "link_open":
        target, mark, anchor = str(token.attrs["href"]).partition("#")
        if "://" not in target:
            path = folder / target if target else folder
            token.attrs["href"] = Path(os.path.relpath(path, place)).as_posix() + mark + anchor
    elif token.type == "image":
        picture = folder / str(token.attrs["src"])
        kind = mimetypes.guess_type(picture.name)[0]
        if picture.is_file() and kind:
            data = base64.b64encode(picture.read_bytes()).decode("ascii")
            token.attrs["src"] = f"data:{kind};base64,{data}"
