"""The comparison as one HTML page: nothing is loaded, everything a plot shows stands in a table.

Plots say their figures to screen readers. The page follows the reader's colours (light or dark),
works without JavaScript and from file://.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dev.bench.report import Report
from dev.compare.changes import BETTER, SAME, WORSE, Change, change, changes, pairs, what_it_adds
from dev.compare.claims import HELD, NOT_HELD
from dev.compare.metrics import Metric, metrics_of, number_of, show_factor, show_value, value
from dev.compare.plots import DARK, INK, LIGHT, SERIES, SOFT, inline_svg, new_figure, variables
from dev.compare.terminal import SIGNS, headline, warning

CLASSES = {BETTER: "better", WORSE: "worse", SAME: "same", HELD: "better", NOT_HELD: "worse"}

# What is drawn of a measure: a title, and the fields that stand beside each other as bars.
PANELS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "throughput": (
        ("output tokens/s", ("output_tokens_per_s",)),
        ("TTFT, p50 and p99", ("ttft_p50_s", "ttft_p99_s")),
        ("ITL, p50, p90, p99, max", ("itl_p50_s", "itl_p90_s", "itl_p99_s", "itl_max_s")),
        ("KV slots used of allocated", ("kv_utilization",)),
        ("share of the roofline", ("work_roofline_share",)),
    ),
    "crowd": (
        ("requests at once", ("at_once",)),
        ("KV slots used of allocated", ("kv_utilization",)),
        ("steps", ("num_steps",)),
    ),
    "stall": (
        ("tokens between two tokens, p50, p99",
         ("gap_p50_tokens", "gap_p99_tokens")),
        ("steps", ("num_steps",)),
    ),
    "mixed": (
        ("ITL, p50, p99, max", ("run_itl_p50_s", "run_itl_p99_s", "run_itl_max_s")),
        ("last TTFT", ("prompt_ttft_max_s",)),
        ("output tokens/s", ("output_tokens_per_s",)),
    ),
}


def write_page(report: Report, path: Path) -> None:
    """Write the page of a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The page's HTML."""
    shown = [part for part in report["parts"] if metrics_of(report, part)]
    links = "".join(f'<li><a href="#{part}">{escape(part)}</a></li>' for part in shown)
    body = [
        "<h1>Milestones side by side</h1>",
        f"<p>{escape(headline(report))}. {_origin(report)}</p>",
        f'<p class="worse">{escape(warning(report))}</p>' if warning(report) else "",
        f'<nav aria-label="Parts"><ul>{links}<li><a href="#changes">what changed</a></li>'
        '<li><a href="#claims">claims</a></li></ul></nav>',
        "<p>▲ better, ▼ worse than the milestone before, by the factor.</p>",
        *(_part(report, part) for part in shown),
        _changes(report),
        _claims(report),
        _gaps(report),
    ]
    return _PAGE.format(light=variables(LIGHT), dark=variables(DARK), body="\n".join(body))


def _origin(report: Report) -> str:
    where = report["environment"]
    commit = (where["commit"] or "unknown")[:7]
    changed = " with changes" if where["uncommitted_changes"] else ""
    return escape(f"Commit {commit}{changed}, torch {where['torch']}, {where['date']}.") + (
        f" Command: <code>{escape(report['command'])}</code>"
    )


def _part(report: Report, part: str) -> str:
    about = report["parts"][part]
    metrics = metrics_of(report, part)
    work = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about["work"].items())
    return (
        f'<section id="{part}"><h2>{escape(part)}</h2>'
        f"<p>{escape(about['title'])} <small>({escape(about['model'])}; {escape(work)})</small></p>"
        f"{_plot(report, part, metrics)}{_table(report, part, metrics)}</section>"
    )


def _table(report: Report, part: str, metrics: Sequence[Metric]) -> str:
    names = _names(report, metrics)
    head = "".join(f'<th scope="col">{escape(number_of(name))}</th>' for name in names)
    rows = []
    for metric in metrics:
        cells = []
        for place, name in enumerate(names):
            one = change(report, metric, names[place - 1], name) if place else None
            cells.append(f"<td>{escape(show_value(value(report, metric, name), metric.style))}"
                         f"{_badge(one)}</td>")
        rows.append(f'<tr><th scope="row">{escape(metric.label)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(part)}, figures"><table>'
        f"<caption>{escape(part)}: figures</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _badge(one: Change | None) -> str:
    if one is None or one.factor is None or one.verdict not in (BETTER, WORSE):
        return ""
    text = f"{SIGNS[one.verdict]} {show_factor(one.factor)}"
    said = f"{one.verdict} by {show_factor(one.factor)}"
    return (f' <span class="{CLASSES[one.verdict]}"><span aria-hidden="true">{text}</span>'
            f'<span class="said">{said}</span></span>')


def _names(report: Report, metrics: Sequence[Metric]) -> list[str]:
    return [name for name in report["milestones"]
            if any(value(report, metric, name) is not None for metric in metrics)]


# --- plots ------------------------------------------------------------------------------------


def _plot(report: Report, part: str, metrics: Sequence[Metric]) -> str:
    plots = []
    for number, (title, series) in enumerate(_panels(report, part, metrics)):
        figure, (axis,) = new_figure(3.4, 2.4, 1)
        _bars(axis, report, title, series)
        svg = inline_svg(figure, f"{title}: {_said(report, series)}", f"{part}-{number}")
        plots.append(f"<figure>{svg}</figure>")
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _said(report: Report, series: Sequence[Metric]) -> str:
    """The bars in words."""
    return "; ".join(
        metric.label.strip() + " " + ", ".join(
            f"{number_of(name)} {show_value(value(report, metric, name), metric.style)}"
            for name in _names(report, [metric])
        )
        for metric in series
    )


def _panels(
    report: Report, part: str, metrics: Sequence[Metric]
) -> list[tuple[str, list[Metric]]]:
    """Titles, and the metrics that are drawn beside each other."""
    measures = {row["measure"] for row in report["rows"] if row["part"] == part}
    panels: list[tuple[str, list[Metric]]] = []
    for measure in sorted(measures & PANELS.keys()):
        for title, fields in PANELS[measure]:
            chosen = [metric for field in fields for metric in metrics if metric.field == field]
            if chosen:
                panels.append((title, chosen))
    if not panels:  # latency, prefix: a panel for each case
        named = [m for m in metrics if m.field in ("seconds", "computed_tokens", "linear_bytes")]
        panels = [(metric.label, [metric]) for metric in named]
    return panels


def _bars(axis: Any, report: Report, title: str, series: Sequence[Metric]) -> None:
    names = _names(report, series)
    width = 0.8 / len(series)
    most = max((value(report, metric, name) or 0.0 for metric in series for name in names),
               default=0.0)
    for number, metric in enumerate(series):
        for place, name in enumerate(names):
            height = value(report, metric, name)
            if height is None:
                continue
            x = place + (number - (len(series) - 1) / 2) * width
            axis.bar(x, height, width * 0.92, color=SERIES[number % len(SERIES)])
            if len(series) == 1:
                axis.text(x, height + most * 0.02, show_value(height, metric.style).split(" ")[0],
                          ha="center", fontsize=6.5, color=INK)
    axis.set_title(title, fontsize=9, color=INK, loc="left")
    for number, metric in enumerate(series if len(series) > 1 else ()):
        axis.text(1.0, 1.0 - number * 0.09, metric.label.rsplit(" ", 1)[-1], fontsize=8,
                  color=SERIES[number % len(SERIES)], transform=axis.transAxes, ha="right",
                  va="top")
    axis.set_xticks(range(len(names)), [number_of(name) for name in names], fontsize=8)
    axis.set_yticks([0.0, most] if most else [0.0])
    axis.set_yticklabels(["0", show_value(most, series[0].style)] if most else ["0"], fontsize=7,
                         color=SOFT)
    axis.set_ylim(0, most * 1.15 if most else 1)


# --- what changed, claims ---------------------------------------------------------------------


def _changes(report: Report) -> str:
    parts = []
    for before, after in pairs(report):
        found = changes(report, before, after)
        lists = "".join(
            _list(label, [one for one in found if one.verdict == verdict], verdict)
            for label, verdict in (("gains", BETTER), ("losses", WORSE))
        )
        parts.append(f"<h3>{escape(after)} against {escape(before)}</h3>"
                     f"<p>{escape(what_it_adds(after))}</p>{lists}")
    return f'<section id="changes"><h2>What changed</h2>{"".join(parts)}</section>'


def _list(label: str, found: Sequence[Change], verdict: str) -> str:
    if not found:
        return f"<p>No {label}.</p>"
    items = []
    for one in sorted(found, key=lambda one: -(one.factor or float("inf"))):
        metric = one.metric
        factor = f", {show_factor(one.factor)}" if one.factor else ""
        items.append(f"<li>{escape(metric.part)}: {escape(metric.label.strip())} "
                     f"{escape(show_value(one.before, metric.style))} → "
                     f"{escape(show_value(one.after, metric.style))}{factor}</li>")
    return (f'<p class="{CLASSES[verdict]}">{SIGNS[verdict]} {label}</p><ul>{"".join(items)}</ul>')


def _claims(report: Report) -> str:
    rows = []
    for one in report["claims"]:
        measured = "–" if one["factor"] is None else f"{one['factor']:,.4g}"
        verdict = one["verdict"] + (f": {one['reason']}" if one["reason"] else "")
        rows.append(
            f'<tr><th scope="row">{one["milestone"]}</th><td>{escape(one["text"])}<br>'
            f"<small>{escape(one['how'])}</small></td><td>{measured}</td>"
            f"<td>{one['at_least']:,.4g}</td>"
            f'<td class="{CLASSES.get(one["verdict"], "same")}">{escape(verdict)}</td></tr>'
        )
    head = "".join(f'<th scope="col">{text}</th>'
                   for text in ("", "claim", "measured", "needed", "verdict"))
    return (
        '<section id="claims"><h2>What each milestone promises</h2><div class="wide" tabindex="0" '
        'role="region" aria-label="claims"><table class="words"><caption>Claims</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _gaps(report: Report) -> str:
    if not report["not_run"]:
        return ""
    items = "".join(f"<li>{escape(gap['name'])}, {escape(gap['part'])}: {escape(gap['reason'])}"
                    "</li>" for gap in report["not_run"])
    return f"<section><h2>Not run</h2><ul>{items}</ul></section>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Milestones side by side</title>
<style>
:root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--panel);
  max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--grid); }}
a {{ color: var(--c4); }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }}
.plots {{ display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; }}
figure {{ margin: .5rem 0; }}
figure svg {{ width: 21rem; max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; position: relative; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: var(--soft); font-size: .85rem; }}
th, td {{ text-align: right; padding: .2rem .7rem; border-top: 1px solid var(--grid);
  white-space: nowrap; vertical-align: top; }}
th[scope=row] {{ text-align: left; font-weight: normal; }}
.words th, .words td {{ text-align: left; white-space: normal; }}
.better {{ color: var(--c1); }} .worse {{ color: var(--c2); }} .same {{ color: var(--soft); }}
td > span {{ display: block; font-size: .8rem; }}
small {{ color: var(--soft); }}
code {{ overflow-wrap: anywhere; }}
.said {{ position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
