"""``mermaid`` fences become SVG while the site is built.

A page then needs neither a script nor a network to show its diagrams, and a diagram that does not
parse is a warning here instead of a red box in a browser. Mermaid itself runs in a small JavaScript
engine inside the package ``mermaidx``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import mermaidx
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SMALLEST = 0.6
"""A wide diagram shrinks to this share of its size, then its frame scrolls."""


class Mermaid(SphinxDirective):
    """A diagram; its source stays in the page as a comment for who reads the HTML."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            svg = _render("\n".join(self.content))
        except RuntimeError as error:
            return [self.state.document.reporter.warning(str(error), line=self.lineno)]
        # Ids name a diagram's styles and arrow heads: two diagrams of a page must not share them.
        svg = svg.replace("my-svg", f"mermaid-{self.env.new_serialno('mermaid')}")
        return [nodes.raw("", f'<figure class="mermaid">{svg}</figure>', format="html")]


@cache
def _render(source: str) -> str:
    """The diagram as an SVG element.

    Raises:
        RuntimeError: it does not parse.
    """
    svg = mermaidx.render(source).svg()
    width = float(re.search(r'viewBox="\S+ \S+ (\S+)', svg)[1])
    return svg.replace("max-width:", f"min-width: {SMALLEST * width:.0f}px; max-width:", 1)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
