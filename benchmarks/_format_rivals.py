"""Other ways to choose a format for each tensor under a bound on stored bits.

* :func:`greedy`: from the widest format everywhere, narrow the group that loses least for each bit saved.
* :func:`integer_program`: the choice of ModelOpt's ``auto_quantize`` and HAWQ-V3: a 0/1 program with one format a
  group, the sum of its sensitivities, and one bound on the bits of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ortools.linear_solver import pywraplp


@dataclass(frozen=True)
class Group:
    """Tensors that take one format: stored bits and predicted loss by format."""

    names: tuple[str, ...]
    bits: Mapping[str, float]
    losses: Mapping[str, float]


def greedy(groups: list[Group], bound: float) -> dict[str, str]:
    """Formats by tensor name; raises ValueError when the narrowest formats exceed the bound."""
    chosen = [max(group.bits, key=lambda f, g=group: (g.bits[f], -g.losses[f])) for group in groups]
    while sum(group.bits[f] for group, f in zip(groups, chosen, strict=True)) > bound:
        moves = [
            ((group.losses[f] - group.losses[now]) / (group.bits[now] - group.bits[f]), index, f)
            for index, (group, now) in enumerate(zip(groups, chosen, strict=True))
            for f in group.bits
            if group.bits[f] < group.bits[now]
        ]
        if not moves:
            raise ValueError("no choice fits the bound")
        _, index, chosen[index] = min(moves)
    return {name: f for group, f in zip(groups, chosen, strict=True) for name in group.names}


def integer_program(groups: list[Group], bound: float) -> dict[str, str]:
    """Formats by tensor name of least total loss; raises ValueError when nothing fits."""
    solver = pywraplp.Solver.CreateSolver("SCIP")
    takes = [{f: solver.BoolVar(f"{g}:{f}") for f in group.bits} for g, group in enumerate(groups)]
    for options in takes:
        solver.Add(sum(options.values()) == 1)
    pairs = [(group, f, x) for group, options in zip(groups, takes, strict=True) for f, x in options.items()]
    solver.Add(sum(group.bits[f] * x for group, f, x in pairs) <= bound)
    # losses are as small as 1e-6; a solver's tolerances are not
    solver.Minimize(sum(1e6 * group.losses[f] * x for group, f, x in pairs))
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        raise ValueError("no choice fits the bound")
    return {
        name: next(f for f, x in options.items() if x.solution_value() > 0.5)
        for group, options in zip(groups, takes, strict=True)
        for name in group.names
    }


def modelopt_scores(
    model: Any, batches: list[Any], loss: Any, paths: Mapping[str, str], narrow: Any, formats: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """ModelOpt's gradient score by group and format: the sum of (gradient x change of the output)^2.

    Args:
        paths: group -> path of its module.
        narrow: ``narrow(group, format)`` gives the module with weight and input in the format.
    """
    found: dict[str, dict[str, float]] = {group: dict.fromkeys(formats, 0.0) for group in paths}
    for batch in batches:
        calls: dict[str, Any] = {}
        hooks = [
            model.get_submodule(path).register_forward_hook(_recorder(calls, group), with_kwargs=True)
            for group, path in paths.items()
        ]
        loss(model, batch).backward()
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for group, (args, named, output) in calls.items():
                for format in formats:
                    change = narrow(group, format)(*args, **named) - output
                    found[group][format] += float((output.grad * change).double().square().sum())
    return found


def _recorder(calls: dict[str, Any], group: str) -> Any:
    def record(_: Any, args: Any, named: Any, output: Any) -> None:
        output.retain_grad()
        calls[group] = (args, named, output)

    return record
