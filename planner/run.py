"""Running a plan here: which model it is of, progress on a terminal, and the result as text."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ir.errors import InputError
from ir.plan import Plan
from ir.units import format_bytes, format_seconds
from planner.render import grid

if TYPE_CHECKING:
    from codegen.runtime.compare import RunResult
    from codegen.runtime.spans import Span


def source_of(plan: Plan, model: str | None = None) -> str:
    """Where the plan's model is built: what ``--model`` names, else what was compiled, else a zoo model of its name.

    Raises:
        InputError: the plan was compiled from a table list, or from a module of which it keeps no more than the name, and
            no model is named.
    """
    from planner.zoo import decoder_names, zoo_names

    known = (*zoo_names(), *decoder_names())
    source = model or plan.provenance.get("model", "")
    if not source and plan.model.name in known:
        return plan.model.name
    if not source or source.partition("#")[0].endswith(".json"):
        made = f"the table list {source}, which has no layers" if source else "a module of a Python program"
        raise InputError(
            f"the plan of {plan.model.name!r} was compiled from {made}; name the model that holds its tables with "
            "--model, as a zoo model or file.py:callable"
        )
    return source


def factory_of(plan: Plan, model: str | None = None) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """How a process builds the plan's model: factory, arguments, options.

    Raises:
        InputError: as :func:`source_of`, or the model is neither of the zoo nor of a Python file.
    """
    from planner.zoo import zoo_names

    source = source_of(plan, model)
    towers = plan.decisions.towers
    if source in zoo_names() and towers is not None and towers.applied and towers.module != "none":
        return "planner.run:build_with_towers", (source, plan.to_dict()), {"device": "cpu"}
    if source in zoo_names():
        return "planner.zoo:build", (source,), {"device": "cpu"}
    if source.rpartition(":")[0].endswith(".py"):
        return source, (), {}
    raise InputError(f"{source!r} is no model to run; name a zoo model or file.py:callable with --model")


def build_with_towers(name: str, plan: dict[str, Any], **options: Any) -> Any:
    """A zoo model with the tower modules of a plan (as JSON data); ``options`` are those of :func:`planner.zoo.build`."""
    from planner.zoo import build
    from planner.zoo.multi_tower import with_towers

    towers = Plan.from_dict(plan).decisions.towers
    assert towers is not None
    return with_towers(build(name, **options).module, towers)


@contextlib.contextmanager
def progress(steps: int, hidden: bool = False) -> Iterator[Callable[[int, float], None] | None]:
    """A bar over the steps on a terminal; nothing in a pipe."""
    console = Console(stderr=True)
    if hidden or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("training", total=steps, loss="starting")

        def on_step(step: int, loss: float) -> None:
            bar.update(task, completed=step + 1, loss=f"loss {loss:.4f}")

        yield on_step


def render_run(plan: Plan, result: RunResult) -> RenderableType:
    """Predicted beside measured, and the differences to the unsharded model."""
    times = grid("step", ">time")
    calibrated = any(a.source == "uncalibrated" for a in plan.assumptions)
    times.add_row(
        f"predicted for {plan.topology.name}{' (uncalibrated)' if calibrated else ''}",
        format_seconds(plan.timeline.step),
    )
    times.add_row(
        f"measured, {result.nproc} processes, median of {len(result.step_seconds)}",
        format_seconds(result.median_step),
    )
    times.add_row("one process, unsharded", format_seconds(statistics.median(result.unsharded_step_seconds)))
    differences = grid("sharded against unsharded", ">absolute", ">relative", "where it is largest")
    for name in ("outputs", "losses", "weights"):
        found = getattr(result, name)
        differences.add_row(name, f"{found.absolute:.2e}", f"{found.relative:.2e}", found.where)
    verdict = f"{'equal' if result.equal else 'NOT EQUAL'} within {result.tolerance:g} relative"
    if result.equal and result.over_rounding:
        verdict = (
            f"equal up to rounding: what is beyond {result.tolerance:g} relative is {result.over_rounding:.2g} times as "
            "far from a float64 run as the unsharded float32 run itself"
        )
    if result.lossy and not result.equal:
        verdict = f"not exact by the plan's choice ({result.lossy})"
    return Group(
        times,
        Text(),
        differences,
        Text(
            f"{verdict}; {result.changed} of {result.tensors} weight tensors "
            f"changed in training; peak memory {format_bytes(max(result.peak_rss))} a process"
        ),
        *(Text(f"note: {note}") for note in result.notes),
        *_phases(plan, result.spans),
    )


def _phases(plan: Plan, spans: tuple[Span, ...]) -> list[RenderableType]:
    from planner.report_measured import phase_rows, render_phases

    return [Text(), render_phases(phase_rows(plan, spans))] if spans else []
