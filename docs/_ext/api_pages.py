"""A page for each module whose docstrings the site shows.

Of ``common`` all modules have one. Of a milestone those have one that differ from the milestone
before; a file that is carried on byte for byte is shown where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

Modules = dict[str, str]
"""The module that stands for each Python file, both by path: itself or where it is carried from."""


class ApiPages:
    """Pages about the packages of a repository.

    Args:
        root: the repository.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._packages: dict[str, Modules] = {"common": self._own("common")}
        before: Modules = {}
        milestones = sorted(path.parent.name for path in root.glob("m[0-9]_*/__init__.py"))
        for milestone in milestones:
            before = self._packages[milestone] = self._compared(milestone, before)

    def contents(self) -> list[str]:
        """Names of the packages' pages, for a table of contents."""
        return [f"api/{package}" for package in self._packages]

    def page_of(self, name: str) -> str | None:
        """The page about a Python file or a package, None if there is none."""
        package = name.split("/")[0]
        modules = self._packages.get(package, {})
        if name in modules:
            return _page(modules[name])
        if f"{name}/__init__.py" in modules:
            return f"api/{package}.md" if name == package else _page(modules[f"{name}/__init__.py"])
        return None

    def pages(self) -> Iterator[tuple[str, str]]:
        """(path of a page, its text) of everything."""
        for package, modules in self._packages.items():
            yield f"api/{package}.md", self._overview(package, modules)
            for path, source in modules.items():
                if path == source and path != f"{package}/__init__.py":
                    yield _page(path), self._module(path)

    def _own(self, package: str) -> Modules:
        files = sorted((self._root / package).rglob("*.py"))
        return {(p := file.relative_to(self._root).as_posix()): p for file in files}

    def _compared(self, milestone: str, before: Modules) -> Modules:
        """The modules of a milestone, each with the file in which its bytes stood first."""
        known = {path.partition("/")[2]: source for path, source in before.items()}
        result = self._own(milestone)
        for path in result:
            source = known.get(path.partition("/")[2])
            if source and (self._root / source).read_bytes() == (self._root / path).read_bytes():
                result[path] = source
        return result

    def _overview(self, package: str, modules: Modules) -> str:
        """A package's docstring and where its modules are described."""
        own = [path for path, source in modules.items() if path == source]
        own.remove(f"{package}/__init__.py")
        lines = [f"# {package}", "", *_autodoc("automodule", package), ""]
        if package != "common":
            config = _name(modules[f"{package}/config.py"])
            lines += [
                "{py:class}`LLM <common.llm.LLM>`, "
                f"{{py:class}}`LLMEngine <{package}.engine.LLMEngine>`, "
                f"{{py:class}}`EngineConfig <{config}.EngineConfig>`, "
                "{py:class}`SamplingParams <common.sampling_params.SamplingParams>`. "
                f"What it is and how to read it: [{package}](../{package}/README.md).", "",
            ]  # fmt: skip
        lines += ["```{toctree}", ":maxdepth: 1", "", *(_name(path) for path in own), "```", ""]
        carried = [(path, source) for path, source in modules.items() if path != source]
        if carried:
            lines += ["Carried on byte for byte:", ""]
            lines += [
                f"- [{_name(path)}]({_name(source)}.md), from {source.split('/')[0]}"
                for path, source in carried
            ]
        return "\n".join(lines) + "\n"

    def _module(self, path: str) -> str:
        name = _name(path)
        lines = [f"# {name.partition('.')[2]}", "", f"`{path}`", ""]
        return "\n".join(lines + _autodoc("automodule", name, "members", "undoc-members")) + "\n"


def _autodoc(directive: str, name: str, *options: str) -> list[str]:
    flags = [f"   :{option}:" for option in options]
    return ["```{eval-rst}", f".. {directive}:: {name}", *flags, "```"]


def _name(path: str) -> str:
    """``m4_flash.kernels`` of ``m4_flash/kernels/__init__.py``."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _page(path: str) -> str:
    return f"api/{_name(path)}.md"
