"""A line on a terminal while a long search runs: pass, incumbent, bound, gap, time; nothing in a pipe."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from passes.assignment.progress import Progress


@contextlib.contextmanager
def search_progress(hidden: bool = False, console: Console | None = None) -> Iterator[list[Any]]:
    """Show the searches inside; gives the observers to hand to :func:`planner.compile`.

    Nothing is shown, and the list is empty, with ``hidden`` or where standard error is no terminal.
    """
    from rich.console import Console

    screen = console or Console(stderr=True)
    if hidden or not screen.is_terminal:
        yield []
        return
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from passes.assignment.progress import watching

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[found]}"))
    with Bar(*columns, TimeElapsedColumn(), console=screen, transient=True) as bar:
        task = bar.add_task("capture", total=None, found="")

        def heard(progress: Progress) -> None:
            bar.update(task, found=describe(progress))

        def after(name: str, program: Any) -> None:
            bar.update(task, description=f"after {name}")

        with watching(heard):
            yield [after]


def describe(progress: Progress) -> str:
    """``"incumbent 1.20 ms, bound 1.10 ms, gap 8.33 %"``."""
    from ir.units import format_seconds

    bound = f"bound {format_seconds(progress.bound)}"
    if math.isinf(progress.incumbent):
        return f"no plan yet, {bound}"
    return f"incumbent {format_seconds(progress.incumbent)}, {bound}, gap {100 * progress.gap:.2f} %"
