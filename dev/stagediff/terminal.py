"""The reading in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dev.stagediff.highlight import Palette, lines_of, marked, shifted
from dev.stagediff.notes import Section
from dev.stagediff.outline import outline
from dev.stagediff.reading import MOVED, FileChange, Reading, UnitChange
from dev.stagediff.rows import Numbered, Row, Size, Span, hunks
from dev.stagediff.sizes import StepSize, code_gained
from dev.stagediff.stages import ADDED, CARRIED, CHANGED, REMOVED
from dev.stagediff.units import CLASS

_STYLES = {ADDED: "green", CHANGED: "yellow", REMOVED: "red", MOVED: "cyan", CARRIED: "dim"}


class Printer:
    """Prints a reading.

    Args:
        context: unchanged lines around a change.
        is_full: whether files that are new or gone are shown whole, or as an outline.
    """

    def __init__(
        self, console: Console, reading: Reading, palette: Palette, context: int, is_full: bool
    ) -> None:
        self._console = console
        self._reading = reading
        self._palette = palette
        self._context = context
        self._is_full = is_full

    def show(self) -> None:
        """Everything: what to read, each file, and the names of those that are carried."""
        self._show_head()
        files = self._reading.differing
        for number, file in enumerate(files, start=1):
            self._show_file(file, f"{number}/{len(files)}")
        carried = self._reading.carried
        if carried:
            self._console.print(Rule(f"[dim]carried, byte for byte: {len(carried)}[/dim]"))
            self._print(Text(", ".join(file.path for file in carried), "dim"))

    def _print(self, text: Text | str = "") -> None:
        # The terminal wraps, not rich: a line of code stays one line for copying and for pipes.
        self._console.print(text, soft_wrap=True, highlight=False)

    def _show_head(self) -> None:
        old, new = self._reading.old, self._reading.new
        self._print(Text.assemble((f"{old.name} → {new.name}", "bold"), f"  {new.readme.title}"))
        self._print(_size_text(self._reading.size))
        for step in new.readme.reading:
            self._print(Text(f"  {step.number}. {step.text}"))

    def _show_file(self, file: FileChange, place: str) -> None:
        self._print()
        title = Text.assemble(
            f"{place}  ", (file.path, "bold"), "  ", (file.change, _STYLES[file.change])
        )
        self._console.print(Rule(Text.assemble(title, "  ", _size_text(file.size)), align="left"))
        for reason in file.reasons:
            self._print(Text(f"{reason.stage} {reason.change}: {reason.text or '(no reason)'}"))
        self._show_sections(file.sections)
        if file.change == CHANGED or self._is_full:
            for unit in file.shown_units:
                self._show_unit(file, unit)
        else:
            self._show_outline(file)

    def _show_sections(self, sections: Iterable[Section], indent: str = "") -> None:
        for section in sections:
            where = f"{_relative(section.note)}:{section.line}"
            self._print(Text.assemble((f"{indent}{section.label}  ", "italic"), (where, "dim")))

    def _show_outline(self, file: FileChange) -> None:
        for line in outline(file):
            name = f"class {line.name}" if line.kind == CLASS else line.name
            self._print(
                Text.assemble(
                    (f"{line.number:5} ", "dim"), "    " * line.depth, (name, "bold"),
                    f"  {line.summary}",
                )
            )  # fmt: skip
        moved = [unit for unit in file.units if unit.change == MOVED and unit.place]
        for unit in moved:
            self._print(Text(f"      {_moved_text(unit)}", "cyan"))
        self._print(Text("      (--full shows the code)", "dim"))

    def _show_unit(self, file: FileChange, unit: UnitChange) -> None:
        self._print()
        name = unit.name or ("module" if file.path.endswith(".py") else file.path)
        style = _STYLES[unit.change]
        head = Text.assemble((f"{name}", f"bold {style}"), "  ", (unit.change, style))
        if unit.place:
            head.append(f"  {_moved_text(unit)}", "cyan")
        if unit.rows:
            head.append("  ").append_text(_size_text(unit.size))
        self._print(head)
        self._show_sections(unit.sections, indent="  ")
        old_path = unit.place.path if unit.place and unit.rows else file.path
        old = lines_of(old_path, self._reading.old.files.get(old_path, ""))
        new = lines_of(file.path, self._reading.new.files.get(file.path, ""))
        for i, hunk in enumerate(hunks(unit.rows, self._context)):
            if i:
                self._print(Text("           ⋮", "dim"))
            width = max(len(text) for row in hunk for _, text in filter(None, (row.old, row.new)))
            for sign, row in unified(hunk):
                self._print(self._line(sign, row, old, new, width))

    def _line(
        self, sign: str, row: Row, old: Sequence[tuple], new: Sequence[tuple], width: int
    ) -> Text:
        """One line with its numbers; the background is as wide as the hunk's longest line."""
        palette = self._palette
        background, word = {
            "-": (palette.removed, palette.removed_word),
            "+": (palette.added, palette.added_word),
            " ": (None, None),
        }[sign]
        line, spans, source = _side(row, sign, old, new)
        numbers = "".join(
            f"{side[0] if side else '':>5}"
            for side in (row.old if sign != "+" else None, row.new if sign != "-" else None)
        )
        number_style = "dim" if sign == " " else _STYLES[_CHANGE_OF[sign]]
        body = Text()
        for piece in marked(shifted(source, line[1]), spans):
            ground = word if piece.is_marked else background
            colour = palette.text[piece.kind or "text"]
            # Plain text on the terminal's own background keeps the terminal's own colour.
            style = f"{colour} on {ground}" if ground else colour if piece.kind else ""
            body.append(piece.text, style)
        if background and self._console.color_system:
            body.append(" " * (width - len(line[1])))
            body.stylize_before(f"on {background}")
        return Text.assemble((f"{numbers} {sign} ", number_style), body)


_CHANGE_OF = {"+": ADDED, "-": REMOVED}


def _side(
    row: Row, sign: str, old: Sequence[tuple], new: Sequence[tuple]
) -> tuple[Numbered, tuple[Span, ...], tuple]:
    """The line that a sign shows, its changed words and its pieces."""
    if sign == "-":
        return row.old, row.old_spans, old[row.old[0] - 1]
    return row.new, row.new_spans, new[row.new[0] - 1]


def unified(hunk: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """The lines of a hunk below each other: of each run of changes first what is gone."""
    run: list[Row] = []
    for row in [*hunk, None]:
        if row is not None and not row.is_equal:
            run.append(row)
            continue
        yield from (("-", changed) for changed in run if changed.old)
        yield from (("+", changed) for changed in run if changed.new)
        run = []
        if row is not None:
            yield " ", row


def _moved_text(unit: UnitChange) -> str:
    where = f"{unit.place.name} of {unit.place.path}"
    return f"was {where}" if unit.rows else f"is now {where}"


def _size_text(size: Size) -> Text:
    return Text.assemble((f"+{size.added}", "green"), " ", (f"−{size.removed}", "red"))


def _relative(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def show_steps(console: Console, sizes: Sequence[StepSize]) -> None:
    """A table of all steps."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("step", no_wrap=True)
    for name in ("files", "added", "changed", "carried", "removed"):
        table.add_column(name, justify="right")
    for name in ("+ lines", "− lines", "carried", "lines", "of code", "more"):
        table.add_column(name, justify="right")
    for size in sizes:
        name = f"{size.old.short} → {size.new.name}" if size.old else size.new.name
        files = size.files
        table.add_row(
            name,
            f"{sum(files.values()) - files[REMOVED]}",
            *(f"{files[change] or '–'}" for change in (ADDED, CHANGED, CARRIED, REMOVED)),
            f"[green]{size.lines.added:,}[/green]",
            f"[red]{size.lines.removed:,}[/red]" if size.lines.removed else "–",
            f"{size.lines.carried:,}" if size.lines.carried else "–",
            f"{size.total_lines:,}",
            f"{size.total_code:,}",
            f"{size.code_gained:+,}",
        )
    console.print(table)
    _explain(console)


def show_files(console: Console, reading: Reading) -> None:
    """A table of the files of one step."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file", no_wrap=True)
    table.add_column("")
    for name in ("+ lines", "− lines", "carried", "more code"):
        table.add_column(name, justify="right")
    table.add_column("why", ratio=1)
    for file in reading.differing:
        size = file.size
        table.add_row(
            escape(file.path),
            Text(file.change, _STYLES[file.change]),
            f"{size.added:,}",
            f"{size.removed:,}",
            f"{size.carried:,}",
            f"{code_gained(reading, file.path):+,}",
            Text("; ".join(reason.text for reason in file.reasons if reason.text)),
        )
    size = reading.size
    table.add_row(
        f"{len(reading.carried)} carried files", "", "", "",
        f"{sum(file.size.carried for file in reading.carried):,}", "", "", style="dim",
    )  # fmt: skip
    table.add_row(
        "all", "", f"{size.added:,}", f"{size.removed:,}", f"{size.carried:,}", "", "",
        style="bold",
    )  # fmt: skip
    console.print(table)
    _explain(console)


def _explain(console: Console) -> None:
    console.print(
        "A changed line counts as one added and one removed; lines of a function that moved count "
        "as carried. Code: lines without comments, docstrings and blank ones.",
        style="dim",
        highlight=False,
    )
