"""The growth pass: schedule, which layers shrink, prices against FLOP counters, phases against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import planner
from codegen.growth import phase_plan
from cost_models.growth import cheapest_path, move_bytes, prunable_layers, shrunk
from ir.capture import capture
from ir.constraints import Constraints
from ir.errors import InfeasibleError, InputError
from ir.growth import GrowthRequest, kept_units, schedule
from ir.workload import Workload
from planner.explain import explain_plan
from planner.render import to_text
from planner.verification import verify
from tests.plans import Decision, Table, table_plan, topology

requests = st.builds(
    GrowthRequest,
    steps=st.integers(10, 10**6),
    sparsity=st.floats(0.05, 0.95),
    regrow=st.floats(0, 1),
    cycles=st.integers(1, 9),
    warmup=st.floats(0, 0.45),
    final=st.floats(0.01, 0.5),
)


@given(requests)
def test_a_schedule_fills_the_training_and_ends_at_full_size(request: GrowthRequest) -> None:
    phases = schedule(request)
    assert sum(steps for _, steps, _ in phases) == request.steps
    assert all(steps > 0 for _, steps, _ in phases)
    assert phases[-1][0] == "full"
    assert phases[-1][2] == 0
    assert {s for kind, _, s in phases if kind == "pruned"} <= {request.sparsity}


@given(st.integers(1, 5000), st.floats(0, 0.99), st.integers(1, 64))
def test_units_kept(units: int, sparsity: float, multiple: int) -> None:
    kept = kept_units(units, sparsity, multiple)
    assert 1 <= kept <= units
    assert kept == units or kept % multiple == 0
    if multiple == 1:
        assert abs(kept - units * (1 - sparsity)) <= 1


class Net(nn.Module):
    """Hidden layers that can shrink, and some that cannot: read by a norm, a sum, the output, or twice."""

    def __init__(self, mid: int = 32, wide: int = 64) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16)
        self.into, self.left, self.right = nn.Linear(16, mid), nn.Linear(mid, wide), nn.Linear(mid, 24)
        self.after = nn.Linear(wide, 24, bias=False)
        self.normed, self.norm, self.twice = nn.Linear(24, 20), nn.LayerNorm(20), nn.Linear(20, 20)
        self.out = nn.Linear(20, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.into(self.bag(ids)))
        y = self.after(torch.sigmoid(torch.relu(self.left(x)))) + self.right(x)
        y = self.norm(self.normed(y))
        return self.out(torch.tanh(self.twice(self.twice(y))))


INPUTS = (torch.zeros(8, 3, dtype=torch.int64),)


def test_the_layers_that_can_shrink() -> None:
    found = prunable_layers(capture(Net(), example_inputs=INPUTS))
    assert [(layer.producer, set(layer.consumers), layer.units) for layer in found] == [
        ("into", {"left", "right"}, 32),
        ("left", {"after"}, 64),
    ]
    kept = prunable_layers(capture(Net(), example_inputs=INPUTS), exclude=("le*",))
    assert [layer.producer for layer in kept] == ["into"]


@settings(deadline=None, max_examples=15)
@given(mid=st.integers(1, 32), wide=st.integers(1, 64))
def test_the_smaller_model_is_the_one_captured_from_a_smaller_module(mid: int, wide: int) -> None:
    model = capture(Net(), example_inputs=INPUTS)
    small = capture(Net(mid, wide), example_inputs=INPUTS)
    found = shrunk(model, prunable_layers(model), (mid, wide))
    assert [op.name for op in found.ops] == [op.name for op in small.ops]
    for mine, other in zip(found.ops, small.ops, strict=True):
        assert (mine.gemm, mine.params, mine.out_shape) == (other.gemm, other.params, other.out_shape)
        assert mine.flops == pytest.approx(other.flops)
        assert mine.activation_bytes == pytest.approx(other.activation_bytes)


@pytest.mark.parametrize("name", ["dlrm-small", "wukong-small", "dhen-small"])
def test_zoo_models_have_hidden_layers(name: str) -> None:
    from planner.models import resolve

    layers = prunable_layers(resolve(name).model)
    module: Any = resolve(name).module
    assert layers
    for layer in layers:
        assert module.get_submodule(layer.producer).out_features == layer.units
        assert {module.get_submodule(c).in_features for c in layer.consumers} == {layer.units}


@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=3, max_size=3), min_size=1, max_size=4
    ).filter(lambda rows: all(any(x is not None for x in row) for row in rows)),
    st.lists(st.floats(0, 50), min_size=36, max_size=36),
)
def test_the_path_is_the_cheapest_of_all(rows: list[list[float | None]], costs: list[float]) -> None:
    keys = [(i, a, b) for i in range(4) for a in range(3) for b in range(3)]
    moves = dict(zip(keys, costs, strict=True))

    def total(path: tuple[int, ...]) -> float:
        steps = [rows[i][c] for i, c in enumerate(path)]
        if any(s is None for s in steps):
            return float("inf")
        jumps = [moves[i, path[i - 1], path[i]] for i in range(1, len(path))]
        return sum(s for s in steps if s is not None) + sum(jumps)

    best = min(total(path) for path in itertools.product(range(3), repeat=len(rows)))
    assert total(cheapest_path(rows, moves)) == pytest.approx(best)


def test_bytes_moved_are_those_of_a_cell_by_cell_count() -> None:
    table = Table("t", 24, 16)
    decisions = [
        Decision("table_wise", (1,)),
        Decision("column_wise", (0, 3)),
        Decision("row_wise"),
        Decision("table_row_wise", (1,)),
        Decision("data_parallel"),
    ]
    plans = [table_plan(table, decision, 2, 2) for decision in decisions]
    work = Workload(optimizer="adagrad")  # 4 bytes of weight and 4 of state an element
    for before, after in itertools.product(plans, plans):

        def cells(plan: Any, rank: int) -> set[tuple[int, int]]:
            return {
                (r, c)
                for s in plan.on_rank(rank)
                for r in range(s.row, s.row + s.rows)
                for c in range(s.col, s.col + s.cols)
            }

        expected = tuple(8 * len(cells(after, rank) - cells(before, rank)) for rank in range(4))
        assert move_bytes([before], [after], topology(2, 2), work) == expected


TABLES = [{"name": f"t{i}", "rows": 40_000, "dim": 32, "features": [f"f{i}"]} for i in range(4)]


def compiled(limit: int | None = None, tables: Any = TABLES, **request: Any) -> planner.Plan:
    """A DLRM with a wide top MLP under a growth request."""
    from planner.zoo import build

    made = build("dlrm", tables=tables, bottom=(64, 32), top=(2048, 2048, 1), embeddings="plain")
    asked = GrowthRequest(**{"steps": 1000, "sparsity": 0.5} | request)
    work = replace(made.workload, global_batch=4096)
    return planner.compile(
        made.module,
        "h100-1x2",
        work,
        constraints=Constraints(growth=asked, memory_limit=limit),
        time_limit=2.0,
    )


def test_the_flop_saving_is_that_of_the_schedules_integral() -> None:
    plan = compiled(warmup=0.25, final=0.25, cycles=1, regrow=0.0)
    growth: Any = plan.decisions.growth
    # 62 and 2048, 2048: half the units for half the steps; (1 - s)^2 where both sides shrink, else (1 - s)
    both, one = 2048 * 2048, 64 * 13 + 64 * 32 + 42 * 2048 + 2048
    rest = 25 * 32  # the interaction: 5 vectors, all products
    expected = 0.5 * (0.75 * both + 0.5 * one) / (both + one + rest)
    assert growth.flop_saving == pytest.approx(expected, rel=1e-3)
    assert 0 < growth.time_saving < growth.flop_saving
    assert growth.phases[-1].kept == tuple(layer.units for layer in growth.layers)


def test_the_plan_keeps_the_section_and_explains_it() -> None:
    plan = compiled(exchange_dtypes=("bf16",))
    growth: Any = plan.decisions.growth
    assert planner.Plan.from_dict(plan.to_dict()).decisions.growth == growth
    assert all(finding.ok for finding in verify(plan))
    assert [p.exchange_dtype for p in growth.phases] == ["bf16"] * (len(growth.phases) - 1) + ["fp32"]
    assert growth.seconds < growth.fixed_seconds < growth.dense_seconds
    text = to_text(explain_plan(plan))
    assert "growth and pruning of 3 hidden layers" in text
    assert text.count("pruned ") >= 2
    broken = replace(growth, phases=growth.phases[:-1])
    faults = verify(replace(plan, decisions=replace(plan.decisions, growth=broken)))
    assert any("not at full size" in fault for finding in faults for fault in finding.faults)
    with pytest.raises(InputError, match=r"phases 0\.\."):
        phase_plan(plan, 99)


def test_a_phase_gets_its_own_format_of_gemms_where_a_kernel_reads_it_and_it_pays() -> None:
    from planner.growth_render import render_growth

    plan = compiled(gemm_formats=("fp8_tensor",))
    growth: Any = plan.decisions.growth
    assert growth.phases[-1].gemm_format is None
    assert "fp8_tensor" in {phase.gemm_format for phase in growth.phases[:-1]}
    assert growth.seconds < growth.fixed_seconds
    assert planner.Plan.from_dict(plan.to_dict()).decisions.growth == growth
    assert all(finding.ok for finding in verify(plan))
    assert "fp8_tensor" in to_text(render_growth(plan), width=160)
    # a phase takes the format only where its step is shorter so
    wide: Any = compiled().decisions.growth
    for narrow, plain in zip(growth.phases, wide.phases, strict=True):
        assert narrow.step_seconds <= plain.step_seconds
        assert (narrow.gemm_format is None) == (narrow.step_seconds == plain.step_seconds)
    last = replace(growth.phases[-1], gemm_format="fp8_tensor")
    broken = replace(growth, phases=(*growth.phases[:-1], last))
    faults = verify(replace(plan, decisions=replace(plan.decisions, growth=broken)))
    assert any("not the plan's own format" in fault for finding in faults for fault in finding.faults)
    with pytest.raises(InfeasibleError, match="has no kernel"):
        compiled(gemm_formats=("mx9",))


def test_a_phase_gets_its_own_sharding_where_memory_lets_it_and_the_move_pays() -> None:
    """Beside the full model some tables must be split over ranks; beside the pruned one all may be copied."""
    small = [{**TABLES[0], "name": f"t{i}", "rows": 1000, "features": [f"f{i}"]} for i in range(24)]
    asked: dict[str, Any] = {"tables": small, "limit": 218 * 2**20, "sparsity": 0.75}
    tight = compiled(**asked, steps=10_000_000)
    assert {table.sharding_type for table in tight.table_plans} == {"data_parallel", "table_wise"}
    growth: Any = tight.decisions.growth
    assert growth.shardings
    assert growth.seconds < growth.fixed_seconds
    assert all(finding.ok for finding in verify(tight))
    number = next(i for i, p in enumerate(growth.phases) if p.sharding)
    moved = phase_plan(tight, number)
    changed = {
        t.name for t, u in zip(tight.table_plans, moved.table_plans, strict=True) if t.shards != u.shards
    }
    assert changed == {entry.name for entry in growth.shardings[growth.phases[number].sharding - 1]}
    named = ("tables", "ranks", "coverage", "geometry", "kernels")
    assert all(finding.ok for finding in verify(moved) if finding.check in named)
    # a training so short that the move costs more than it gains stays as it is
    short: Any = compiled(**asked, steps=10).decisions.growth
    assert not any(phase.move_bytes for phase in short.phases)


def test_requests_that_cannot_be_met() -> None:
    from planner.zoo import build

    flat = build("dlrm", tables=TABLES, bottom=(32,), top=(1,), embeddings="plain").module
    asked = Constraints(growth=GrowthRequest(steps=100))
    with pytest.raises(InputError, match="no hidden layer to prune"):
        planner.compile(flat, "h100-1x2", constraints=asked, time_limit=1.0)
    with pytest.raises(InputError, match="for training"):
        planner.compile("dlrm-small", "h100-1x2", constraints=asked, mode="inference", time_limit=1.0)
    with pytest.raises(InputError, match="sparsity"):
        Constraints.from_dict({"growth": {"steps": 100, "sparsity": 1.5}})


def test_flops_of_a_phase_are_those_of_the_module_that_runs() -> None:
    from codegen.runtime.growth.resize import Resizer

    module = Net()
    model = capture(module, example_inputs=INPUTS)
    layers = prunable_layers(model)
    Resizer(module, layers).resize((8, 24))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*INPUTS)
    assert counter.get_total_flops() == shrunk(model, layers, (8, 24)).dense_flops * 8
