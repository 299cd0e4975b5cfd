"""The difference of two milestones: complete, in the READMEs' order, and as they say.

On the milestones themselves: every line of both is accounted for, and what stagediff finds is what
the READMEs claim. On made-up ones: what exactly is shown for a given change.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MILESTONES, ROOT

from dev.stagediff import cli, highlight, html, notes, rows, sizes, units
from dev.stagediff.reading import MOVED, Reading, full_path, read
from dev.stagediff.stages import ADDED, CARRIED, CHANGED, REMOVED, Stage, classify, find_stages

STAGES = find_stages()
STEPS = [*pairwise(STAGES)]
PAIRS = [*STEPS, (STAGES[0], STAGES[-1]), (STAGES[1], STAGES[-2])]


@cache
def between(old: Stage, new: Stage) -> Reading:
    """Reading two milestones takes a while: once for all tests."""
    return read(old, new, STAGES)


def name_of(pair: tuple[Stage, Stage]) -> str:
    return "-".join(stage.short for stage in pair)


@pytest.fixture(params=STEPS, ids=name_of)
def step(request):
    return request.param


@pytest.fixture(params=PAIRS, ids=name_of)
def reading(request):
    return between(*request.param)


def test_the_stages_are_the_milestones():
    assert tuple(stage.name for stage in STAGES) == MILESTONES


class TestReadmes:
    """What a README says changed is what changed, and it says why."""

    def test_classification(self, step):
        old, new = step
        listed = {name: entry.change for name, entry in new.readme.entries.items()}
        assert listed == classify(old, new)

    def test_the_first_one_adds_everything(self):
        entries = STAGES[0].readme.entries
        assert {name: entry.change for name, entry in entries.items()} == classify(None, STAGES[0])

    def test_every_file_that_differs_has_a_reason_of_one_line(self, step):
        for file in between(*step).differing:
            (reason,) = file.reasons
            assert reason.change == file.change
            assert reason.text or file.change == REMOVED, file.path
            assert "\n" not in reason.text

    def test_what_to_read_names_something_that_differs_and_comes_first(self, step):
        files = between(*step).files
        named = [file for file in files if file.steps]
        assert named
        assert any(file.change != CARRIED for file in named)
        assert next(file for file in files if file.change != CARRIED).steps[0].number == 1
        numbers = [file.steps[0].number for file in named if file.change != CARRIED]
        assert numbers == sorted(numbers)

    def test_every_path_in_what_to_read_exists(self, step):
        paths = [*classify(*step)]
        for item in step[1].readme.reading:
            for name in item.names:
                if re.fullmatch(r"[\w/]+\.(py|cu)", name):
                    found = full_path(name, paths) or (ROOT / name).is_file()
                    assert found, (step[1].name, name)

    def test_every_step_has_a_note_that_explains_some_of_it(self, step):
        explained = [file for file in between(*step).differing if file.sections]
        assert explained, step[1].name


class TestNothingIsLost:
    def test_both_versions_can_be_put_together_again(self, reading):
        """Every line of either version is in exactly one row, with its number and its text."""
        found: dict[str, dict[str, list]] = {"old": {}, "new": {}}
        for file in reading.files:
            for unit in file.units:
                source = unit.place.path if unit.place else file.path
                for row in unit.rows:
                    if row.old:
                        found["old"].setdefault(source, []).append(row.old)
                    if row.new:
                        found["new"].setdefault(file.path, []).append(row.new)
        for side, stage in (("old", reading.old), ("new", reading.new)):
            for path, text in stage.files.items():
                lines = sorted(found[side].get(path, []))
                assert [number for number, _ in lines] == list(range(1, len(lines) + 1)), path
                # A function that moved may be indented otherwise than it was.
                assert [line.strip() for _, line in lines] == [
                    line.strip() for line in text.splitlines()
                ], path

    def test_sizes_add_up(self, reading):
        size = reading.size
        for stage, lines in (
            (reading.old, size.removed + size.carried),
            (reading.new, size.added + size.carried),
        ):
            assert lines == sum(len(text.splitlines()) for text in stage.files.values())

    def test_what_is_carried_has_no_change(self, reading):
        assert all(not file.shown_units for file in reading.carried)
        assert all(file.shown_units or not file.units for file in reading.differing)

    def test_every_visible_change_is_in_a_hunk(self, reading):
        for file in reading.differing:
            for unit in file.units:
                shown = [row for hunk in rows.hunks(unit.rows, 0) for row in hunk]
                assert [row for row in shown if row.is_visible_change] == [
                    row for row in unit.rows if row.is_visible_change
                ]


LINES = st.lists(st.sampled_from(["a = 1", "b = 2", "    return a", "", "(", "def f(a, b):", "x"]))


def numbered(lines: list[str]) -> list[tuple[int, str]]:
    return list(enumerate(lines, start=1))


class TestRows:
    @given(LINES, LINES)
    def test_each_side_keeps_its_lines_in_order(self, old, new):
        found = rows.compare(numbered(old), numbered(new))
        assert [row.old for row in found if row.old] == numbered(old)
        assert [row.new for row in found if row.new] == numbered(new)
        assert (old == new) == all(row.is_equal for row in found)

    @given(st.text("ab (", max_size=12), st.text("ab (", max_size=12))
    def test_what_is_not_marked_is_the_same(self, old, new):
        spans = rows.changed_words(old, new)
        left = [
            "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in marks))
            for text, marks in zip((old, new), spans, strict=True)
        ]
        assert left[0] == left[1]

    def test_words_that_changed(self):
        old, new = "    if pool.num_free < 3:", "    if cache.num_free <= 3:"
        (row,) = rows.compare([(7, old)], [(9, new)])
        assert [old[a:b] for a, b in row.old_spans] == ["pool"]
        assert [new[a:b] for a, b in row.new_spans] == ["cache", "="]

    def test_unlike_lines_have_no_words_in_common(self):
        (row,) = rows.compare([(1, "import torch")], [(1, "x = [y for y in z]")])
        assert not row.is_equal
        assert row.old_spans == row.new_spans == ()

    def test_context_and_gaps(self):
        old = [f"line {i}" for i in range(20)]
        new = [*old[:5], "something else", *old[6:15], *old[16:]]
        runs = rows.hunks(rows.compare(numbered(old), numbered(new)), context=1)
        assert [[row.new and row.new[1] for row in run] for run in runs] == [
            ["line 4", "something else", "line 6"],
            ["line 14", None, "line 16"],
        ]

    def test_a_hunk_ends_where_another_unit_stands_between(self):
        before, after = [(8, "a"), (9, "b")], [(20, "c"), (21, "d")]
        found = rows.compare([*before, *after], [*before, (20, "x"), (21, "d")])
        (run,) = rows.hunks(found, context=3)
        assert [row.new for row in run] == [(20, "x"), (21, "d")]

    def test_blank_lines_at_the_ends_are_left_out(self):
        old, new = ["a", "", "b", "", "c"], ["a", "", "other", "", "c"]
        (run,) = rows.hunks(rows.compare(numbered(old), numbered(new)), context=1)
        assert [row.new[1] for row in run] == ["other"]

    def test_blank_lines_hold_nothing_together(self):
        found = rows.compare(numbered(["", "", "kept"]), numbered(["kept", "", ""]))
        assert [row.new[1] for row in found if row.is_equal] == ["kept"]

    def test_a_change_of_blank_lines_is_none(self):
        found = rows.compare(numbered(["a", "b"]), numbered(["a", "", "b"]))
        assert not all(row.is_equal for row in found)
        assert rows.hunks(found, context=3) == []


class TestUnits:
    SOURCE = '''"""Doc."""
import os

# Above the constant.
X = 1


# Above the class.
@decorated
class A:
    """Of A."""

    y: int = 0

    # Above the method.
    @property
    def m(self):
        def inner():
            pass
        return inner

    @m.setter
    def m(self, value):
        pass


if X:
    def f(): pass
else:
    async def g(): pass

Y = 2
'''

    def test_every_line_belongs_to_one(self):
        found = units.split("a.py", self.SOURCE)
        numbers = sorted(number for unit in found for number in unit.numbers)
        assert numbers == list(range(1, len(self.SOURCE.splitlines()) + 1))

    def test_names_and_places(self):
        found = {unit.key: unit for unit in units.split("a.py", self.SOURCE)}
        assert set(found) == {("", 0), ("A", 0), ("A.m", 0), ("A.m", 1), ("f", 0), ("g", 0)}
        assert "    # Above the method." in found["A.m", 0].lines
        assert "        return inner" in found["A.m", 0].lines
        assert {"# Above the class.", "    y: int = 0"} <= set(found["A", 0].lines)
        assert found["A", 0].lines[:3] == ("", "", "# Above the class.")
        assert found["", 0].lines[-1] == "Y = 2"
        assert {"# Above the constant.", "X = 1", "Y = 2"} <= set(found["", 0].lines)

    @pytest.mark.parametrize("path", ["kernel.cu", "broken.py"])
    def test_what_cannot_be_parsed_is_one(self, path):
        (unit,) = units.split(path, "int f( {\n}\n")
        assert unit.numbers == (1, 2)


@pytest.fixture
def made_up(tmp_path):
    """``made_up(files of m0, files of m1, ...)``: milestones in a folder of their own."""

    def make(*milestones: dict[str, str]) -> tuple[Path, list[Stage]]:
        for i, files in enumerate(milestones):
            folder = tmp_path / f"m{i}_x"
            for name, text in {"__init__.py": '"""M."""\n', **files}.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return tmp_path, find_stages(tmp_path)

    return make


def compared(made: tuple[Path, list[Stage]], old: int = 0, new: int = 1) -> Reading:
    root, stages = made
    return read(stages[old], stages[new], stages, root)


def shown(reading: Reading, path: str) -> dict[str, str]:
    """What became of the units of a file that are shown, by name."""
    (file,) = (file for file in reading.files if file.path == path)
    return {unit.name: unit.change for unit in file.shown_units}


BODY = """    one = first(x)
    two = second(one)
    three = third(two)
    four = fourth(three)
    return four
"""


class TestReading:
    def test_a_method_has_its_qualified_name(self, made_up):
        old = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
        reading = compared(made_up({"a.py": old}, {"a.py": old.replace("2", "3")}))
        assert shown(reading, "a.py") == {"A.g": CHANGED}
        assert reading.size == rows.Size(added=1, removed=1, carried=6)

    def test_functions_in_another_order_are_the_same(self, made_up):
        f, g = "def f():\n    return 1\n", "def g():\n    return 2\n"
        reading = compared(made_up({"a.py": f"{f}\n\n{g}"}, {"a.py": f"{g}\n\n{f}"}))
        assert shown(reading, "a.py") == {}

    def test_a_function_that_moved(self, made_up):
        """Into another file, into a class, under another name: its lines are carried."""
        method = "".join(f"    {line}\n" for line in BODY.splitlines())
        reading = compared(
            made_up(
                {"a.py": f"def f(x):\n{BODY}\n\ndef stays():\n    pass\n"},
                {
                    "a.py": "def stays():\n    pass\n",
                    "b.py": f"class B:\n    def _g(x):\n{method}",
                },
            )
        )
        assert shown(reading, "a.py") == {"f": MOVED}
        (file,) = (file for file in reading.files if file.path == "b.py")
        (moved,) = (unit for unit in file.units if unit.change == MOVED)
        assert (moved.name, moved.place.path, moved.place.name) == ("B._g", "a.py", "f")
        assert moved.size == rows.Size(added=1, removed=1, carried=5)

    def test_a_function_that_is_new_has_not_moved(self, made_up):
        other = BODY.replace("first", "a").replace("second", "b").replace("third", "c")
        reading = compared(
            made_up(
                {"a.py": f"def f(x):\n{BODY}"},
                {"a.py": "", "b.py": f"def f(x):\n{other.replace('fourth(three)', '0')}"},
            )
        )
        assert shown(reading, "a.py") == {"f": REMOVED}

    def test_a_class_under_another_name(self, made_up):
        old = "class Old:\n    def __init__(self):\n        self.x = 1\n\n    def f(self): ...\n"
        new = old.replace("Old", "New").replace("= 1", "= 2")
        (file, _) = compared(made_up({"a.py": old}, {"a.py": new})).files
        assert [(u.name, u.change, u.place and u.place.name) for u in file.shown_units] == [
            ("New", CHANGED, "Old"),
            ("New.__init__", CHANGED, "Old.__init__"),
        ]

    def test_order(self, made_up):
        """As "What to read" says; then what changed, is new, is gone; then what is carried."""
        readme = """# m1: made up

## What to read

1. `z.py`: first.
2. `only_here`, a function whose file is not named.

## Files

- changed `z.py`: because
"""
        old = {"a.py": "1\n", "gone.py": "1\n", "same.py": "1\n", "y.py": "1\n", "z.py": "1\n"}
        new = {
            "README.md": readme, "a.py": "2\n", "new.py": "1\n", "same.py": "1\n",
            "y.py": "def only_here(): ...\n", "z.py": "2\n",
        }  # fmt: skip
        reading = compared(made_up(old, new))
        order = ["z.py", "y.py", "a.py", "new.py", "gone.py", "same.py", "__init__.py"]
        assert [file.path for file in reading.files] == order
        assert reading.files[0].reasons[0].text == "because"
        assert [step.number for step in reading.files[1].steps] == [2]

    def test_a_path_may_be_short_where_only_one_is_meant(self):
        paths = ["a.py", "sub/a.py", "sub/b.py", "one/c.py", "two/c.py"]
        assert [full_path(name, paths) for name in ("a.py", "b.py", "c.py", "y.py")] == [
            "a.py", "sub/b.py", None, None,
        ]  # fmt: skip

    def test_reasons_of_the_milestones_between(self, made_up):
        def readme(number: int) -> str:
            return f"# m{number}\n\n## Files\n\n- changed `a.py`: reason {number}\n"

        made = made_up(*({"a.py": f"{i}\n", "README.md": readme(i)} for i in range(4)))
        reasons = compared(made, 1, 3).files[0].reasons
        assert [(reason.stage, reason.text) for reason in reasons] == [
            ("m2", "reason 2"),
            ("m3", "reason 3"),
        ]

    def test_order_of_the_milestones_between(self, made_up):
        """Those that only an older README wants read come next; the item is that README's."""

        def readme(name: str) -> str:
            return f"# m\n\n## What to read\n\n1. `{name}`: look.\n"

        made = made_up(
            *(
                {"a.py": f"{i}\n", "b.py": f"{i}\n", "c.py": f"{i}\n", "README.md": readme(name)}
                for i, name in enumerate(["a.py", "c.py", "b.py"])
            )
        )
        files = compared(made, 0, 2).differing
        assert [file.path for file in files] == ["b.py", "c.py", "a.py"]
        assert [len(file.steps) for file in files] == [1, 0, 0]

    def test_a_file_by_the_end_of_its_path(self, made_up):
        files = {"a.py": "1\n", "sub/b.py": "1\n", "one/c.py": "1\n", "two/c.py": "1\n"}
        reading = compared(made_up({}, files))
        for name in ("b.py", "sub/b.py", "m1_x/sub/b.py", "./b.py"):
            assert [file.path for file in reading.only([name]).files] == ["sub/b.py"]
        with pytest.raises(ValueError, match=r"one/c\.py, two/c\.py: write more"):
            reading.only(["c.py"])
        with pytest.raises(ValueError, match=r"has a file 'd\.py'; there are: .*a\.py"):
            reading.only(["d.py"])

    def test_a_file_that_is_no_text(self, made_up):
        made = made_up({}, {})
        (made[0] / "m1_x" / "picture.png").write_bytes(b"\x89PNG\xff")
        with pytest.raises(ValueError, match=r"picture.png is not text"):
            compared(made)


NOTE = """# Note 1

## 1. The pool

`a.py` has `A.f` and `helper()`.

### What `helper` does

```python
## not a heading
def helper(): ...
```

## 2. The pool

Nothing. `A`, `f`.

## 14. How others do it

Their `a.py` has a `helper` too.
"""


class TestNotes:
    @pytest.fixture
    def sections(self, tmp_path):
        path = tmp_path / "01_note.md"
        path.write_text(NOTE, encoding="utf-8")
        return notes.read_sections(path)

    def test_headings_and_anchors(self, sections):
        """As GitHub makes them; what is about others is left out."""
        assert [(s.heading, s.anchor, s.line) for s in sections] == [
            ("1. The pool", "1-the-pool", 3),
            ("1. The pool: What helper does", "what-helper-does", 7),
            ("2. The pool", "2-the-pool", 14),
        ]

    def test_who_is_named_where(self, sections):
        found = notes.Notes(sections)
        assert [s.line for s in found.about_file("a.py")] == [3]
        assert [s.line for s in found.about_file("sub/a.py")] == [3]
        assert found.about_file("b.py") == []
        assert [s.line for s in found.about_unit("a.py", "helper", True)] == [3, 7]
        assert [s.line for s in found.about_unit("a.py", "helper", False)] == [3]
        assert [s.line for s in found.about_unit("a.py", "A.f", False)] == [3, 14]
        assert found.about_unit("b.py", "B.f", False) == []

    def test_every_section_has_an_anchor_of_its_own(self):
        for path in sorted((ROOT / "learn").glob("0*.md")):
            anchors = [section.anchor for section in notes.read_sections(path)]
            assert anchors
            assert len(set(anchors)) == len(anchors)


class TestSizes:
    def test_code_without_comments_and_docstrings(self):
        source = '''"""Of the module,
two lines."""

import os  # counts


def f(x):
    """Of f."""
    # no
    y = """this
    is a value"""
    return (
        x

    )


class A:
    z = 1
    """Of z."""
'''
        # import, def, y and its second line, return with three lines, class, z
        assert sizes.code_lines("a.py", source) == 9

    def test_other_languages(self):
        source = "#include <a>\n// no\nint f() { /* no\n no */ return 1;\n}\n\n"
        assert sizes.code_lines("a.cu", source) == 4
        assert sizes.code_lines("a.unknown", "one\n\ntwo\n") == 2

    def test_a_step(self, made_up):
        root, stages = made_up(
            {"a.py": "x = 1\n# c\n", "b.py": "y = 1\n"},
            {"a.py": "x = 2\n# c\nz = 3\n", "c.py": "w = 1\n"},
        )
        first, second = sizes.step_sizes(stages, root)
        assert first.old is None
        assert first.files == {ADDED: 3}
        assert (first.lines, first.total_code) == (rows.Size(added=4), 2)
        assert second.files == {ADDED: 1, CHANGED: 1, CARRIED: 1, REMOVED: 1}
        assert second.lines == rows.Size(added=3, removed=2, carried=2)
        assert (second.total_lines, second.total_code, second.code_gained) == (5, 3, 1)

    def test_all_steps(self):
        found = sizes.step_sizes(STAGES)
        assert [size.new for size in found] == STAGES
        gained = sum(size.code_gained for size in found)
        assert gained == found[-1].total_code == sizes.code_of(STAGES[-1])


class TestHighlight:
    def test_pieces_are_the_text(self):
        for path, text in STAGES[-1].files.items():
            lines = highlight.lines_of(path, text)
            assert ["".join(p.text for p in line) for line in lines] == text.split("\n"), path

    def test_marks_cut_pieces(self):
        pieces = [highlight.Piece("abc", "name"), highlight.Piece("def", "")]
        found = [(p.text, p.kind, p.is_marked) for p in highlight.marked(pieces, [(1, 4)])]
        assert found == [
            ("a", "name", False), ("bc", "name", True), ("d", "", True), ("ef", "", False),
        ]  # fmt: skip

    @pytest.mark.parametrize("palette", [highlight.LIGHT, highlight.DARK], ids=["light", "dark"])
    def test_every_colour_can_be_read_on_every_background(self, palette):
        for kind, colour in palette.text.items():
            for background in palette.backgrounds:
                assert highlight.contrast(colour, background) >= 4.5, (kind, background)

    def test_contrast_is_that_of_the_standard(self):
        assert highlight.contrast("#000000", "#ffffff") == pytest.approx(21)
        assert highlight.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


VOID = {"meta", "input", "col", "img", "br", "hr"}


class Page(HTMLParser):
    """What a page has: ids, links, pictures, text, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.sources, self.open = Counter(), [], [], []
        self.loads, self.words = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update([attrs["id"]] if "id" in attrs else [])
        self.links += [attrs["href"]] if tag == "a" else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.loads += [tag] if tag in ("link", "iframe", "object", "embed") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder, and what lies in it: the reading, the text and the parsed page of some steps."""
    folder = tmp_path_factory.mktemp("pages")
    readings = [between(*pair) for pair in (STEPS[0], STEPS[2], PAIRS[-1])]
    texts = [html.render(reading, 3, False, folder) for reading in readings]
    return folder, [(*both, Page(both[1])) for both in zip(readings, texts, strict=True)]


class TestPage:
    def test_it_needs_nothing_else(self, pages):
        for _, text, page in pages[1]:
            assert page.loads == []
            assert all(source.startswith("data:") for source in page.sources)
            style = text[text.index("<style>") : text.index("</style>")]
            assert "url(" not in style
            assert "@import" not in style
            script = text[text.index("<script>") : text.index("</script>")]
            assert not re.search(r"fetch|XMLHttp|import\(|https?:", script)

    def test_links_lead_somewhere(self, pages):
        folder, texts = pages
        for _, _, page in texts:
            assert max(page.ids.values()) == 1, page.ids.most_common(3)
            for link in page.links:
                target, _, anchor = link.partition("#")
                if not target:
                    assert anchor in page.ids, link
                elif "://" not in target:
                    assert (folder / target).resolve().exists(), link

    def test_it_has_every_file_and_reason_and_note(self, pages):
        for reading, _, page in pages[1]:
            words = " ".join("".join(page.words).split())
            for file in reading.files:
                assert f"file-{file.path.replace('/', '-')}" in page.ids
                for reason in file.reasons:
                    assert reason.text.replace("`", "") in words or "*" in reason.text, reason
                for section in file.sections:
                    assert f"note-{section.number}-{section.anchor}" in page.ids

    def test_code_is_escaped(self, made_up):
        root, _ = made = made_up({"a.py": "x = 1\n"}, {"a.py": "x = '<script>&'\n"})
        text = html.render(compared(made), 3, False, root, root)
        assert "<script>&" not in text
        assert "x = '<script>&'" in "".join(Page(text).words)

    def test_it_is_written_where_it_was_asked_for(self, made_up, tmp_path):
        root, _ = made = made_up({"a.py": "x = 1\n"}, {"a.py": "x = 2\n"})
        place = tmp_path / "new folder" / "page.html"
        html.write_page(place, compared(made), 3, True, root)
        assert place.read_text("utf-8").startswith("<!doctype html>")
        with pytest.raises(ValueError, match="is a folder"):
            html.write_page(place.parent, compared(made), 3, True, root)


class TestCommandLine:
    @pytest.fixture
    def root(self, made_up):
        readme = "# m1: made up\n\n## Files\n\n- changed `a.py`: a better number\n- added `b.py`\n"
        return made_up(
            {"a.py": "def f():\n    return 1\n", "same.py": "1\n"},
            {
                "a.py": "def f():\n    return 2\n", "same.py": "1\n", "README.md": readme,
                "b.py": 'def g():\n    """What g does."""\n    return [1]\n',
            },
            {},
        )[0]  # fmt: skip

    @pytest.fixture
    def run(self, root, capsys):
        def run(*argv: str) -> tuple[int, str, str]:
            code = cli.main(argv, root)
            out, err = capsys.readouterr()
            return code, out, " ".join(err.split())

        return run

    @pytest.mark.parametrize("names", [("m0", "m1"), ("m0_x", "m1_x/"), ("0", "1"), ("m1",)])
    def test_a_step(self, run, names):
        code, out, _ = run(*names)
        assert code == 0
        assert "m0_x → m1_x  m1: made up" in out
        assert "m1 changed: a better number" in out
        assert "    2      -     return 1\n         2 +     return 2\n" in out
        assert "    1 g  What g does." in out  # an outline
        assert "return [1]" not in out
        assert "same.py" in out

    def test_full_and_one_file(self, run):
        assert "+     return [1]" in run("m0", "m1", "--full")[1]
        out = run("m0", "m1", "b.py")[1]
        assert "+     return [1]" in out
        assert "a better number" not in out

    def test_context(self, run):
        assert "def f" in run("m0", "m1", "a.py")[1]
        assert "def f" not in run("m0", "m1", "a.py", "--context", "0")[1]

    def test_colours(self, run):
        assert "\x1b[" not in run("m0", "m1", "--color", "never")[1]
        always = ("m0", "m1", "--color", "always", "--theme")
        dark, light = (run(*always, theme)[1] for theme in ("dark", "light"))
        assert "\x1b[" in dark
        assert dark != light

    def test_sizes(self, run):
        out = run("--stat")[1]
        assert re.search(r"m0_x\s+3 \s*3\s+–\s+–\s+–\s+4\s+–\s+–\s+4\s+3\s+\+3", out)
        assert re.search(r"m0 → m1_x\s+4 \s*1\s+1\s+2\s+–\s+4\s+1\s+3\s+7\s+5\s+\+2", out)
        out = run("m1", "--stat")[1]
        assert re.search(r"a\.py\s+changed\s+1\s+1\s+1\s+\+0\s+a better number", out)

    def test_a_page(self, run, root):
        code, out, _ = run("m0", "m1", "--html", str(root / "page.html"))
        assert (code, (root / "page.html").is_file()) == (0, True)
        assert "m0_x → m1_x" in out

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "name two milestones, as in `m3 m4`; there are: m0_x, m1_x, m2_x"),
            (["m0", "m9"], "there is no milestone 'm9'; there are: m0_x, m1_x, m2_x"),
            (["paged"], "there is no milestone 'paged'; there are: m0_x, m1_x, m2_x"),
            (["m0"], "m0_x is the first milestone"),
            (["m2", "m1"], "m2_x comes after m1_x; the older one goes first: m1 m2"),
            (["m1", "m1_x"], "m1_x and m1_x are the same milestone"),
            (["m0", "m1", "c.py"], "neither m0_x nor m1_x has a file 'c.py'; there are: a.py"),
            (["--stat", "--html", "x.html"], "--html shows two milestones"),
        ],
    )
    def test_bad_names(self, run, argv, message):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {message}")

    def test_no_milestones_at_all(self, tmp_path, capsys):
        assert cli.main(["m1"], tmp_path) == 2
        assert "there are: none here" in capsys.readouterr().err
