"""A run as one page of HTML: curves, answers, settings and environment, without network, scripts or other files."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import yaml

from dirl_cli.files import write_text
from dirl_cli.overview.answers import AnswerExcerpt, answers_to_read
from dirl_cli.overview.charts import chart
from dirl_cli.overview.curves import course_cells, course_of, format_metric, is_leading, names_of
from dirl_cli.overview.files import only_numbers, read_mapping
from dirl_cli.overview.summary import RunFiles, progress_text, run_facts
from dirl_cli.report.panels import PANELS_OF
from dirl_cli.report.plot import Panel
from dirl_cli.text import escape_controls, redact

STYLE = """
:root { color-scheme: light dark; --ink: #24282e; --faint: #8b929c; --line: #e3e6ea; --paper: #fff; --box: #f6f7f9;
  --c0: #2f6db5; --c1: #d9632a; --c2: #3a8f5c; --c3: #8a5fb0; --c4: #a8842c; --good: #2c7a4b; --bad: #b3402f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --faint: #8f97a3; --line: #353b44; --paper: #16191e;
  --box: #1e2229; --c0: #6ea8ea; --c1: #f09060; --c2: #6cc292; --c3: #b994dd; --c4: #d4b45c; --good: #6cc292;
  --bad: #f08877; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1120px; padding: 24px 20px 60px; }
h1 { font-size: 21px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 20px 0 6px; color: var(--faint); }
p.state { margin: 2px 0 18px; color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); font-weight: normal;
  vertical-align: top; }
th:first-child, td:first-child, .facts td { text-align: left; } thead th { color: var(--faint); }
.facts td:first-child { color: var(--faint); white-space: nowrap; } .facts td:last-child { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 18px 26px; }
figure { margin: 0; } figcaption { font-size: 14px; } svg { width: 100%; height: auto; display: block; }
figcaption small span { margin-left: 10px; } figcaption .c0 { color: var(--c0); } figcaption .c1 { color: var(--c1); }
figcaption .c2 { color: var(--c2); } figcaption .c3 { color: var(--c3); } figcaption .c4 { color: var(--c4); }
svg .c0 { --c: var(--c0); } svg .c1 { --c: var(--c1); } svg .c2 { --c: var(--c2); } svg .c3 { --c: var(--c3); }
svg .c4 { --c: var(--c4); } svg polyline { fill: none; stroke: var(--c); stroke-linejoin: round; }
svg .mean { stroke-width: 1.8; } svg .noise { stroke-width: .6; opacity: .35; } svg circle { fill: var(--c); }
svg .grid line { stroke: var(--line); } svg .grid text { fill: var(--faint); font-size: 11px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--faint); }
pre { background: var(--box); padding: 10px 12px; margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  border-radius: 5px; font: 13px/1.45 ui-monospace, monospace; }
.answer { border-left: 3px solid var(--bad); padding-left: 12px; margin: 16px 0; }
.answer.right { border-color: var(--good); }
.answer small { color: var(--faint); }
"""
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head><body>
<h1>$title</h1><p class="state">$state</p>
$sections
</body></html>
""")


def write_page(run: RunFiles, departures: Sequence[str], to: Path) -> None:
    """Write the page of a run, atomically. departures: its settings that are no defaults.

    Raises DirlError where it cannot be written.
    """
    write_text(to, page_of(run, departures), "give another file with --to")


def page_of(run: RunFiles, departures: Sequence[str]) -> str:
    status = run.status
    sections = [
        section("", facts_table(run_facts(run, departures))),
        section("Figures", figures(run)),
        section("Curves", curves(run)),
        section("Answers", answers(answers_to_read(status.directory))),
        section("Settings", folded("All settings", redact(yaml.safe_dump(dict(run.settings), sort_keys=False)))),
        section("Environment", pre(redact(json.dumps(run.environment, indent=2, ensure_ascii=False)))),
    ]
    remark = f" · {status.remark}" if status.remark else ""
    return PAGE.substitute(
        title=text(status.directory),
        style=STYLE,
        state=text(f"{status.state} · {progress_text(status)}{remark}"),
        sections="\n".join(part for part in sections if part),
    )


def text(value: object) -> str:
    """Text as it stands in HTML, whatever is in it."""
    return escape(escape_controls(str(value)))


def section(heading: str, content: str) -> str:
    if not content:
        return ""
    return f"<section>{f'<h2>{heading}</h2>' if heading else ''}{content}</section>"


def pre(content: str) -> str:
    return f"<pre>{text(content)}</pre>"


def folded(heading: str, content: str) -> str:
    return f"<details><summary>{text(heading)}</summary>{pre(content)}</details>"


def facts_table(lines: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in lines)
    return f'<table class="facts">{rows}</table>' if rows else ""


def html_table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{text(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(run: RunFiles) -> str:
    """The metrics of a training run: first, last and best; of an evaluation those of all and of its subsets."""
    if run.status.command != "eval":
        names = [name for name in names_of(run.history) if is_leading(name, run.status.command)]
        return html_table([course_cells(course_of(run.history, name)) for name in names])
    subsets = read_mapping(run.status.directory / "eval_card.json").get("subsets")
    columns: dict[str, Mapping[str, float]] = {"all": run.status.metrics}
    if isinstance(subsets, dict):
        columns |= {name: only_numbers(value) for name, value in subsets.items() if isinstance(value, dict)}
    rows = []
    for name in run.status.metrics:
        cells = {label: format_metric(name, numbers.get(name)) for label, numbers in columns.items()}
        rows.append({"metric": name, **cells})
    return html_table(rows)


def curves(run: RunFiles) -> str:
    """A chart for each panel of the command, and folded away one for every other metric."""
    names = names_of(run.history)
    panels = [*PANELS_OF.get(run.status.command, ())]
    by_rate = {name: f"{name.partition('/')[2]} masked" for name in names if name.startswith("denoising_accuracy/")}
    panels.append(Panel("Denoising accuracy, held out", by_rate, percent=True))
    drawn = {name for panel in panels for name in panel.curves}
    others = [Panel(name, {name: ""}) for name in names if name not in drawn]

    shown = "".join(chart(panel, run.history) for panel in panels)
    more = "".join(chart(panel, run.history) for panel in others)
    content = f'<div class="charts">{shown}</div>' if shown else ""
    if more:
        content += f'<details><summary>{len(others)} more metrics</summary><div class="charts">{more}</div></details>'
    return content


def answers(groups: Mapping[str, Sequence[AnswerExcerpt]]) -> str:
    parts = []
    for heading, group in groups.items():
        parts.append(f"<h3>{text(heading)}</h3>")
        for answer in group:
            verdict = "right" if answer.is_correct else "wrong"
            reference = f" · a right answer: {text(answer.reference)}" if answer.reference else ""
            parts.append(
                f'<div class="answer {verdict}"><small>asked</small>{pre(answer.question)}'
                f"<small>answered</small>{pre(answer.text)}"
                f"<small>{verdict} · {text(answer.facts)}{reference}</small></div>"
            )
    return "".join(parts)
