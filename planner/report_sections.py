"""The decision sections of a plan for the report: rich renderables as HTML that wraps and can be read by machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ir.plan import Plan
from planner.render import to_text
from planner.sections import render_section

# section -> heading, what it is about
TITLES: dict[str, tuple[str, str]] = {
    "collectives": ("Collectives", "algorithm of each exchange, and buckets of dense gradients"),
    "compression": ("Compression", "codec and error bound of each table's messages"),
    "dedup": ("Deduplication", "features whose repeated samples travel once a session"),
    "dense": ("Dense part", "how the layers outside the tables are laid over the ranks"),
    "formats": ("Number formats", "how tensors are stored and multiplied, under the accuracy budget"),
    "growth": ("Growth and pruning", "how wide the dense part is in each phase of the training"),
    "parallelism": ("Parallelism", "tensor, context, pipeline and data ranks of the decoder"),
    "serving": ("Serving", "layouts, latencies and the exchange for each kind of request"),
    "tiers": ("Memory tiers", "which memories hold the rows, and what binds"),
    "towers": ("Towers", "tables that share hosts, and what crosses between them"),
}


@dataclass(frozen=True, slots=True)
class SectionPart:
    """One section of the page; ``body`` is HTML in which everything from the plan is escaped."""

    name: str
    title: str
    about: str
    body: str


def section_parts(plan: Plan) -> list[SectionPart]:
    """Every section of the plan, in the plan's order."""
    made = []
    for name in plan.decisions.present():
        title, about = TITLES[name]
        blocks = [block for block in _blocks(render_section(plan, name)) if _said(block) != title.lower()]
        made.append(SectionPart(name, title, about, "\n".join(map(_html, blocks))))
    return made


def _blocks(what: RenderableType) -> Iterator[RenderableType]:
    if isinstance(what, Group):
        for part in what.renderables:
            yield from _blocks(part)
    elif not (isinstance(what, Text) and not what.plain.strip()):
        yield what


def _said(block: RenderableType) -> str:
    return block.plain.lower() if isinstance(block, Text) else ""


def _html(block: RenderableType) -> str:
    if isinstance(block, Text):
        tag = "h3" if "bold" in str(block.style) else "p"
        return f"<{tag}>{escape(block.plain)}</{tag}>"
    if isinstance(block, Table):
        return _table(block)
    return f"<pre>{escape(to_text(block, width=130))}</pre>"


def _table(table: Table) -> str:
    """A table whose text columns wrap; numbers are right-aligned as in the terminal."""
    classes = [' class="n"' if column.justify == "right" else "" for column in table.columns]
    names = "".join(
        f"<th{c}>{_cell(column.header)}</th>" for c, column in zip(classes, table.columns, strict=True)
    )
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        f"<tr>{''.join(f'<td{c}>{_cell(cell)}</td>' for c, cell in zip(classes, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: RenderableType) -> str:
    return escape(cell.plain if isinstance(cell, Text) else str(cell))
