"""Build the site: ``python docs/build.py``, or ``make docs``, which installs what it needs first.

Nothing is downloaded while it builds, and nothing in the site needs a network to be read. Every
warning is an error. The site stands in ``build/docs/html/index.html``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))

from gather import Site  # noqa: E402 (the path comes first)
from sphinx.cmd.build import build_main  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Gather the sources and run Sphinx over them; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python docs/build.py", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=DOCS.parent / "build" / "docs", metavar="DIR",
        help="where sources, cache and pages go (default: build/docs)")
    add("--no-notebooks", dest="notebooks", action="store_false",
        help="leave out the notebooks, which are executed")
    add("--no-api", dest="api", action="store_false",
        help="leave out the pages made from docstrings, whose modules are imported")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    use_this_python(output / "jupyter")
    site = Site(output, notebooks=args.notebooks, api=args.api)
    try:
        site.write()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return build_main([
        "--conf-dir", str(DOCS), "--doctree-dir", str(output / "doctrees"),
        "--define", f"nb_execution_cache_path={output / 'notebooks'}",
        "--define", f"html_extra_path={site.as_is}",
        "--fail-on-warning", "--keep-going", "--quiet", "--fresh-env",
        str(site.folder), str(output / "html"),
    ])  # fmt: skip


def use_this_python(folder: Path) -> None:
    """Have notebooks executed by the interpreter that runs this, whatever kernels a user has."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    specification = {
        "argv": [*command, "--log-level=ERROR"], "display_name": "Python 3", "language": "python"
    }  # fmt: skip
    (kernel / "kernel.json").write_text(json.dumps(specification), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(folder)
    logging.getLogger("traitlets").setLevel(logging.WARNING)  # else a line for each notebook


if __name__ == "__main__":
    sys.exit(main())
