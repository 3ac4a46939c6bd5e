"""The report: one HTML file with everything in it, to be shown beside the article.

It needs no other file and no network: the plots are SVG within the text. Everything that a user or
a machine has named is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pmemfs.compare.plots import Plot, plots
from pmemfs.compare.rows import (
    ANSWERS,
    BASE,
    GROUPS,
    ROWS,
    VERDICT_ROUNDS,
    Cell,
    Row,
    Verdict,
    cell_of,
    failures,
    from_to,
    quantity,
    verdicts,
)
from pmemfs.compare.run import Comparison
from pmemfs.text import printable

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: #1b1b1b;
  background: #fff; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; }
.lead { color: #444; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; vertical-align: top; }
thead th { border-bottom: 2px solid #1b1b1b; }
tbody tr { border-bottom: 1px solid #e3e3e3; }
tr.group th { padding-top: 1.1rem; font-weight: 700; border-bottom: 1px solid #999; }
td.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.figure { text-align: right; }
td small { display: block; color: #666; }
tbody th { font-weight: 500; }
tbody th small { display: block; font-weight: 400; color: #666; }
.figures tbody th { min-width: 12.5rem; }
.fails { color: #a3260c; }
.better { color: #05603f; } .worse { color: #a3260c; }
td.better small, td.worse small { color: inherit; }
figure { margin: 1.4rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #444; max-width: 46rem; }
pre { background: #f5f5f3; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
ol.fails li { color: #1b1b1b; margin-bottom: .5rem; max-width: 54rem; }
ol.fails q { color: #a3260c; quotes: none; }
.wide { overflow-x: auto; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
"""

_LEAD = """In 2015 the kernel's developers disagreed: billions of page structures are too many to
keep in DRAM for persistent memory, and without page structures there is no DMA, no direct I/O and
no reference count. Here the answers of that debate run side by side on one machine: the same
program, the same medium, pools of the same size, the same workload."""

_METHOD = f"""Each round gives every answer one turn; each begins with another answer, and every
other round goes backwards. A pool is made for a turn and removed after it. Figures are medians of
the rounds; below them stand the lowest and the highest. “better” and “worse” compare an answer with
{BASE}, by the ratio within one round. They are said only after {VERDICT_ROUNDS} rounds or more, and
only if every round of the one lies on the same side of every round of the other. Rows about memory
follow from the pool's geometry and are not judged."""


def html_report(comparison: Comparison) -> str:
    """The whole file."""
    parts = (
        _head(),
        _answers(),
        *map(_figure, plots(comparison.readings)),
        _table(comparison),
        _failures(comparison),
        _repeat(comparison),
    )
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _head() -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Page structures: four answers compared</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>Where do page structures of persistent memory live?</h1>\n"
        f'<p class="lead">{_LEAD}</p>'
    )


def _answers() -> str:
    rows = "\n".join(
        f"<tr><th>{_text(each.name)}</th><td>{_text(each.whose)}</td><td>{_text(each.says)}</td></tr>"
        for each in ANSWERS
    )
    return (
        "<h2>The answers</h2>\n<table><thead><tr><th>answer</th><th>whose</th><th>what it says</th>"
        f"</tr></thead>\n<tbody>{rows}</tbody></table>"
    )


def _figure(plot: Plot) -> str:
    return (
        f"<h2>{_text(plot.title)}</h2>\n"
        f'<figure role="img" aria-label="{_text(plot.caption)}">\n'
        f"{plot.svg}\n<figcaption>{_text(plot.caption)}</figcaption>\n</figure>"
    )  # fmt: skip


def _table(comparison: Comparison) -> str:
    readings = comparison.readings
    numbers = {sentence: n for n, (sentence, _, _) in enumerate(failures(readings), 1)}
    judged = {(one.row, one.answer): one for one in verdicts(readings)}
    heads = "".join(f'<th class="figure">{_text(each.name)}</th>' for each in ANSWERS)
    lines = [f"<thead><tr><th></th>{heads}</tr></thead>\n<tbody>"]
    for group in GROUPS:
        lines.append(f'<tr class="group"><th colspan="{len(ANSWERS) + 1}">{_text(group)}</th></tr>')
        for row in (row for row in ROWS if row.group == group):
            cells = "".join(
                _cell(row, cell_of(readings, row.key, each.name), numbers,
                      judged.get((row.key, each.name)))
                for each in ANSWERS
            )  # fmt: skip
            lines.append(
                f"<tr><th>{_text(row.name)}<small>{_text(row.about)}</small></th>{cells}</tr>"
            )
    body = "\n".join(lines)
    return (
        f"<h2>All figures</h2>\n<p>{_METHOD}</p>\n"
        f'<div class="wide"><table class="figures">{body}</tbody></table></div>'
    )


def _cell(row: Row, cell: Cell, numbers: dict[str, int], verdict: Verdict | None) -> str:
    if cell.error:
        return f'<td class="figure fails">fails [{numbers[cell.error]}]</td>'
    if cell.spread is None:
        return '<td class="figure">-</td>'
    shown = _text(quantity(cell.spread.median, row.unit))
    if between := from_to(cell.spread, row.unit):
        shown += f"<small>{_text(between)}</small>"
    style = ""
    if verdict and verdict.says in ("better", "worse"):
        style = f" {verdict.says}"
        shown += f"<small>{verdict.says}: {verdict.ratio.median:.2f} times</small>"
    return f'<td class="figure{style}">{shown}</td>'


def _failures(comparison: Comparison) -> str:
    found = failures(comparison.readings)
    if not found:
        return "<h2>What fails</h2>\n<p>Nothing failed.</p>"
    items = "\n".join(
        f"<li><q>{_text(sentence)}</q><br>{_text(', '.join(answers))}: "
        f"{_text(', '.join(row.name for row in rows))}</li>"
        for sentence, rows, answers in found
    )
    return (
        "<h2>What fails, and with which sentence</h2>\n"
        "<p>What an answer can't do is a result, too. "
        f'These are the program\'s own words.</p>\n<ol class="fails">{items}</ol>'
    )


def _repeat(comparison: Comparison) -> str:
    facts = "\n".join(
        f"<tr><th>{_text(fact.name)}</th><td>{_text(fact.value)}</td></tr>"
        for fact in comparison.facts
    )
    return (
        f"<h2>How to repeat it</h2>\n<pre>{_text(comparison.command)}</pre>\n"
        f"<p>Each turn is made of these commands, and of programs that use the mount:</p>\n"
        f"<pre>{_lines(comparison.steps)}</pre>\n"
        f'<div class="wide"><table><tbody>{facts}</tbody></table></div>'
    )


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(map(_text, lines))


def _text(text: str) -> str:
    return escape(printable(text))
