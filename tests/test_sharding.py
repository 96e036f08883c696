"""The sharding pass against exhaustive search, its limits, and its explanations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import planner
from cost_models.calibration import default_calibration
from cost_models.embedding import PHASES, phase_overheads
from cost_models.placed import rank_seconds
from ir.compression import CompressionRequest
from ir.dedup import DedupRequest
from ir.errors import InfeasibleError, InputError
from ir.format_plan import FormatRequest
from ir.growth import GrowthRequest
from ir.ops import EmbeddingTable
from ir.program import Model, Options, Program
from ir.reading import dump_record
from ir.tier_plan import TierRequest
from ir.workload import FeatureStats, Workload
from passes.sharding_prices import price_options
from planner.calibrate import calibration_path
from planner.verification import verify
from tests.conftest import small_model


def exhaustive_optimum(program: Program) -> float:
    """The best objective over every option and every placement, by enumeration (two ranks, one host)."""
    topology = program.topology
    calibration = default_calibration(topology)
    per_table = []
    for table in program.model.tables:
        loads = []  # each entry: phases x ranks
        for priced in price_options(program, table, calibration):
            whole = [unit for unit in priced.units for _ in range(unit.count)]
            places = [range(topology.world_size) if u.unit.scope == "rank" else (None,) for u in whole]
            for placing in itertools.product(*places):
                load = np.zeros((len(PHASES), topology.world_size))
                for unit, place in zip(whole, placing, strict=True):
                    column = np.array([unit.seconds[p] for p in PHASES])
                    if place is None:
                        load += column[:, None]
                    else:
                        load[:, place] += column
                loads.append(load)
        per_table.append(loads)
    best = min(sum(choice).max(axis=1).sum() for choice in itertools.product(*per_table))  # type: ignore[arg-type]
    fixed = phase_overheads(topology, program.workload, calibration, program.options.mode)
    return float(best) + sum(fixed.values())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(10, 10**6), st.sampled_from([16, 64])), min_size=1, max_size=4),
    st.lists(st.integers(1, 30), min_size=4, max_size=4),
)
def test_bound_below_exhaustive_optimum_below_plan(sizes: list[tuple[int, int]], pooling: list[int]) -> None:
    tables = tuple(EmbeddingTable(f"t{i}", n, dim, (f"f{i}",)) for i, (n, dim) in enumerate(sizes))
    model = Model("random", tables, ())
    work = Workload(4096, {f"f{i}": FeatureStats(float(p)) for i, p in enumerate(pooling[: len(tables)])})
    plan = planner.compile(model, "h100-1x2", work)
    program = Program(model, planner.topology("h100-1x2"), work, Options())
    best = exhaustive_optimum(program)
    assert plan.certificate.lower_bound <= best * (1 + 1e-9)
    assert plan.certificate.objective >= best * (1 - 1e-9)
    assert plan.certificate.objective <= best * 1.02
    assert all(finding.ok for finding in verify(plan, tables))


@pytest.mark.parametrize("topology", ["h100-1x1", "h100-1x8", "a100-4x4", "h100-16x8", "local-2"])
def test_the_objective_equals_the_price_of_what_was_placed(topology: str, workload: Workload) -> None:
    plan = planner.compile(small_model(), topology, workload)
    calibration = default_calibration(plan.topology)
    placed = rank_seconds(plan.table_plans, plan.topology, workload, calibration, "train")
    fixed = phase_overheads(plan.topology, workload, calibration, "train")
    total = sum(float(seconds.max()) for seconds in placed.values()) + sum(fixed.values())
    assert plan.certificate.objective == pytest.approx(total, rel=1e-9)
    assert all(finding.ok for finding in verify(plan))


def test_more_memory_never_makes_the_plan_slower(workload: Workload) -> None:
    model = small_model((2_000_000, 1_500_000, 1_000_000, 800_000, 64), dim=64)
    objectives = []
    for gib in (1.0, 1.2, 2.0, 8.0):
        limits = planner.Constraints(memory_limit=int(gib * 2**30))
        objectives.append(planner.compile(model, "h100-2x2", workload, constraints=limits).certificate)
    for tight, loose in itertools.pairwise(objectives):
        assert loose.lower_bound <= tight.lower_bound * (1 + 1e-9)
        assert loose.objective <= tight.objective * 1.01  # the search is not exhaustive


def test_a_table_larger_than_all_memory_names_the_budget(workload: Workload) -> None:
    with pytest.raises(InfeasibleError, match="t0") as caught:
        planner.compile(small_model((10**10, 9_000, 700, 2_500, 64), 128), "h100-1x8", workload)
    assert caught.value.exit_code == 3
    assert caught.value.conflict
    assert caught.value.relaxation


def test_tables_that_fit_one_by_one_but_not_together(workload: Workload) -> None:
    limits = planner.Constraints(memory_limit=400 * 2**20, memory_reserve=0.0)
    with pytest.raises(InfeasibleError) as caught:
        planner.compile(small_model((800_000,) * 5, 64), "h100-1x4", workload, constraints=limits)
    assert caught.value.relaxation


def test_maxima_are_never_split_by_rows() -> None:
    """The exchange of row shards sums them; a table of a device's size and a half must take columns."""
    table = EmbeddingTable(name="t", rows=200_000_000, dim=128, features=("t",), pooling="max")
    plan = planner.compile(Model("max", (table,), ()), "h100-2x8")
    assert {shard.rows for shard in plan.tables["t"].shards} == {table.rows}
    assert len(plan.tables["t"].shards) > 1
    limits = planner.Constraints(tables={"t": planner.TableConstraint(sharding_types=("row_wise",))})
    with pytest.raises(InfeasibleError, match="take the maximum"):
        planner.compile(Model("max", (table,), ()), "h100-2x8", constraints=limits)


def test_pins_are_kept(workload: Workload) -> None:
    rules = {
        "t*": planner.TableConstraint(sharding_types=("table_wise", "column_wise")),
        "t1": planner.TableConstraint(sharding_types=("row_wise",)),
        "t2": planner.TableConstraint(sharding_types=("table_wise",), ranks=(3,)),
    }
    plan = planner.compile(small_model(), "h100-2x2", workload, constraints=planner.Constraints(tables=rules))
    assert plan.tables["t1"].sharding_type == "row_wise"
    assert [shard.rank for shard in plan.tables["t2"].shards] == [3]
    assert {plan.tables[t].sharding_type for t in ("t0", "t3", "t4")} <= {"table_wise", "column_wise"}


def test_names_in_constraints_are_of_the_model(workload: Workload) -> None:
    """A name that nothing has is refused wherever constraints name things; a glob that matches nothing is said."""
    whole = planner.TableConstraint(sharding_types=("table_wise",))
    wrong = {
        r"tables names 't11'.*no such table \(did you mean 't1'": planner.Constraints(tables={"t11": whole}),
        r"tiers.tables names 'x'": planner.Constraints(tiers=TierRequest(tables={"x": ("dram",)})),
        r"format_error names 'x'": planner.Constraints(
            compression=CompressionRequest(format_error={"x": 0.0})
        ),
        r"formats.rules names 't1.stat'.*'t1.state'": planner.Constraints(
            formats=FormatRequest(rules={"t1.stat": ("fp32",)})
        ),
        r"formats.groups names 'x'": planner.Constraints(formats=FormatRequest(groups=(("t*", "x"),))),
        r"dedup.keep names 'f9'": planner.Constraints(dedup=DedupRequest(keep=("f9",))),
        r"growth.exclude names 'top'": planner.Constraints(growth=GrowthRequest(100, exclude=("top",))),
    }
    for message, limits in wrong.items():
        with pytest.raises(InputError, match=message):
            planner.compile(small_model(), "h100-2x2", workload, constraints=limits)
    globs = {"u*": whole, "t[12]": whole, "*": whole}
    plan = planner.compile(small_model(), "h100-2x2", workload, constraints=planner.Constraints(tables=globs))
    assert [w for w in plan.warnings if "constraints" in w] == [
        "constraints.tables: 'u*' matches no table of the model, so it limits nothing"
    ]
    named = Model("brackets", (EmbeddingTable("t[1]", 1000, 64, ("f0",)),), ())
    rules = planner.Constraints(tables={"t[1]": whole, "t[[]1]": whole})
    plan = planner.compile(named, "h100-2x2", workload, constraints=rules)
    assert len(plan.warnings) == 2  # the workload's further features, and this
    assert plan.warnings[1].endswith("for the table of that name write 't[[]1]'")


def test_tables_outside_collections_are_planned_and_said_to_be_there() -> None:
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.EmbeddingBag(1000, 16), torch.nn.Linear(16, 1))
    (said,) = [note for note in planner.compile(model, "h100-1x2").warnings if "collection" in note]
    assert said.startswith(
        "1 table is in no TorchRec collection, such as '0': to run the plan, put nn.EmbeddingBag"
    )
    zoo = planner.compile("dlrm-small", "h100-1x2", time_limit=0.5)
    assert not [note for note in zoo.warnings if "collection" in note]


def test_columns_too_few_to_split_say_so(workload: Workload) -> None:
    limits = planner.Constraints(tables={"t2": planner.TableConstraint(sharding_types=("column_wise",))})
    with pytest.raises(
        InfeasibleError, match=r"'t2'.*32 columns have no split over these ranks into blocks of 32"
    ):
        planner.compile(small_model(dim=32), "h100-2x2", workload, constraints=limits)


def test_a_pin_to_a_rank_that_does_not_exist(workload: Workload) -> None:
    rules = {"t2": planner.TableConstraint(sharding_types=("table_wise",), ranks=(9,))}
    with pytest.raises(InfeasibleError, match=r"t2.*rank 9 does not exist"):
        planner.compile(small_model(), "h100-2x2", workload, constraints=planner.Constraints(tables=rules))


def test_row_wise_adagrad_columns_are_split_only_when_allowed(workload: Workload) -> None:
    work = replace(workload, optimizer="rowwise_adagrad")
    pin = {"t0": planner.TableConstraint(sharding_types=("column_wise",), min_column_width=8)}
    with pytest.raises(InfeasibleError, match="one state per row"):
        planner.compile(small_model(), "h100-1x4", work, constraints=planner.Constraints(tables=pin))
    allowed = planner.Constraints(tables=pin, allow_state_split=True)
    plan = planner.compile(small_model(), "h100-1x4", work, constraints=allowed)
    assert plan.tables["t0"].sharding_type == "column_wise"


def test_the_runner_up_is_what_forcing_it_costs_at_most(model: Model, workload: Workload) -> None:
    """Re-solving with the runner-up pinned can only be better than the delta that was claimed."""
    plan = planner.compile(model, "h100-1x4", workload)
    for name in ("t0", "t3"):
        up = plan.tables[name].runner_up
        assert up is not None
        assert up.delta is not None
        kind = up.option.split(" x")[0]
        rules = {name: planner.TableConstraint(sharding_types=(kind,))}  # type: ignore[arg-type]
        forced = planner.compile(model, "h100-1x4", workload, constraints=planner.Constraints(tables=rules))
        assert forced.certificate.objective <= (plan.certificate.objective + up.delta) * 1.01


def test_constants_beside_a_topology_file_are_used(tmp_path, workload: Workload) -> None:  # type: ignore[no-untyped-def]
    """Half the row efficiency doubles the lookups: the file beside the topology is what decides."""
    machine = planner.topology("h100-1x4")
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump(machine.to_dict()))
    plain = planner.compile(small_model(), str(file), workload)
    constants = default_calibration(machine)
    slower = dump_record(replace(constants, row_efficiency=constants.row_efficiency / 2))
    calibration_path(file).write_text(yaml.safe_dump({"calibration": slower}))
    calibrated = planner.compile(small_model(), str(file), workload)
    assert calibrated.certificate.lower_bound > plain.certificate.lower_bound
    explicit = planner.compile(small_model(), str(file), workload, calibration=constants)
    assert explicit.certificate == plain.certificate
