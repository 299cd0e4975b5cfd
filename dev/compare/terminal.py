"""The comparison in the terminal: the figures, what changed, and whether the claims are held."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dev.bench.report import Report
from dev.compare.changes import (
    BETTER,
    SAME,
    WORSE,
    change,
    changes,
    is_busy,
    noise,
    pairs,
    what_it_adds,
)
from dev.compare.claims import HELD, NOT_HELD
from dev.compare.metrics import Metric, metrics_of, number_of, show_factor, show_value, value

SIGNS = {BETTER: "▲", WORSE: "▼"}
STYLES = {BETTER: "green", WORSE: "red", SAME: "dim", HELD: "green", NOT_HELD: "bold red"}
SHOWN_CHANGES = 6
"""Changes of a milestone that are listed, of the largest; losses are all listed."""


def show(report: Report, console: Console) -> None:
    """Print everything that a report has to say."""
    console.print(headline(report), highlight=False, soft_wrap=True, markup=False)
    if text := warning(report):
        console.print(text, style="yellow", highlight=False)
    console.print("▲ better, ▼ worse than the milestone before, by the factor", style="dim")
    for part, about in report["parts"].items():
        metrics = metrics_of(report, part)
        if metrics:
            console.print(f"\n[bold]{part}[/bold]: {escape(about['title'])} "
                          f"[dim]({escape(about['model'])})[/dim]", highlight=False)
            console.print(part_table(report, metrics))
    for before, after in pairs(report):
        console.print()
        show_changes(report, before, after, console)
    console.print()
    show_claims(report, console)
    for gap in report["not_run"]:
        text = f"not run: {gap['name']}, part {gap['part']}: {gap['reason']}"
        console.print(escape(text), style="yellow", highlight=False)


def headline(report: Report) -> str:
    """What was compared, and where."""
    where = report["environment"]
    threads = where["num_threads"]
    machine = where["gpu"] or f"{where['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    scale = "" if report["scale"] == 1 else f", scaled by {report['scale']:g}: a trial"
    return f"{', '.join(report['milestones'])} with {report['model']} on {machine}{scale}"


def warning(report: Report) -> str:
    """What to know before a time is believed; empty where there is nothing."""
    where = report["environment"]
    if is_busy(report):
        return (f"Others were using the machine when this began (load {where['load_average']:.1f} "
                f"on {where['num_cpus']} CPUs): counts hold, times do not and are not compared.")
    return ""


def part_table(report: Report, metrics: list[Metric]) -> Table:
    """A line for each metric, a column for each milestone: value, and factor to the one before."""
    names = [name for name in report["milestones"]
             if any(value(report, metric, name) is not None for metric in metrics)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(number_of(name), justify="right", no_wrap=True)
    for metric in metrics:
        cells = []
        for place, name in enumerate(names):
            cell = show_value(value(report, metric, name), metric.style)
            one = change(report, metric, names[place - 1], name) if place else None
            if one is not None and one.factor is not None and one.verdict in (BETTER, WORSE):
                sign = SIGNS[one.verdict]
                cell += f"\n[{STYLES[one.verdict]}]{sign} {show_factor(one.factor)}[/]"
            cells.append(cell)
        table.add_row(metric.label, *cells)
    return table


def show_changes(report: Report, before: str, after: str, console: Console) -> None:
    """What a milestone gains and loses against the one before it."""
    found = changes(report, before, after)
    gains = [one for one in found if one.verdict == BETTER]
    losses = [one for one in found if one.verdict == WORSE]
    console.print(f"[bold]{after}[/bold] ({what_it_adds(after)}) against {before}",
                  highlight=False)
    gains.sort(key=lambda one: -(one.factor or float("inf")))
    for chosen in (gains[:SHOWN_CHANGES], losses):
        for one in chosen:
            factor = f", {show_factor(one.factor)}" if one.factor else ""
            metric = one.metric
            text = (f"  {SIGNS[one.verdict]} {metric.part}: {metric.label.strip()} "
                    f"{show_value(one.before, metric.style)} -> "
                    f"{show_value(one.after, metric.style)}{factor}")
            console.print(escape(text), style=STYLES[one.verdict], highlight=False)
    if not gains and not losses:
        within = ("in all that is counted" if is_busy(report) else
                  f"within what times differ by from run to run ({noise(report):.0%})")
        console.print(f"  the same, {within}", style="dim", highlight=False)
    elif not losses:
        console.print("  no loss" + (" in what is counted" if is_busy(report) else ""), style="dim")


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"


def show_claims(report: Report, console: Console) -> None:
    """Whether each milestone keeps what it promises."""
    table = Table(box=None, padding=(0, 2, 0, 0), title="What each milestone promises",
                  title_justify="left")
    for heading in ("", "claim", "measured", "needed", ""):
        table.add_column(heading, overflow="fold")
    for one in report["claims"]:
        measured = "–" if one["factor"] is None else _number(one["factor"])
        needed = _number(one["at_least"])
        verdict = one["verdict"] + (f": {one['reason']}" if one["reason"] else "")
        table.add_row(one["milestone"], escape(one["text"]), measured, needed,
                      f"[{STYLES.get(one['verdict'], 'dim')}]{escape(verdict)}[/]")
    console.print(table)
