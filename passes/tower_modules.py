"""How far each tower is compressed: the widths of the tower modules under an accuracy budget.

The loss of a width is the share of the energy of a tower's pooled embeddings (squares around the mean)
that no linear map to that many columns can carry: principal components are fitted on one half of the
sample and judged on the other. It stands in for the loss in accuracy, which only training shows. A width is a number
of vectors, each tower its own, or the number of columns that all vectors keep, the same for all towers, since
the over-arch multiplies vectors of different towers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ir.errors import InfeasibleError
from ir.tower_sample import PooledSample
from ir.towers import Narrowing

Floats = npt.NDArray[np.float64]

_UNITS = 10**6  # integer steps of the budget
_DETERMINISTIC = 5.0  # CP-SAT's deterministic seconds


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A tower's energy, and what is lost of it with 1, 2, ... vectors or columns (a fraction of 1 each)."""

    energy: float
    lost: Floats


def profile(
    sample: PooledSample, features: Sequence[str], dim: int, narrow: Narrowing = "vectors"
) -> Profile:
    """Measure a tower of vectors of ``dim`` columns; with all vectors, or columns, kept nothing is lost."""
    whole = sample.of(features)
    fit, judge = whole[0::2], whole[1::2]
    mean = fit.mean(0)
    fit, judge = fit - mean, judge - mean
    energy = float((judge**2).sum())
    count, size = (len(features), dim) if narrow == "vectors" else (dim, len(features))
    if energy <= 0:
        return Profile(0.0, np.zeros(count))
    # the components lie in the span of the samples, so the smaller Gram matrix is enough
    if len(fit) < fit.shape[1]:
        values, left = np.linalg.eigh(fit @ fit.T)
        kept = values > 1e-12 * max(values[-1], 1e-300)
        basis = fit.T @ (left[:, kept] / np.sqrt(values[kept]))
    else:
        basis = np.linalg.eigh(fit.T @ fit)[1]
    carried = np.cumsum(((judge @ basis[:, ::-1]) ** 2).sum(0))
    widths = np.minimum(np.arange(1, count + 1) * size, len(carried)) - 1
    lost = np.clip(1.0 - carried[widths] / energy, 0.0, 1.0)
    lost[-1] = 0.0
    return Profile(energy * len(whole) / len(judge), lost)


def fixed_widths(counts: Sequence[int], compression: float) -> list[int]:
    """Vectors that leave each tower at one ratio: rounded up, at least one."""
    return [max(1, math.ceil(count / compression - 1e-9)) for count in counts]


def columns_within(profiles: Sequence[Profile], budget: float) -> int:
    """The fewest columns of all vectors whose total loss stays within ``budget``; profiles by columns."""
    total = sum(p.energy for p in profiles)
    lost = np.sum([p.energy * p.lost for p in profiles], axis=0)
    return 1 + int(np.argmax(lost <= budget * total))


def widths_within(
    profiles: Sequence[Profile], dims: Sequence[int], budget: float, least: int = 1
) -> list[int]:
    """The widths that make the exchange between peers shortest while the energy lost stays in the budget.

    A multiple-choice knapsack in CP-SAT: minimise first the bytes of the busiest rank (it sends its tower's
    output to T - 1 peers and receives those of the other towers), then the sum of widths. ``least`` vectors leave
    every tower that has as many.

    Raises:
        InfeasibleError: never with a budget of 0 or more, because keeping all vectors loses nothing.
    """
    from ortools.sat.python import cp_model

    total = sum(p.energy for p in profiles)
    if total <= 0:
        return [min(least, len(p.lost)) for p in profiles]
    model = cp_model.CpModel()
    choice = [[model.new_bool_var("") for _ in p.lost] for p in profiles]
    columns, spent = [], []
    for picked, p, dim in zip(choice, profiles, dims, strict=True):
        model.add_exactly_one(picked[min(least, len(picked)) - 1 :])
        model.add(sum(picked) == 1)
        columns.append(sum((m + 1) * dim * use for m, use in enumerate(picked)))
        spent += [
            math.ceil(p.energy * lost / total * _UNITS - 1e-9) * use
            for use, lost in zip(picked, p.lost.tolist(), strict=True)
        ]
    model.add(sum(spent) <= math.floor(budget * _UNITS))
    most = sum(len(p.lost) * dim for p, dim in zip(profiles, dims, strict=True))
    busiest = model.new_int_var(0, most * len(profiles), "busiest rank")
    everything = sum(columns)
    for width in columns:
        model.add(busiest >= (len(profiles) - 1) * width)
        model.add(busiest >= everything - width)
    model.minimize(busiest * (most + 1) + everything)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = _DETERMINISTIC
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise InfeasibleError(
            f"no widths of the tower modules keep the energy lost within {budget:g}",
            conflict=("towers.accuracy_budget",),
            relaxation="a larger accuracy_budget",
        )
    return [1 + next(m for m, use in enumerate(picked) if solver.value(use)) for picked in choice]
