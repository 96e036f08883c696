"""One training through phases that shard tables otherwise: equal to the unsharded model, bytes as planned."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import planner
from codegen.growth import phase_plan
from codegen.phased import PhasedModel
from codegen.runtime.launch import launch
from cost_models.growth import move_bytes
from ir.constraints import Constraints, TableConstraint
from ir.dense_plan import DensePlan
from ir.errors import InputError
from ir.format_plan import FormatPlan, TensorFormat
from ir.growth import Growth, GrowthPhase, GrowthRequest
from ir.plan import Plan
from passes.growth import difference
from tests import growth_ranks

KINDS = (
    ("table_wise", "row_wise", "data_parallel", "column_wise"),
    ("row_wise", "data_parallel", "table_wise", "table_wise"),
    ("data_parallel", "column_wise", "row_wise", "table_wise"),
)
ADAGRAD, BY_ROW = ("adagrad", KINDS), ("rowwise_adagrad", tuple(k for k in KINDS if "column_wise" not in k))
STEPS = 3


def flat(kinds: tuple[str, ...], optimizer: str, ranks: int = 2, growth: bool = False) -> Plan:
    rules = {f"t{n}": TableConstraint(sharding_types=(kind,)) for n, kind in enumerate(kinds)}  # type: ignore[arg-type]
    asked = GrowthRequest(steps=60, warmup=0.0, cycles=1) if growth else None
    return planner.compile(
        growth_ranks.model(),
        f"local-{ranks}",
        planner.Workload(growth_ranks.BATCH, optimizer=optimizer, exchange_dtype="fp32"),  # type: ignore[arg-type]
        constraints=Constraints(min_column_width=8, tables=rules, growth=asked),
        time_limit=0.2,
    )


def moving(
    kinds: tuple[tuple[str, ...], ...],
    optimizer: str,
    wire: tuple[str, ...] = (),
    gemms: tuple[str | None, ...] = (),
) -> Plan:
    """A plan whose phases take the shardings of ``kinds`` in turn, and end with its own."""
    own = flat(kinds[0], optimizer, growth=True)
    others = [flat(k, optimizer).table_plans for k in kinds[1:]]
    section = own.decisions.growth
    assert section is not None
    full = tuple(layer.units for layer in section.layers)
    half = tuple(units // 2 for units in full)
    some = tuple(units * 3 // 4 for units in full)
    numbers = [0, *range(1, len(kinds)), 0]
    sizes = [half, *[some] * (len(numbers) - 2), full]
    types = [*wire, *["fp32"] * len(numbers)]
    formats = [*gemms, *[None] * len(numbers)]

    def phase(kept: tuple[int, ...], number: int, dtype: Any, format: str | None) -> GrowthPhase:
        kind: Any = "full" if kept == full else "pruned"
        return GrowthPhase(kind, STEPS, kept, 1.0, 1.0, 1, dtype, format, number)

    phases = tuple(phase(*one) for one in zip(sizes, numbers, types, formats, strict=False))
    moved = tuple(difference(own.table_plans, other) for other in others)
    return growth_ranks.with_phases(own, Growth(section.layers, phases, moved))


@pytest.mark.parametrize(("optimizer", "kinds"), [ADAGRAD, ("rowwise_adagrad", (KINDS[1], KINDS[1][::-1]))])
def test_tables_move_while_the_training_runs(optimizer: str, kinds: tuple[tuple[str, ...], ...]) -> None:
    plan = moving(kinds, optimizer)
    growth = plan.decisions.growth
    assert growth is not None
    found = launch("tests.growth_ranks:phased", 2, {"plan": plan.to_dict()}, timeout=240)
    reference = growth_ranks.alone(plan)
    starts = [STEPS * i for i in range(1, len(growth.phases))]
    assert [rank["began"] for rank in found] == [starts, starts]
    assert found[0]["widths"][0] == 16
    assert found[0]["widths"][-1] == 32
    for rank in found:
        assert set(rank["weights"]) == set(reference)
        for name, value in rank["weights"].items():
            assert_close(torch.tensor(value), reference[name], rtol=2e-5, atol=2e-6, msg=name)
    # what arrives is what the plan prices: weights and optimizer state that a rank did not hold before
    plans = [phase_plan(plan, i) for i in range(len(growth.phases))]
    expected = [0, 0]
    for before, after in itertools.pairwise(plans):
        sizes = move_bytes(before.table_plans, after.table_plans, plan.topology, plan.workload)
        expected = [total + size for total, size in zip(expected, sizes, strict=True)]
    assert [rank["received"] for rank in found] == expected
    assert min(expected) > 0


def test_a_training_in_phases_is_saved_and_resumed(tmp_path: Path) -> None:
    """Within a phase and where one ends, between shardings; units that left are kept, and at last all are in use."""
    plan, then = moving(KINDS, "adagrad"), moving(KINDS[::-1], "adagrad")
    arguments = {"plan": plan.to_dict(), "then": then.to_dict(), "flat": flat(KINDS[1], "adagrad").to_dict()}
    found = launch(
        "tests.growth_ranks:resumed", 2, arguments | {"folder": str(tmp_path), "stops": [4, 6]}, timeout=240
    )
    reference = growth_ranks.alone(plan)
    for rank in found:
        assert rank["same"]
        assert set(rank["weights"]) == set(reference)
        for name, value in rank["weights"].items():
            assert_close(torch.tensor(value), reference[name], rtol=2e-5, atol=2e-6, msg=name)


def test_a_phase_may_send_narrower_vectors() -> None:
    """fp16 on the wire in the first phase: close to fp32, and not the same."""
    plain, narrow = (moving(KINDS[:1], "adagrad", wire) for wire in ((), ("fp16",)))
    wide, half = (
        launch("tests.growth_ranks:phased", 2, {"plan": plan.to_dict()}, timeout=240)[0]
        for plan in (plain, narrow)
    )
    apart = [
        float((torch.tensor(wide["weights"][name]) - torch.tensor(value)).abs().max())
        for name, value in half["weights"].items()
    ]
    assert 0 < max(apart) < 1e-4


def test_layers_of_a_phase_compute_in_its_format_while_tables_move() -> None:
    """bf16 in the pruned phase and MX9 in the next: nearer to the unsharded model in them than that is to float32."""
    plan = moving(KINDS[:2], "adagrad", gemms=("bf16", "mx9"))
    found = launch("tests.growth_ranks:phased", 2, {"plan": plan.to_dict()}, timeout=240)
    reference, wide = growth_ranks.alone(plan), growth_ranks.alone(moving(KINDS[:2], "adagrad"))
    apart, effect = 0.0, 0.0
    for name, value in found[0]["weights"].items():
        assert_close(
            torch.tensor(found[1]["weights"][name]), torch.tensor(value), rtol=1e-6, atol=1e-7, msg=name
        )
        apart = max(apart, float((torch.tensor(value) - reference[name]).abs().max()))
        effect = max(effect, float((wide[name] - reference[name]).abs().max()))
    assert effect > 1e-4
    assert apart < effect / 5  # sums in another order are rounded to another neighbour now and then


def test_half_tables_move_with_their_states() -> None:
    """Fused kernels keep float32 states of them, the optimizer of copies has halves: states change type as they move."""
    plain = moving(KINDS[:2], "adagrad", gemms=("bf16",))
    tensors = tuple(TensorFormat(t.name, "table", "fp16", 1.0, 16.0, 0.0) for t in plain.table_plans)
    layers = tuple(
        TensorFormat(f"top_0.{what}", kind, "mx9", 1.0, 9.0, 0.0)
        for what, kind in (("weight", "weight"), ("input", "activation"))
    )
    formats = FormatPlan("step", 0.0, 0.0, 0.0, 0.0, 16.0, 0.0, 0.0, "", (*tensors, *layers))
    tables = tuple(replace(table, format="fp16") for table in plain.table_plans)
    half = replace(plain, table_plans=tables, decisions=replace(plain.decisions, formats=formats))
    wide, narrow = (
        launch("tests.growth_ranks:phased", 2, {"plan": plan.to_dict()}, timeout=240)[0]
        for plan in (plain, half)
    )
    assert narrow["losses"] == pytest.approx(wide["losses"], abs=1e-4)
    assert narrow["losses"] != wide["losses"]
    assert wide["received"] / 2 <= narrow["received"] < wide["received"]


def test_what_cannot_be_resized_is_refused() -> None:
    plan = flat(KINDS[0], "adagrad")
    with pytest.raises(InputError, match="has no growth section"):
        PhasedModel(plan, growth_ranks.model())
    grown = flat(KINDS[0], "adagrad", growth=True)
    split = replace(grown, decisions=replace(grown.decisions, dense=DensePlan("fsdp", 2, 1)))
    with pytest.raises(InputError, match="split over ranks cannot be resized"):
        PhasedModel(split, growth_ranks.model())
