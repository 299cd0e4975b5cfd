"""Documents: all of them are reached, and what they link, name and command exists."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import doc_markdown as markdown
import pytest
from support import MILESTONES, ROOT, load

from common import cli
from common.sampling_params import SamplingParams

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import gather

DOCUMENTS = markdown.documents()
GUIDES = (
    "README.md", "getting_started.md", "quick_reference.md", "development_plan.md", "roadmap.md",
    "milestone_checklist.md", "project_summary.md", "project_structure.md",
    "technical_comparison.md", "interview_guide.md",
)  # fmt: skip
QUICK_REFERENCE = ROOT / "docs" / "quick_reference.md"
# What stands for something else in a command, so that it cannot be run as it is.
PLACEHOLDER = re.compile(r"\.\.\.|…|\bmN|<[a-z]|\{|\|")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=DOCUMENTS, ids=name_of)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def local_links(document: Path) -> Iterator[tuple[str, Path, str]]:
    """(the link, the file it means, the anchor) of all links into the repository."""
    for link in markdown.links(document):
        if not re.match(r"[a-z]+:", link):
            file, _, anchor = unquote(link).partition("#")
            yield link, (document.parent / file).resolve() if file else document, anchor


class TestSet:
    def test_every_guide_is_there(self):
        assert {name for name in GUIDES if not (ROOT / "docs" / name).is_file()} == set()

    def test_each_milestone_has_its_documents(self, milestone):
        number = milestone[1]
        assert (ROOT / milestone / "README.md").is_file()
        assert (ROOT / "dev" / f"milestone_{number}.md").is_file()
        assert [*(ROOT / "learn").glob(f"{int(number) or 1:02}_*.md")]

    def test_every_document_is_reached_from_the_first(self):
        reached, waiting = set(), [ROOT / "README.md"]
        while waiting:
            document = waiting.pop()
            if document in reached:
                continue
            reached.add(document)
            for _, target, _ in local_links(document):
                file = target / "README.md" if target.is_dir() else target
                if file in DOCUMENTS:
                    waiting.append(file)
        assert {name_of(path) for path in DOCUMENTS} == {name_of(path) for path in reached}


class TestLinks:
    def test_what_is_linked_exists(self, document):
        assert [link for link, target, _ in local_links(document) if not target.exists()] == []

    def test_links_stay_in_the_repository(self, document):
        for link, target, _ in local_links(document):
            assert target.is_relative_to(ROOT), link

    def test_anchors_exist(self, document):
        for link, target, anchor in local_links(document):
            if anchor and target.suffix == ".md":
                assert anchor in markdown.anchors(target), link

    def test_pages_elsewhere_are_asked_for_safely(self, document):
        assert [link for link in markdown.links(document) if link.startswith("http:")] == []

    def test_links_of_notebooks_exist(self):
        for notebook in (ROOT / "learn").glob("*.py"):
            for link in markdown.LINK.findall(notebook.read_text(encoding="utf-8")):
                if not re.match(r"[a-z]+:|#", link) and "/" in link + "/":
                    assert (notebook.parent / link.partition("#")[0]).exists(), (notebook, link)


class TestForm:
    def test_one_title_at_the_top_and_no_level_left_out(self, document):
        levels = [level for level, _ in markdown.headings(document)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), levels

    def test_headings_have_numbers_signs(self, document):
        lines = markdown.prose(document)
        for before, line in itertools.pairwise(lines):
            is_underline = re.fullmatch(r"=+|-+", line.text) and before.text.strip()
            assert not is_underline, f"line {line.number}: write `## {before.text}`"

    def test_lines_are_short(self, document):
        """Up to 100 characters; tables, links and comments cannot be broken."""
        too_long = [
            line
            for line in markdown.lines(document)
            if len(line.text) > 100
            and line.language != "mermaid"
            and not re.match(r"\s*(\||<!--)", line.text)
            and not re.search(r"\]\(|https?://", line.text)
        ]
        assert too_long == []

    def test_code_has_its_language(self, document):
        opened = False
        for line in markdown.lines(document):
            if line.is_fence:
                opened = not opened
                assert line.language or not opened, f"line {line.number}: a fence without language"

    def test_white_space(self, document):
        text = document.read_text(encoding="utf-8")
        assert text.endswith("\n") and not text.endswith("\n\n")
        assert "\t" not in text and "\r" not in text
        assert [n for n, line in enumerate(text.split("\n"), 1) if line != line.rstrip()] == []


PATH = re.compile(r"(?:common|dev|docs|learn|tests|m\d_[a-z]+)/[\w./*-]*\w")


class TestNames:
    def test_files_exist(self, document):
        """Paths in code, with or without a pattern."""
        code = [*markdown.inline_code(document), *markdown.shell_commands(document)]
        for text in code:
            for path in PATH.findall(text):
                if not re.search(r"\bmN|0N|_N\b|\{", text):
                    assert [*ROOT.glob(path)], f"there is no {path}"

    def test_tests_exist(self, document):
        for text in markdown.inline_code(document):
            for name in re.findall(r"(?<![\w/*])test_\w+\.py", text):
                assert [*(ROOT / "tests").rglob(name)], f"there is no {name}"

    def test_python_in_documents_imports_what_exists(self, document):
        for code in markdown.fences(document, "python"):
            for module, names in re.findall(
                r"^ *from ((?:common|dev|m\d_[a-z]+)[\w.]*) import ([\w, ]+)", code, re.MULTILINE
            ):
                for name in names.split(","):
                    assert hasattr(importlib.import_module(module), name.strip()), (module, name)


class _Parsed(Exception):
    """The command line made sense; nothing of it has run."""


def check_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m`` and these words would not be refused by the module's parser."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", words)
        with pytest.raises(_Parsed):
            runpy.run_module(words[0], run_name="__main__")


TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


class TestCommands:
    @pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
    def test_commands_would_run(self, document, monkeypatch, capsys):
        """Modules exist and know the options; files and targets of make are there."""
        for command in dict.fromkeys(markdown.shell_commands(document)):
            if PLACEHOLDER.search(re.sub(r"#.*", "", command).split(" | ")[0]):
                continue
            for words in markdown.words_of(command):
                program, rest = Path(words[0]).name, words[1:]
                if program == "make":
                    assert set(rest[:1]) <= TARGETS, command
                elif program.startswith("python") and rest[:1] == ["-m"]:
                    if rest[1].split(".")[0] in ("common", "dev", *MILESTONES):
                        try:
                            check_module(rest[1:], monkeypatch)
                        except SystemExit:
                            pytest.fail(f"{command}\n{capsys.readouterr().err}")
                elif program.startswith("python") and rest[:1] and rest[0].endswith(".py"):
                    assert (ROOT / rest[0]).is_file(), command

    def test_commands_are_found(self):
        """The check above has something to check."""
        assert sum(len(markdown.shell_commands(document)) for document in DOCUMENTS) > 100


class TestQuickReference:
    def test_it_has_every_option_of_every_milestone(self):
        text = QUICK_REFERENCE.read_text(encoding="utf-8")
        for milestone in MILESTONES:
            parser = cli.build_parser(load(milestone).EngineConfig, "")
            for action in parser._actions:
                flags = [flag for flag in action.option_strings if flag.startswith("--")]
                assert any(flag in text for flag in flags), (milestone, flags)

    def test_it_names_no_other_options(self):
        known = {"--help"}
        for milestone in MILESTONES:
            parser = cli.build_parser(load(milestone).EngineConfig, "")
            known |= {flag for action in parser._actions for flag in action.option_strings}
        text = QUICK_REFERENCE.read_text(encoding="utf-8")
        table = text[text.index("## Run a milestone") : text.index("## Quantize")]
        assert set(re.findall(r"--[a-z][\w-]*", table)) <= known

    def test_since_when_options_exist(self):
        """The column "from" of the engine's options."""
        text = QUICK_REFERENCE.read_text(encoding="utf-8")
        rows = dict(re.findall(r"^\| `--([\w-]+)[^|]*\| (m\d)(?: only)? \|", text, re.MULTILINE))
        since: dict[str, str] = {}
        for milestone in MILESTONES:
            for field in dataclasses.fields(load(milestone).EngineConfig):
                since.setdefault(field.name, milestone[:2])
        named = {name.removeprefix("no-").replace("-", "_"): m for name, m in rows.items()}
        assert named == {name: m for name, m in since.items() if name != "seed"}

    def test_it_has_every_sampling_parameter(self):
        text = QUICK_REFERENCE.read_text(encoding="utf-8")
        for field in dataclasses.fields(SamplingParams):
            assert re.search(rf"\b{field.name}\b|--{field.name.replace('_', '-')}\b", text), field


class TestChecklist:
    def test_ticked_boxes_say_what_proves_it(self):
        checklist = ROOT / "docs" / "milestone_checklist.md"
        text = "\n".join(line.text for line in markdown.prose(checklist))
        boxes = re.findall(r"^- \[(.)\] (.*(?:\n  .*)*)", text, re.MULTILINE)
        assert {mark for mark, _ in boxes} == {" ", "x"}
        for mark, box in boxes:
            if mark == "x":
                assert re.search(r"\]\((\.\./(tests|learn|dev)/|results/)", box), box


class TestInterviewGuide:
    @pytest.mark.parametrize(
        "code", [*markdown.fences(ROOT / "docs" / "interview_guide.md", "python")]
    )
    def test_solutions_run(self, code):
        """Each by itself; their asserts hold."""
        assert "assert" in code
        exec(compile(code, "interview_guide.md", "exec"), {"__name__": __name__})


TREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


class TestSite:
    def test_every_document_has_a_page(self, tmp_path):
        site = gather.Site(tmp_path, notebooks=False, api=True)
        site.write()
        pages = {p.relative_to(site.folder).as_posix() for p in site.folder.rglob("*.md")}
        assert {name_of(path) for path in DOCUMENTS} - {"README.md"} < pages
        assert "index.md" in pages

    def test_every_page_is_in_the_contents(self, tmp_path):
        site = gather.Site(tmp_path, notebooks=False, api=True)
        site.write()
        listed = {"index.md"}
        for page in site.folder.rglob("*.md"):
            for tree in TREE.findall(page.read_text(encoding="utf-8")):
                for entry in filter(re.compile(r"[^:]").match, tree.splitlines()):
                    listed.add((page.parent / f"{entry}.md").relative_to(site.folder).as_posix())
        assert listed == {p.relative_to(site.folder).as_posix() for p in site.folder.rglob("*.md")}

    def test_links_lead_to_pages(self, tmp_path):
        site = gather.Site(tmp_path, notebooks=False, api=True)
        site.write()
        for page in site.folder.rglob("*.md"):
            for link in markdown.links(page):
                if not re.match(r"[a-z]+:|#|<", link):
                    target = page.parent / link.partition("#")[0]
                    assert target.is_file(), (page, link)

    def test_pictures_of_html_are_found_from_the_page(self, tmp_path, monkeypatch):
        page = tmp_path / "README.md"
        page.write_text('# T\n\n<img src="docs/images/a.svg" alt="a">\n', encoding="utf-8")
        (tmp_path / "docs" / "images").mkdir(parents=True)
        (tmp_path / "docs" / "images" / "a.svg").write_text("<svg/>", encoding="utf-8")
        monkeypatch.setattr(gather, "ROOT", tmp_path)
        site = gather.Site(tmp_path / "site", notebooks=False, api=False)
        site.write()
        assert (site.as_is / "docs" / "images" / "a.svg").is_file()

    def test_a_carried_file_is_shown_where_it_comes_from(self, tmp_path):
        site = gather.Site(tmp_path, notebooks=False, api=True)
        assert site._page_of("m4_flash/block_pool.py") == "api/m3_paged.block_pool.md"
        assert site._page_of("m5_chunked/scheduler.py") == "api/m5_chunked.scheduler.md"
        assert site._page_of("common/ops") == "api/common.ops.md"
        assert site._page_of("m5_chunked") == "m5_chunked/README.md"
        assert site._page_of("tests/support.py") is None

    def test_code_is_left_alone(self):
        text = "[a](b)\n```python\n[c](d)\n```\n[e](f)\n"
        changed = gather.outside_fences(text, lambda line: line.replace("(", "<"))
        assert changed == "[a]<b)\n```python\n[c](d)\n```\n[e]<f)\n"

    def test_docstrings_are_read_as_markdown(self):
        pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
        docstrings = importlib.import_module("docstrings")
        code = ["Text.", "", "    x = 1", "", "More::", "", "    y = 2", "", "- one", "", "    two"]
        marked = list(docstrings._mark_code(code))
        assert marked.count("::") == 1 and marked.index("::") < marked.index("    x = 1")
        named = ["bits: 2 or 4. size: so many", "    inputs", "sym: middle"]
        assert list(docstrings._mark_lists(named)) == [
            "- bits: 2 or 4. size: so many", "  inputs", "- sym: middle"
        ]  # fmt: skip
        prose = ["Note: this is", "a sentence."]
        assert list(docstrings._mark_lists(prose)) == prose

    @pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "mermaidx")),
        reason="the packages of the extra `docs` are not installed",
    )
    def test_it_builds_without_a_warning(self, tmp_path):
        """Without what takes long: executed notebooks and imported modules."""
        done = subprocess.run(
            [sys.executable, str(ROOT / "docs" / "build.py"), "--no-notebooks", "--no-api",
             "--output", str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "html" / "index.html").is_file()
