"""Requests for formats as the joint problem takes them: pinned names, tables that agree, the widest budgets."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import replace

from cost_models.calibration import Calibration
from ir.errors import InfeasibleError
from ir.format_plan import FormatRequest
from ir.program import Program
from passes.format_menu import grouped
from passes.joint import relax_all, state_problem

UNBOUNDED = 1e100  # a budget that binds nothing


def with_request(program: Program, request: FormatRequest) -> Program:
    """The program with another request for formats."""
    constraints = replace(program.options.constraints, formats=request)
    return replace(program, options=replace(program.options, constraints=constraints))


def pinned(
    request: FormatRequest, formats: Mapping[str, tuple[str, ...]] | Iterable[tuple[str, tuple[str, ...]]]
) -> FormatRequest:
    """The request with some tensors, by name, held to the given formats."""
    # names are patterns in rules, and may have brackets
    rules = {glob.escape(name): allowed for name, allowed in dict(formats).items()}
    return replace(request, rules={**request.rules, **rules})


def largest_sum(program: Program, calibration: Calibration, request: FormatRequest, name: str) -> float:
    """The sum of a budget ("loss", "bits" or "bytes") when every tensor takes the option with the most of it."""
    wide = replace(
        request, objective="step", max_step=None, max_loss=UNBOUNDED, average_bits=UNBOUNDED, max_bytes=2**62
    )
    stated = state_problem(with_request(program, wide), calibration)
    at = stated.budgets.index(name)
    total = sum(
        len(menu.tables) * max(option.cost[at] for option in menu.options) * stated.scale[at]
        for menu in stated.menus
    )
    return float(total)


def untied(program: Program, calibration: Calibration, request: FormatRequest, bound: float) -> float:
    """A bound on the step for every format that tables which agree may take, not only those pinned by :func:`agree`.

    Args:
        request: for the least step, before :func:`agree`.
        bound: of the request that it made.
    """
    if not grouped([table.name for table in program.model.tables], request.groups):
        return bound
    stated, _ = relax_all(with_request(program, request), calibration)
    return min(bound, stated[0][1].bound) if stated else bound


def agree(program: Program, calibration: Calibration, request: FormatRequest) -> FormatRequest:
    """Pin the common format of tables that must agree."""
    model = program.model
    ties = grouped([table.name for table in model.tables], request.groups)
    for group in sorted(set(ties.values())):
        members = [t for t, table in enumerate(model.tables) if ties.get(table.name) == group]
        stated = state_problem(with_request(program, replace(request, groups=())), calibration)
        relaxed = stated.relax()
        use: dict[str, float] = {}
        shared: set[str] | None = None
        for c, made in enumerate(stated.classes):
            here = [t for t in members if t in made.members]
            if not here:
                continue
            formats = {base.format for base in made.bases}
            shared = formats if shared is None else shared & formats
            for k, (owner, o) in enumerate(relaxed.index):
                if owner == c and relaxed.values[k] > 0:
                    format = made.meaning[made.menu.options[o]].format
                    part = len(here) / len(made.members)
                    use[format] = use.get(format, 0.0) + relaxed.values[k] * part * made.table.params
        ranked = sorted(shared or (), key=lambda f: (-use.get(f, 0.0), f))
        for format in ranked:
            trial = pinned(request, {model.tables[t].name: (format,) for t in members})
            try:
                if not state_problem(with_request(program, trial), calibration).relax().exceeded:
                    request = trial
                    break
            except InfeasibleError:
                continue
        else:
            raise InfeasibleError(
                f"the tables {', '.join(model.tables[t].name for t in members[:4])} must agree on a format and none "
                "fits the budgets; raise a budget or loosen formats.groups",
                conflict=(f"formats.groups[{group}]",),
            )
    return request
