"""Starts of the joint search by hand and brute force; and a plan is no worse than a rival's formats sharded alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import passes.assignment.joint
import passes.joint_search
import planner
from cost_models.calibration import default_calibration
from ir.constraints import Constraints
from ir.format_plan import FormatRequest, LossChange, Sensitivity
from ir.ops import EmbeddingTable
from ir.plan import Plan
from ir.program import Model, Options, Program
from ir.workload import FeatureStats, Workload
from passes.assignment import Solution, solve
from passes.assignment.budget import Budget
from passes.assignment.compiled import Compiled
from passes.assignment.polish import Polisher
from passes.joint import state_problem
from passes.joint_starts import FormatGroups, natural_starts
from planner.verification import verify

MENU = ("fp32", "bf16", "mx9", "mx6", "mx4")
BITS = dict(zip(MENU, (32, 16, 9, 6, 4), strict=True))
ERROR = dict(zip(MENU, (0.0, 3e-6, 2e-5, 1.5e-3, 3e-2), strict=True))  # orders of magnitude of 10^(-QSNR/10)
TABLES = tuple(
    EmbeddingTable(f"t{i}", rows, 64, (f"f{i}",))
    for i, rows in enumerate((2000, 10**5, 10**6, 4 * 10**6, 10**7))
)
MODEL = Model("m", TABLES, ())
LIMIT = 1.0  # seconds of deterministic work
WORKLOAD = Workload(16384, {f"f{i}": FeatureStats(pooling_factor=4.0 + 6 * i) for i in range(len(TABLES))})


def request(seed: int, **asked: object) -> FormatRequest:
    """Tables alone, with drawn sensitivities."""
    weights = np.random.default_rng(seed).lognormal(0.0, 2.0, len(TABLES))
    losses = {
        table.name: {f: LossChange(float(w) * ERROR[f]) for f in MENU}
        for table, w in zip(TABLES, weights, strict=True)
    }
    rules: dict[str, tuple[str, ...]] = {"traffic.*": ("fp32",), **asked.pop("rules", {})}  # type: ignore[dict-item]
    return FormatRequest(
        formats={"table": MENU}, rules=rules, kernels="emulate",
        sensitivity=Sensitivity(losses, "drawn", "loss"), **asked,  # type: ignore[arg-type]
    )  # fmt: skip


def grouped(asked: FormatRequest) -> FormatGroups:
    """The options of the joint problem by formats."""
    program = Program(
        MODEL, planner.topology("h100-1x8"), WORKLOAD, Options(constraints=Constraints(formats=asked))
    )
    problem = state_problem(program, default_calibration(program.topology))
    groups = FormatGroups.of(problem, problem.relax().duals)
    assert groups is not None
    return groups


@pytest.mark.parametrize("seed", range(3))
def test_starts_are_those_that_other_methods_choose(seed: int) -> None:
    known = request(seed).sensitivity
    assert known is not None
    losses = [known.tensors[table.name] for table in TABLES]
    budget = 0.03 * sum(row["mx4"].mean for row in losses)
    starts = natural_starts(grouped(request(seed, max_loss=budget)))

    def loss(formats: tuple[str, ...]) -> float:
        return sum(row[f].mean for row, f in zip(losses, formats, strict=True))

    def size(formats: tuple[str, ...]) -> int:
        return sum(BITS[f] * table.params for f, table in zip(formats, TABLES, strict=True))

    found = [tuple(key[0] for key in start) for start in starts]
    assert all(loss(formats) <= budget * (1 + 1e-9) for formats in found)
    # one format for all, wherever that keeps the budget
    for f in MENU:
        uniform = (f,) * len(TABLES)
        assert (uniform in found) == (loss(uniform) <= budget)
    # the fewest bytes of all 3,125 choices within the budget
    least = min(size(c) for c in itertools.product(MENU, repeat=len(TABLES)) if loss(c) <= budget)
    assert min(size(formats) for formats in found) == least


def plan(asked: FormatRequest) -> Plan:
    """A compiled and verified plan."""
    made = planner.compile(
        MODEL, "h100-1x8", WORKLOAD, constraints=Constraints(formats=asked), time_limit=0.5
    )
    assert [finding for finding in verify(made, TABLES) if finding.faults] == []
    return made


def test_all_searches_share_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the searches themselves: those for a sharding, and those that polish."""
    budgets: list[Budget] = []
    solved: list[float] = []

    class Counted(Polisher):
        def __init__(self, compiled: Compiled, bound: float, budget: Budget, *rest: Any) -> None:
            budgets.append(budget)
            super().__init__(compiled, bound, budget, *rest)

    def counted(*args: Any, **options: Any) -> Solution:
        found = solve(*args, **options)
        solved.append(found.work)
        return found

    monkeypatch.setattr(passes.assignment.joint, "solve", counted)
    monkeypatch.setattr(passes.assignment.joint, "Polisher", Counted)
    monkeypatch.setattr(passes.joint_search, "Polisher", Counted)
    tables = tuple(replace(table, name=f"{table.name}_{i}") for i in range(2) for table in TABLES)
    limits = Constraints(formats=FormatRequest(max_loss=0.05))
    planner.compile(Model("m", tables, ()), "h100-1x8", WORKLOAD, constraints=limits, time_limit=LIMIT)
    assert len(solved) > 2
    assert 0.3 * LIMIT <= sum(solved) + sum(budget.work for budget in budgets) <= 1.1 * LIMIT


def test_a_plan_is_no_worse_than_given_formats_of_the_same_loss() -> None:
    seed, formats = 1, ("fp32", "mx9", "mx9", "mx4", "mx6")
    pins = {table.name: (f,) for table, f in zip(TABLES, formats, strict=True)}
    given = plan(request(seed, rules=pins))
    assert given.decisions.formats is not None
    free = plan(request(seed, max_loss=given.decisions.formats.loss * (1 + 1e-6)))
    assert free.decisions.formats is not None
    assert free.decisions.formats.loss <= given.decisions.formats.loss * (1 + 2e-6)
    assert free.certificate.objective <= given.certificate.objective * (1 + 1e-9)
