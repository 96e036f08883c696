"""The answer to why not: what it says, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict
from rich.console import Group, RenderableType
from rich.text import Text

import ir.plan
from ir.reading import STRICT
from ir.units import format_bytes, format_seconds
from planner.render import grid, percent_change, signed

Verdict = Literal["chosen", "not offered", "does not fit", "costs nothing", "costs", "better"]

SAME = 1e-6  # relative difference below which two objectives are the same


@dataclass(frozen=True, slots=True)
class WhyNot:
    """The answer; seconds are of the objective or the modelled step, costs are against the plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    table: str
    asked: str  # "row_wise", "column_wise x4", "rank=5", "host=1"
    chosen: str
    verdict: Verdict
    reason: str
    at_most: float | None = None  # objective of the best plan found with it, less the plan's
    at_least: float | None = None  # proved for every plan with it, less the plan's; never below 0
    step: float | None = None  # modelled step with it, seconds
    step_change: float | None = None
    bound_method: str = ""
    changes: int = 0  # other tables that are decided differently then
    moved_bytes: int = 0  # weights (fp32) on ranks that do not hold them now, all tables
    terms: dict[str, float] | None = None  # of the table with it, summed over ranks
    memory: dict[str, int] | None = None


def render_why_not(plan: ir.plan.Plan, found: WhyNot) -> RenderableType:
    """The verdict in one line, then the costs side by side."""
    head = Text(f"{found.table}: why not {found.asked}? chosen is {found.chosen}", style="bold")
    verdict = Text(f"{found.verdict}: {found.reason}")
    if found.step_change is None:
        return Group(head, verdict)
    costs = grid("", ">plan", f">with {found.asked}", ">change")
    if found.at_most is not None:
        objective = plan.certificate.objective
        costs.add_row(
            "objective",
            format_seconds(objective),
            format_seconds(objective + found.at_most),
            signed(found.at_most),
        )
    step = (found.step or 0.0) - found.step_change
    costs.add_row(
        "modelled step", format_seconds(step), format_seconds(found.step or 0.0), signed(found.step_change)
    )
    table = plan.tables[found.table]
    for term, seconds in (found.terms or {}).items():
        before = table.terms.get(term, 0.0)
        costs.add_row(
            f"{term}, all ranks", format_seconds(before), format_seconds(seconds), signed(seconds - before)
        )
    if found.memory is not None:
        before_bytes, after = sum(table.memory.values()), sum(found.memory.values())
        costs.add_row(
            "its memory", format_bytes(before_bytes), format_bytes(after), percent_change(before_bytes, after)
        )
    lines: list[RenderableType] = [head, verdict, Text(), costs, Text()]
    if found.at_most is not None and found.at_least is not None:
        lines.append(Text(_proof(found.at_most, found.at_least, found.bound_method)))
    more = f"{found.changes} other tables change, " if found.at_most is not None else ""
    lines.append(Text(f"{more}{format_bytes(found.moved_bytes)} of weights move"))
    return Group(*lines)


def _proof(at_most: float, at_least: float, method: str) -> str:
    if at_most < 0:
        saved = format_seconds(-at_most)
        return f"saves {saved} or more: such a plan was found, all else free; pin it in the constraints to have it"
    proof = (
        f"proved to cost at least {signed(at_least)} ({method})"
        if at_least > 0
        else f"not proved to cost anything ({method})"
    )
    return f"costs at most {signed(at_most)}: such a plan was found, all else free; {proof}"
