"""The rules of the house: what may import what, readable diffs, one public face, plain twins.

A milestone's README.md has a section ``## Files`` with one bullet for every file of the folder but
the README itself, said of its predecessor (in the first milestone everything is added)::

    - added `kv_cache.py`: what it is for
    - changed `engine.py`: what is different
    - carried `config.py`
    - removed `inspect.py`

``carried`` means byte-identical. Files in subfolders go by their relative path.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from support import MILESTONES, ROOT, load, new_llm

FACE = ("LLM", "LLMEngine", "EngineConfig", "SamplingParams")
BULLET = re.compile(r"^- (added|changed|carried|removed) `([^`]+)`(: \S.*)?$")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def absolute_imports(file: Path) -> set[str]:
    """Names of the modules that a file imports by their full name, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def relative_imports(file: Path) -> set[str]:
    """Full names of the modules that a file imports by their place beside it."""
    package = file.relative_to(ROOT).parent.parts
    return {
        ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    }


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


OURS = {"common", "dev", "tests", *MILESTONES}


class TestImports:
    def test_a_milestone_imports_itself_and_common(self, milestone):
        """Itself by relative imports, so that the next folder can carry a file unchanged."""
        for file in python_files(milestone):
            assert roots(absolute_imports(file)) & OURS <= {"common"}, file
            assert roots(relative_imports(file)) <= {milestone}, file

    def test_common_imports_nothing_that_stands_on_it(self):
        for file in python_files("common"):
            assert roots(absolute_imports(file) | relative_imports(file)) & OURS <= {"common"}, file

    def test_nobody_gets_around_that_by_importlib(self):
        for folder in ("common", *MILESTONES):
            for file in python_files(folder):
                for argument in re.findall(r"import_module\(([^)]*)\)", file.read_text("utf-8")):
                    assert re.fullmatch(r'"[a-z_.]+"', argument), (file, argument)
                    assert argument.strip('"').split(".")[0] not in OURS, (file, argument)

    def test_what_is_imported_is_declared(self):
        """A fresh install has every package that the engine imports."""
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for folder in ("common", *MILESTONES):
            for file in python_files(folder):
                packages = roots(absolute_imports(file)) - OURS - set(sys.stdlib_module_names)
                for package in packages:
                    assert re.search(rf'"{package.replace("_", "-")}\b', declared), (file, package)


def files_of(milestone: str) -> dict[str, bytes]:
    """Content of every file of a milestone by its path in it."""
    folder = ROOT / milestone
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != "README.md"
        and "__pycache__" not in path.parts
        and not path.name.startswith(".")
    }


def real_changes(milestone: str) -> dict[str, str]:
    """What each file is with respect to the milestone before: added, changed, carried, removed."""
    place = MILESTONES.index(milestone)
    ours = files_of(milestone)
    before = files_of(MILESTONES[place - 1]) if place else {}
    changes = dict.fromkeys(before.keys() - ours.keys(), "removed")
    for name, content in ours.items():
        if name not in before:
            changes[name] = "added"
        else:
            changes[name] = "carried" if content == before[name] else "changed"
    return changes


def test_the_readme_lists_what_changed(milestone):
    text = (ROOT / milestone / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Files$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{milestone}/README.md has no section '## Files'"
    bullets = [line for line in section[1].splitlines() if line.startswith("- ")]
    listed = {}
    for bullet in bullets:
        match = BULLET.match(bullet)
        assert match, f"not of the form '- changed `engine.py`: what is different': {bullet}"
        change, name, reason = match.groups()
        assert name not in listed, f"{name} is listed twice"
        assert reason or change in ("carried", "removed"), f"say what for: {bullet}"
        listed[name] = change
    assert listed == real_changes(milestone)


class TestPublicFace:
    def test_every_milestone_has_the_same_names(self, milestone):
        module = load(milestone)
        assert set(module.__all__) == set(FACE)
        assert all(hasattr(module, name) for name in FACE)

    @pytest.mark.parametrize("name", ["LLM", "LLMEngine"])
    def test_methods_and_signatures_are_the_same(self, milestone, name):
        ours, first = (public_methods(getattr(load(m), name)) for m in (milestone, MILESTONES[0]))
        assert ours == first

    def test_an_engine_shows_the_same_attributes(self, milestone):
        assert {"config", "device", "dtype", "model_config", "tokenizer", "max_model_len"} <= set(
            vars(new_llm(milestone).engine)
        )

    def test_fields_of_the_configuration_are_never_taken_back(self, milestone):
        """Each milestone has all fields of m0 with the same defaults, and help for each."""
        fields = {f.name: f for f in dataclasses.fields(load(milestone).EngineConfig)}
        for field in dataclasses.fields(load(MILESTONES[0]).EngineConfig):
            assert fields[field.name].default == field.default
        assert all(field.metadata.get("help") for field in fields.values())

    def test_stats_have_the_same_names(self, milestone):
        ours, first = (new_llm(name).stats() for name in (milestone, MILESTONES[0]))
        assert list(ours) == list(first)

    def test_every_milestone_has_a_command_line(self, milestone):
        assert (ROOT / milestone / "run.py").is_file()


def public_methods(cls: type) -> dict[str, str]:
    """Names and signatures; annotations aside, whose classes are each milestone's own."""
    return {
        name: str(
            inspect.signature(method).replace(
                parameters=[
                    p.replace(annotation=inspect.Parameter.empty)
                    for p in inspect.signature(method).parameters.values()
                ],
                return_annotation=inspect.Signature.empty,
            )
        )
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


def functions_of(file: Path, owner: str | None = None) -> dict[str, list[str]]:
    """A module's functions by name, or a class's methods: of each the parameters as written."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if owner is not None:
        (body,) = (n.body for n in body if isinstance(n, ast.ClassDef) and n.name == owner)
    return {node.name: _parameters(node.args) for node in body if isinstance(node, ast.FunctionDef)}


def _parameters(arguments: ast.arguments) -> list[str]:
    """Those that may be given by place: name, annotation and default."""
    names = [ast.unparse(argument) for argument in arguments.args]
    defaults = [f" = {ast.unparse(default)}" for default in arguments.defaults]
    without_default = [""] * (len(names) - len(defaults))
    return [n + d for n, d in zip(names, without_default + defaults, strict=True)]


# Operations of the paged cache, which a name chooses between or which stand beside each other.
OPERATIONS = ("reshape_and_cache", "paged_attention")
BACKENDS = (
    ("m3_paged", "triton_kernels"),
    ("m3_paged", "cuda_kernels"),
    ("m4_flash", "triton_kernels"),
)
# Kernels that take a plan made from the lengths, and where the twin is, which takes the lengths.
PLANNED = (
    ("m4_flash", "flash_decode", "reference", "paged_attention"),
    ("m4_flash", "flash_prefill", "prefill_reference", "paged_prefill"),
)


class TestTwins:
    def test_operations_are_what_an_engine_can_call(self):
        kernels = importlib.import_module("m3_paged.kernels").Kernels
        assert {field.name for field in dataclasses.fields(kernels)} == {"name", *OPERATIONS}

    @pytest.mark.parametrize(("milestone", "module"), BACKENDS)
    def test_each_backend_takes_what_its_twin_takes(self, milestone, module):
        """The same parameters in the same order; it may add some of its own with defaults."""
        folder = ROOT / milestone / "kernels"
        twins, ours = (functions_of(folder / f"{name}.py") for name in ("reference", module))
        for operation in OPERATIONS:
            shared = len(twins[operation])
            assert ours[operation][:shared] == twins[operation]
            assert all("=" in parameter for parameter in ours[operation][shared:])

    @pytest.mark.parametrize(("milestone", "kernel", "reference", "twin"), PLANNED)
    def test_a_plan_stands_for_the_lengths(self, milestone, kernel, reference, twin):
        folder = ROOT / milestone / "kernels"
        taken = functions_of(folder / f"{reference}.py")[twin]
        ours = functions_of(folder / f"{kernel}.py")[kernel]
        lengths = [parameter for parameter in taken if "_lens: " in parameter]
        place = taken.index(lengths[0])
        rest = [p for p in taken[place:] if p not in lengths and "=" not in p]
        (plan,) = (parameter for parameter in ours if parameter.startswith("plan: "))
        assert ours == [*taken[:place], plan, *rest]

    def test_twins_are_plain_torch(self):
        """And need nothing else of the repository."""
        twins = [file for name in MILESTONES for file in (ROOT / name).rglob("*reference.py")]
        assert len(twins) >= 3
        for file in twins:
            assert roots(absolute_imports(file)) - set(sys.stdlib_module_names) == {"torch"}, file
            assert not relative_imports(file), file

    def test_fused_operations_take_what_the_plain_ones_take(self):
        plain = functions_of(ROOT / "common" / "layers.py", "Ops")
        fused = functions_of(ROOT / "common" / "ops" / "fused.py", "FusedOps")
        assert fused
        assert fused == {name: plain[name] for name in fused}
