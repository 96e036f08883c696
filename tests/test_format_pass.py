"""The format pass: budgets kept, optimum of the knapsack by brute force, joint with sharding, wire and GEMMs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import planner
from cost_models.calibration import GPU, default_calibration
from cost_models.gemm_formats import gemm_price
from ir.constraints import Constraints
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatRequest, LossChange, Sensitivity
from ir.ops import EmbeddingTable, Op
from ir.plan import Plan
from ir.program import Model, Options, Program
from ir.tier_plan import TierRequest
from ir.units import format_bytes
from ir.workload import FeatureStats, Workload
from passes.assignment.problem import evaluate
from passes.format_knapsack import KnapsackOption, solve_knapsack
from passes.format_slack import least_in_place
from passes.joint_solve import best_traffic
from planner.presets import preset
from planner.verification import verify

TABLES = tuple(EmbeddingTable(f"t{i}", 100_000 * (i + 1), 64, (f"f{i}",)) for i in range(6))
OPS = (
    Op("x", "input", out_shape=(1, 512), dtype="fp32", activation_bytes=2048),
    *(
        Op(f"fc{i}", "gemm", inputs=("x",), out_shape=(1, 4096), flops=2 * 4096 * 4096, params=4096 * 4096,
           activation_bytes=4 * 4096, phase="top", gemm=(4096, 4096))
        for i in range(3)
    ),
)  # fmt: skip
WORKLOAD = Workload(8192, {f"f{i}": FeatureStats(pooling_factor=8.0) for i in range(6)}, compute_dtype="bf16")


def compiled(
    request: FormatRequest,
    mode: str = "train",
    tables: tuple[EmbeddingTable, ...] = TABLES,
    ops: tuple[Op, ...] = OPS,
) -> Plan:
    """A verified plan of the small model on one H100 host."""
    plan = planner.compile(
        Model("m", (*tables,), ops), "h100-1x8", WORKLOAD, constraints=Constraints(formats=request), mode=mode,  # type: ignore[arg-type]
        time_limit=0.3,
    )  # fmt: skip
    assert [finding for finding in verify(plan) if finding.faults] == []
    return plan


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_is_the_optimum_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members = [
        [
            KnapsackOption(float(rng.uniform(0, 2)), (float(rng.uniform(0, 3)), float(rng.uniform(0, 3))))
            for _ in range(4)
        ]
        for _ in range(5)
    ]
    budgets = (7.0, 8.0)
    best = min(
        sum(o.objective for o in combination)
        for combination in itertools.product(*members)
        if all(sum(o.cost[b] for o in combination) <= budgets[b] for b in range(2))
    )
    found = solve_knapsack(members, budgets)
    assert found.value == pytest.approx(best, rel=1e-6)
    assert found.bound <= best * (1 + 1e-6)


def test_narrower_tables_take_fewer_bytes_of_memory_and_of_the_wire() -> None:
    wide = compiled(FormatRequest(max_loss=0.0))
    narrow = compiled(FormatRequest(max_loss=1e-2))
    assert {table.format for table in wide.table_plans} == {"fp32"}
    # tables that are not on the slowest rank may stay wide
    assert {table.format for table in narrow.table_plans} & {"bf16", "fp16"}
    assert wide.workload.exchange_dtype == "fp32"
    assert narrow.workload.exchange_dtype in ("bf16", "fp16")
    for before, after in zip(wide.table_plans, narrow.table_plans, strict=True):
        if before.option == after.option and after.format != "fp32":
            assert after.memory["weights"] * 2 == before.memory["weights"]
            assert after.memory["io"] < before.memory["io"]
    assert narrow.timeline.step < wide.timeline.step


def test_the_least_step_falls_as_the_budget_grows_and_bounds_hold() -> None:
    section = compiled(
        FormatRequest(max_loss=1e-2, pareto=4, rules={"traffic.*": ("fp32",)})
    ).decisions.formats
    assert section is not None
    assert len(section.pareto) >= 3
    for before, after in itertools.pairwise(section.pareto):
        assert after.bound <= before.bound * (1 + 1e-9)
        assert after.objective <= before.objective
    for point in section.pareto:
        assert point.bound <= point.objective * (1 + 1e-9)
        assert point.loss <= point.budget * (1 + 1e-9)
        # the plan itself is a point of every budget that it keeps
        assert point.objective <= section.objective or point.budget < section.loss


def test_average_bits_and_measured_sensitivities_decide_which_table_stays_wide() -> None:
    measured = {f"t{i}": {"bf16": LossChange(1.0 if i == 3 else 1e-6)} for i in range(6)}
    request = FormatRequest(
        objective="loss",
        average_bits=20.0,
        formats={"table": ("fp32", "bf16"), "weight": ("bf16",), "activation": ("bf16",)},
        sensitivity=Sensitivity(measured, "loss change", "log-loss"),
    )
    plan = compiled(request)
    section = plan.decisions.formats
    assert section is not None
    assert plan.tables["t3"].format == "fp32"
    assert section.average_bits <= 20.0
    # every choice of formats within the bound, by hand: t3 alone carries a loss worth avoiding
    best = min(
        sum(measured[t.name]["bf16"].mean for t, wide in zip(TABLES, kept, strict=True) if not wide)
        for kept in itertools.product((False, True), repeat=6)
        if sum(t.params * (32 if wide else 16) for t, wide in zip(TABLES, kept, strict=True))
        + 16 * 3 * 4096**2
        <= 20.0 * (sum(t.params for t in TABLES) + 3 * 4096**2)
    )
    assert sum(t.loss for t in section.tensors if t.kind == "table") == pytest.approx(best)


def test_tied_tensors_agree_and_pins_hold() -> None:
    request = FormatRequest(
        max_loss=1e-2,
        rules={"t0": ("fp32",), "fc0.*": ("bf16",)},
        groups=(("t1", "t4"), ("fc1.weight", "fc2.weight")),
    )
    section = compiled(request).decisions.formats
    assert section is not None
    assert section.format_of("t0") == "fp32"
    assert section.format_of("fc0.weight") == section.format_of("fc0.input") == "bf16"
    assert section.format_of("t1") == section.format_of("t4")
    assert section.format_of("fc1.weight") == section.format_of("fc2.weight")


def test_a_step_limit_is_kept_at_the_least_loss() -> None:
    wire = {"traffic.*": ("fp32",)}
    wide, narrow = (compiled(FormatRequest(max_loss=most, rules=wire)) for most in (0.0, 1.0))
    limit = 0.5 * (wide.certificate.objective + narrow.certificate.objective)
    plan = compiled(FormatRequest(objective="loss", max_step=limit, rules=wire))
    section = plan.decisions.formats
    assert section is not None
    assert plan.certificate.objective <= limit
    assert 0 <= section.lower_bound <= section.loss
    assert narrow.decisions.formats is not None
    assert section.loss < narrow.decisions.formats.loss


def test_the_slack_of_a_placed_plan_goes_into_the_least_loss_by_brute_force() -> None:
    """Tables where they lie, every combination of formats tried."""
    formats = ("fp32", "bf16", "mx9", "mx6", "mx4")
    weight = dict(zip((t.name for t in TABLES), (3.0, 1.0, 0.2, 0.7, 5.0, 0.05), strict=True))
    error = {"fp32": 0.0, "bf16": 1e-6, "mx9": 2e-5, "mx6": 1.5e-3, "mx4": 2.7e-2}
    known = {name: {f: LossChange(w * error[f]) for f in formats} for name, w in weight.items()}
    asked = FormatRequest(
        max_loss=0.1,
        formats={"table": formats},
        rules={"traffic.*": ("fp32",)},
        kernels="emulate",
        sensitivity=Sensitivity(known, "x", "loss"),
    )
    machine = preset("h100-1x4")
    options = Options(constraints=Constraints(formats=asked), time_limit=0.3)
    program = Program(Model("m", TABLES, ()), machine, WORKLOAD, options)
    problem, joint, _ = best_traffic(program, default_calibration(machine))
    rows = []
    for t, (row, j) in enumerate(zip(joint.problem.options, joint.solution.choice, strict=True)):
        meaning = next(c for c in problem.classes if t in c.members).meaning
        same = [o for o in meaning if meaning[o].priced.option == meaning[row[j]].priced.option]
        places = (joint.solution.placement[t],)
        placed = [evaluate(replace(joint.problem, options=((o,),)), (0,), places) for o in same]
        rows.append([(o.cost[0], *one) for o, one in zip(same, placed, strict=True)])
    tried = [
        (
            problem.frame.base + float(sum(loads for _, loads, _ in made).max(axis=0).sum()),
            float(sum(memory for _, _, memory in made).max()),
            sum(cost for cost, _, _ in made),
        )
        for made in itertools.product(*rows)
    ]
    spent = joint.solution.spent[0]
    for slack in (1.0, 1.01, 1.02, 1.05):
        limit = slack * joint.step
        fine = [c for step, memory, c in tried if step <= limit and memory <= problem.frame.capacity]
        found = least_in_place(problem, joint, "loss", limit)
        if found is None:
            assert min(fine) >= spent * (1 - 2e-3)
            continue
        assert found.step <= limit
        assert found.solution.spent[0] == pytest.approx(min(fine), rel=2e-3)
    assert found is not None
    assert found.solution.spent[0] < 0.9 * spent


def test_every_bound_holds_whatever_is_minimised() -> None:
    """Tables alone; the fewest bytes within a loss, with and without a limit on the step that they alone exceed."""
    wide = compiled(FormatRequest(max_loss=0.0), ops=())
    fewest = FormatRequest(objective="memory", max_loss=1e-2, formats={"table": ("fp32", "bf16")})
    narrow = compiled(fewest, ops=())
    assert narrow.decisions.formats is not None
    assert narrow.decisions.formats.objective == narrow.decisions.formats.bytes
    assert {t.format for t in narrow.table_plans} == {"bf16"}
    limit = 1.02 * narrow.certificate.objective
    assert limit < wide.certificate.objective
    kept = compiled(replace(fewest, max_step=limit), ops=())
    assert kept.certificate.objective <= limit
    assert kept.decisions.formats is not None
    assert kept.decisions.formats.bytes == narrow.decisions.formats.bytes
    for request in (replace(fewest, max_step=1e-6), FormatRequest(max_loss=0.0, max_step=limit)):
        with pytest.raises(InfeasibleError, match=r"reach(es)? a step of .* within formats.max_loss"):
            compiled(request, ops=())


def test_a_loss_that_is_minimised_is_not_spent_on_the_wire() -> None:
    """The traffic stays wide, and what is reported is the loss of the plan."""
    section = compiled(FormatRequest(objective="loss", average_bits=16.0), ops=()).decisions.formats
    assert section is not None
    assert {t.format for t in section.tensors if t.kind == "traffic"} == {"fp32"}
    assert section.objective == pytest.approx(section.loss)


def test_names_with_brackets_are_held_to_their_formats() -> None:
    tables = tuple(replace(table, name=f"t[{i}]") for i, table in enumerate(TABLES))
    request = FormatRequest(objective="memory", max_loss=1.0, formats={"table": ("fp32", "bf16")})
    plan = compiled(request, tables=tables, ops=())
    assert {t.format for t in plan.table_plans} == {"bf16"}


def test_formats_without_a_kernel_are_refused_or_emulated() -> None:
    pinned = FormatRequest(max_loss=1.0, rules={"t2": ("mx6",)})
    with pytest.raises(InfeasibleError, match="no kernel"):
        compiled(pinned)
    plan = compiled(replace(pinned, kernels="emulate"))
    assert plan.tables["t2"].format == "mx6"
    assert plan.decisions.formats is not None
    assert next(t for t in plan.decisions.formats.tensors if t.name == "t2").emulated


def test_inference_tables_take_padded_integer_rows() -> None:
    plan = compiled(FormatRequest(max_loss=0.2), mode="inference", tables=TABLES)
    for table in plan.table_plans:
        if table.format is not None and table.format.startswith("int4"):
            # FBGEMM: 32 bytes of codes, 4 of scale and bias, padded to 16
            copies = 8 if table.sharding_type == "data_parallel" else 1
            assert table.memory["weights"] >= copies * table.rows * 48
    assert any(table.format != "fp32" for table in plan.table_plans)


def test_quantising_small_gemms_does_not_pay() -> None:
    """The casts of a skinny product cost more than the faster product saves; of a large one they do not."""
    device = planner.topology("h100-1x8").device

    def gain(m: int, n: int) -> float:
        plain = gemm_price(m, 4096, n, "bf16", "bf16", "bf16", device, GPU, train=False).seconds
        return plain - gemm_price(m, 4096, n, "fp8_row", "fp8_row", "bf16", device, GPU, train=False).seconds

    assert gain(1024, 64) < 0 < gain(65536, 16384)


def test_an_objective_without_a_bound_is_an_input_error() -> None:
    with pytest.raises(InputError, match="average_bits"):
        compiled(FormatRequest(objective="loss"))
    with pytest.raises(InfeasibleError, match="budgets"):
        compiled(FormatRequest(objective="step", average_bits=1.0))


@pytest.mark.parametrize(
    ("asked", "named"), [({"formats": FormatRequest()}, "formats"), ({"tiers": TierRequest()}, "tiers")]
)
def test_formats_and_tiers_of_single_tensors_are_refused_for_decoders(
    asked: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=f"constraints.{named} "):
        planner.compile("llama-tiny", "local-2", constraints=Constraints(**asked))


def test_what_a_knapsack_would_take_next_is_named_with_its_trade() -> None:
    """Two formats: the next is the other one, and it trades the bytes and losses between them."""
    request = FormatRequest(
        objective="loss",
        average_bits=20.0,
        formats={"table": ("fp32", "bf16"), "weight": ("bf16",), "activation": ("bf16",)},
    )
    section = compiled(request).decisions.formats
    assert section is not None
    tables = [t for t in section.tensors if t.kind == "table"]
    assert {(t.format, t.runner_up) for t in tables} == {("fp32", "bf16"), ("bf16", "fp32")}
    for tensor in tables:
        assert ("save" if tensor.format == "fp32" else "take") in tensor.reason
        assert format_bytes(2 * tensor.elements) in tensor.reason
