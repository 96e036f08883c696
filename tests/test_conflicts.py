"""Infeasible inputs: the limits named are a minimal conflict, and the change named makes the problem compile.

Everything is asked of :func:`planner.compile` again; nothing here looks into how the diagnosis was made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import planner
from ir.constraints import Constraints, TableConstraint
from ir.errors import InfeasibleError
from ir.ops import EmbeddingTable
from ir.program import Model
from ir.workload import FeatureStats, Workload

ROOM = 2**50  # a limit that never binds


@dataclass(frozen=True)
class Case:
    """A problem to compile."""

    model: Model
    machine: planner.Topology
    workload: Workload
    constraints: Constraints

    def compile(self) -> planner.Plan:
        return planner.compile(
            self.model, self.machine, self.workload, constraints=self.constraints, time_limit=0.02
        )

    def fits(self) -> bool:
        try:
            self.compile()
        except InfeasibleError:
            return False
        return True

    def only(self, names: set[str]) -> Case:
        """The same with nothing in force but the limits named."""
        asked = self.constraints
        tables = {}
        for glob, rule in asked.tables.items():
            kept = {
                part.name: getattr(rule, part.name) if f"tables[{glob}].{part.name}" in names else None
                for part in fields(TableConstraint)
            }
            tables[glob] = TableConstraint(**kept)
        made = Constraints(
            memory_reserve=asked.memory_reserve if "hbm_budget" in names else 0.0,
            memory_limit=asked.memory_limit if "hbm_budget" in names else ROOM,
            min_column_width=asked.min_column_width if "min_column_width" in names else 4,
            allow_state_split="allow_state_split" not in names,
            tables=tables,
        )
        return replace(self, constraints=made)

    def all_limits(self) -> set[str]:
        names = {"hbm_budget", "min_column_width", "allow_state_split"}
        for glob, rule in self.constraints.tables.items():
            names |= {
                f"tables[{glob}].{part.name}" for part in fields(rule) if getattr(rule, part.name) is not None
            }
        return names

    def changed(self, change: Any) -> Case:
        made = self.only(self.all_limits() - set(change["without"])) if "without" in change else self
        machine = made.machine.with_hosts(change["hosts"]) if "hosts" in change else made.machine
        fresh = {name: value for name, value in change.items() if name not in ("without", "hosts")}
        return replace(made, machine=machine, constraints=replace(made.constraints, **fresh))


RULES = st.one_of(
    st.none(),
    st.builds(
        TableConstraint,
        sharding_types=st.sampled_from(
            [
                None,
                ("table_wise",),
                ("column_wise",),
                ("row_wise",),
                ("data_parallel",),
                ("column_wise", "table_wise"),
            ]
        ),
        min_column_width=st.sampled_from([None, None, 8, 64]),
        ranks=st.sampled_from([None, None, (0,), (0, 1), (1, 7)]),
    ),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(10_000, 400_000), min_size=count, max_size=count))
    dims = draw(st.lists(st.sampled_from([16, 64, 128]), min_size=count, max_size=count))
    tables = tuple(
        EmbeddingTable(f"t{i}", n, d, (f"f{i}",)) for i, (n, d) in enumerate(zip(rows, dims, strict=True))
    )
    rules = {name: draw(RULES) for name in ("*", "t0", "t1")[: count + 1]}
    optimizer = draw(st.sampled_from(["sgd", "adagrad", "rowwise_adagrad"]))
    machine = planner.topology(draw(st.sampled_from(["h100-1x2", "h100-2x2", "h100-1x4"])))
    total = sum(t.rows * t.dim for t in tables) * (8 if optimizer == "adagrad" else 4)
    share = draw(st.floats(0.2, 3.0))
    return Case(
        Model("random", tables, ()),
        machine,
        Workload(64, {f"f{i}": FeatureStats(2.0) for i in range(count)}, optimizer=optimizer),
        Constraints(
            memory_limit=int(share * total / machine.world_size) + 2**18,
            memory_reserve=draw(st.sampled_from([0.0, 0.15])),
            tables={name: rule for name, rule in rules.items() if rule is not None},
        ),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_conflicts_are_minimal_and_relaxations_help(case: Case) -> None:
    try:
        case.compile()
    except InfeasibleError as error:
        caught = error
    else:
        assume(False)
    named = set(caught.conflict)
    assert named <= case.all_limits()
    assert named
    assert caught.change
    assert caught.relaxation
    assert not case.only(named).fits()
    for name in named:
        assert case.only(named - {name}).fits(), name
    assert case.changed(caught.change).fits(), caught.relaxation


def one_table(rows: int, dim: int, topology: str, **limits: Any) -> Case:
    model = Model("one", (EmbeddingTable("t0", rows, dim, ("f0",)),), ())
    return Case(model, planner.topology(topology), Workload(960, {}, optimizer="sgd"), Constraints(**limits))


def caught(case: Case) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as found:
        case.compile()
    return found.value


def test_a_pin_that_memory_does_not_allow_names_both() -> None:
    pin = {"t0": TableConstraint(sharding_types=("table_wise",))}
    error = caught(one_table(10**6, 64, "h100-1x4", tables=pin, memory_limit=10**8))
    assert set(error.conflict) == {"hbm_budget", "tables[t0].sharding_types"}
    # 256 MB of weights and little else on one rank, 15 % of the limit held back
    assert error.change["memory_limit"] == pytest.approx(256e6 / 0.85, rel=0.01)


def test_a_rank_that_does_not_exist_is_its_own_conflict() -> None:
    error = caught(one_table(1000, 64, "h100-1x4", tables={"t*": TableConstraint(ranks=(9,))}))
    assert error.conflict == ("tables[t*].ranks",)
    assert error.change == {"without": ("tables[t*].ranks",)}


def test_more_than_the_machine_holds_asks_for_hosts() -> None:
    """2.56 TB of weights on devices of 68 GB usable: 38 devices at least, in hosts of 8."""
    case = one_table(10**10, 64, "h100-2x8", memory_reserve=0.15)
    error = caught(case)
    assert error.conflict == ("hbm_budget",)
    assert error.change == {"hosts": 5}
    assert case.changed(error.change).fits()


def test_a_reserve_that_is_too_large() -> None:
    case = one_table(200_000_000, 64, "h100-1x1", memory_reserve=0.5)
    error = caught(case)
    assert error.conflict == ("hbm_budget",)
    assert 0.3 < error.change["memory_reserve"] < 0.4  # 51.2 GB and buffers of 80 GB
    assert case.changed(error.change).fits()
