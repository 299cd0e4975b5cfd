"""Gather what the site is made of into one folder: documents, notebooks, pictures, API pages.

The Markdown of the repository is written to be read where it lies, beside the code. Here each
document keeps its path and its words; only the targets of links are rewritten, because a link to a
folder or to a Python file has a page of its own on the site.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from api_pages import ApiPages

ROOT = Path(__file__).resolve().parents[2]
# Reading order of the guides; what is not named here follows in the order of the alphabet.
GUIDES = (
    "docs/README.md", "docs/getting_started.md", "docs/quick_reference.md",
    "docs/project_summary.md", "docs/project_structure.md", "docs/technical_comparison.md",
    "docs/interview_guide.md", "docs/development_plan.md", "docs/milestone_checklist.md",
    "docs/roadmap.md", "CONTRIBUTING.md", "docs/results/README.md",
)  # fmt: skip
HOME = "README.md"
# The documents of each part of the site, as patterns of paths in the repository.
PARTS = {
    "Guides": ("docs/**/*.md", "CONTRIBUTING.md"),
    "Notes": ("learn/*.md",),
    "Notebooks": ("learn/*.py",),
    "Milestones": ("m[0-9]_*/README.md",),
    "Instruments": ("dev/*/README.md",),
    "Logs": ("dev/milestone_*.md",),
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
IMAGE = re.compile(r"""!\[[^\]]*\]\(([^)\s]+)\)|<(?:img|source)[^>]*?\bsrc(?:set)?=["']([^"']+)""")
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def documents() -> dict[str, list[str]]:
    """Paths in the repository by part of the site; the home page is in none."""
    found = {
        part: sorted({p.relative_to(ROOT).as_posix() for glob in globs for p in ROOT.glob(glob)})
        for part, globs in PARTS.items()
    }
    places = {path: place for place, path in enumerate(GUIDES)}
    found["Guides"].sort(key=lambda path: places.get(path, len(places)))
    return found


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """``text`` with every line that is not code changed."""
    lines, fence = [], ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if not fence and mark:
            fence = mark[1]
        elif fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        else:
            line = change(line)
        lines.append(line)
    return "".join(lines)


class Site:
    """The sources of the site in a folder that Sphinx reads.

    Args:
        folder: gets ``source``, which Sphinx reads, and ``as_is``, which it copies beside the pages
            without a look: pictures that HTML in a document names by their path.
        notebooks: with the notebooks, which Sphinx executes.
        api: with a page for each module, which Sphinx imports.
    """

    def __init__(self, folder: Path, *, notebooks: bool, api: bool) -> None:
        self.folder = folder / "source"
        self.as_is = folder / "as_is"
        self._notebooks = notebooks
        self._api = ApiPages(ROOT) if api else None
        self._parts = documents()
        found = [path for paths in self._parts.values() for path in paths]
        self._texts = [HOME, *(path for path in found if path.endswith(".md"))]

    def write(self) -> None:
        """Everything that Sphinx needs.

        Raises:
            FileNotFoundError: a document links or shows a file that does not exist.
        """
        for folder in (self.folder, self.as_is):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for path in self._texts:
            text = (ROOT / path).read_text(encoding="utf-8")
            self._copy_images(path, text)
            text = outside_fences(text, lambda line, path=path: self._rewritten(path, line))
            self._put(self._page(path), text + ("\n" + self._contents() if path == HOME else ""))
        if self._notebooks:
            for path in self._parts["Notebooks"]:
                self._put(self._page(path), self._notebook(path))
        if self._api:
            for page, text in self._api.pages():
                self._put(page, text)

    def _put(self, page: str, text: str) -> None:
        target = self.folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def _page(self, path: str) -> str:
        """Where a document of the repository stands on the site."""
        if path == HOME:
            return "index.md"
        if path.endswith(".py"):  # beside the note of the same name
            return f"notebooks/{PurePosixPath(path).stem}.ipynb"
        return path

    def _notebook(self, path: str) -> str:
        import jupytext

        source = (ROOT / path).read_text(encoding="utf-8")
        notebook = jupytext.reads(source, fmt="py:percent")
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = outside_fences(
                    cell.source, lambda line: self._rewritten(path, line)
                )
        return jupytext.writes(notebook, fmt="ipynb")

    def _rewritten(self, path: str, line: str) -> str:
        """A line of a document whose links lead to pages of the site."""

        def target(link: re.Match[str]) -> str:
            return self._target(path, link[1]) + (link[2] or "")

        return LINK.sub(target, line)

    def _target(self, path: str, link: str) -> str:
        full = Path(os.path.normpath(ROOT / PurePosixPath(path).parent / link))
        if not full.exists():
            raise FileNotFoundError(f"{path} links {link}, which does not exist")
        name = full.relative_to(ROOT).as_posix() if full != ROOT else "."
        page = self._page_of(name)
        if page is None:  # a plain file: Sphinx offers it for download
            self._copy(name)
            page = name
        here = PurePosixPath(self._page(path)).parent
        return os.path.relpath(page, here)

    def _page_of(self, name: str) -> str | None:
        """The page about a file or folder of the repository, None for a file without one."""
        if name == ".":
            return "index.md"
        if (ROOT / name).is_dir() and (ROOT / name / "README.md").is_file():
            name += "/README.md"
        if name in self._texts or (self._notebooks and name in self._parts["Notebooks"]):
            return self._page(name)
        if self._api and (page := self._api.page_of(name)):
            return page
        return "docs/project_structure.md" if (ROOT / name).is_dir() else None

    def _copy_images(self, path: str, text: str) -> None:
        for found in IMAGE.finditer(text):
            link = (found[1] or found[2]).split("#")[0].split("?")[0]
            if "://" not in link:
                full = Path(os.path.normpath(ROOT / PurePosixPath(path).parent / link))
                name = full.relative_to(ROOT).as_posix()
                self._copy(name)
                if found[2]:
                    self._copy(name, self.as_is)

    def _copy(self, name: str, folder: Path | None = None) -> None:
        target = (folder or self.folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)

    def _contents(self) -> str:
        """The tables of contents: no page may be missing from them."""
        lines = []
        for part, pages in self._pages():
            if pages:
                options = [":hidden:", ":maxdepth: 1", f":caption: {part}"]
                lines += ["```{toctree}", *options, "", *pages, "```", ""]
        return "\n".join(lines)

    def _pages(self) -> Iterator[tuple[str, list[str]]]:
        for part, paths in self._parts.items():
            if part != "Notebooks" or self._notebooks:
                yield part, [str(PurePosixPath(self._page(path)).with_suffix("")) for path in paths]
        if self._api:
            yield "API", self._api.contents()
