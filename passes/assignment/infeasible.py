"""Say why nothing fits, and the smallest change that would help."""

from __future__ import annotations

import numpy as np

from ir.errors import InfeasibleError
from ir.units import format_bytes
from passes.assignment.compiled import Compiled


def check(compiled: Compiled) -> None:
    """Necessary conditions for a placement.

    Raises:
        InfeasibleError: a table fits nowhere, or all tables together exceed the machine's memory.
    """
    problem = compiled.problem
    capacity = problem.capacity
    if capacity <= 0:
        raise InfeasibleError(
            "the memory limit of a rank leaves nothing for tables; raise the limit or lower the reserve",
            conflict=("capacity",),
        )
    for t, name in enumerate(problem.names):
        span = slice(int(compiled.start[t]), int(compiled.start[t + 1]))
        if compiled.usable[span].any():
            continue
        need = float(compiled.peak_memory[span].min())
        best = int(compiled.peak_memory[span].argmin())
        label = problem.options[t][best].label
        if need > capacity:
            raise InfeasibleError(
                f"table {name!r} needs {format_bytes(need)} on a rank in its smallest option ({label}); "
                f"a rank has {format_bytes(capacity)}",
                conflict=("capacity", f"options[{name}]"),
                relaxation=f"{format_bytes(need)} a rank, or options that split {name!r} further",
            )
        raise InfeasibleError(
            f"no option of table {name!r} fits the ranks that it may use; allow more ranks or other options",
            conflict=("capacity", f"options[{name}]", f"ranks[{name}]"),
            relaxation=f"more ranks for {name!r}",
        )
    memory = np.where(compiled.usable, compiled.mean_memory, np.inf)
    least = float(np.minimum.reduceat(memory, compiled.start[:-1]).sum())
    if least > capacity * (1 + 1e-12):
        more = int(np.ceil(least / capacity * problem.hosts))
        raise InfeasibleError(
            f"the tables need {format_bytes(least * problem.ranks)} in their smallest options; "
            f"{problem.ranks} ranks have {format_bytes(capacity * problem.ranks)}",
            conflict=("capacity", "tables"),
            relaxation=f"{format_bytes(least)} a rank, or about {more} hosts of {problem.host_size} ranks",
        )


def give_up(compiled: Compiled) -> InfeasibleError:
    """The error for a search that found no placement although the averages would allow one."""
    problem = compiled.problem
    memory = np.where(compiled.usable, compiled.mean_memory, np.inf)
    least = float(np.minimum.reduceat(memory, compiled.start[:-1]).sum())
    return InfeasibleError(
        f"no placement found within the memory limit: the tables' smallest options fill "
        f"{100 * least / problem.capacity:.1f} % of the ranks and their pieces do not pack; "
        f"raise the memory limit of {format_bytes(problem.capacity)} a rank or allow narrower splits",
        conflict=("capacity", "tables"),
        relaxation="a higher memory limit or a smaller minimum column width",
    )
