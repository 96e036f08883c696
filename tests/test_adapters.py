"""Adapters: our one-shard prices against TorchRec's own enumeration; HugeCTR costs by hand."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

from cost_models.adapters.hugectr import GB, ROW_BYTES, HugeCTRObjective, replicated_tables
from cost_models.adapters.torchrec import TorchRecObjective, widths
from passes.assignment import solve

EXPERT = (
    Path(__file__).resolve().parent.parent / "planner" / "data" / "measured" / "hugectr_expert_plans.json"
)

TABLES = [("a", 40_000, 64, 7.0), ("b", 900, 64, 1.0), ("c", 1_000_003, 32, 20.0), ("d", 129, 128, 3.0)]


@pytest.fixture(scope="module", params=[(8, 8), (16, 8), (16, 4)])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A module, a topology and TorchRec's own enumeration at every ``min_partition``."""
    pytest.importorskip("torchrec")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    import torch
    import torchrec
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import ParameterConstraints, Topology
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
    from torchrec.distributed.types import ShardingType
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    world, host = request.param
    module = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=[f"f_{n}"])
            for n, r, d, _ in TABLES
        ],
    )
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, module.parameters(), {"lr": 0.01})
    topology = Topology(world_size=world, compute_device="cuda", local_world_size=host)
    sharders = [EmbeddingBagCollectionSharder()]
    enumerated = []
    for width in (16, 32, 64, None):
        constraints = {
            n: ParameterConstraints(
                pooling_factors=[p], min_partition=width, sharding_types=[k.value for k in ShardingType]
            )
            for n, _, _, p in TABLES
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enumerated += EmbeddingEnumerator(topology, 512, constraints).enumerate(module, sharders)
    limits = {n: ParameterConstraints(pooling_factors=[p]) for n, _, _, p in TABLES}
    return {
        "module": module,
        "sharders": sharders,
        "topology": topology,
        "limits": limits,
        "enumerated": [o for o in enumerated if o.compute_kernel in ("dense", "fused")],
        "spilled": [o for o in enumerated if o.compute_kernel in ("fused_uvm", "fused_uvm_caching")],
    }


def build(case: dict[str, Any], objective: Any = "total") -> TorchRecObjective:
    return TorchRecObjective(
        case["module"], case["sharders"], case["topology"], 512, case["limits"], objective=objective
    )


@pytest.mark.parametrize("objective", ["total", "total+input"])
def test_every_option_of_torchrec_is_offered_at_its_price(case: dict[str, Any], objective: str) -> None:
    """TorchRec prices every shard on every rank; one shard a option must give the same loads."""
    model = build(case, objective)
    problem = model.problem()
    menus = {
        name: {(r.sharding_type, r.width): o for r, o in zip(recipes, options, strict=True)}
        for name, recipes, options in zip(problem.names, model.recipes, problem.options, strict=True)
    }
    for theirs in case["enumerated"]:
        kind, width = theirs.sharding_type, theirs.shards[0].size[1]
        if kind == "table_column_wise":
            kind = "column_wise"  # same price, fewer places: offered as column-wise only
        if width == theirs.tensor.shape[1]:
            kind = {"column_wise": "table_wise", "grid_shard": "table_row_wise"}.get(kind, kind)
        (piece,) = menus[theirs.name][kind, width].pieces
        for shard in theirs.shards:
            price = shard.perf.total + (shard.perf.input_dist_comms if objective == "total+input" else 0.0)
            assert price == pytest.approx(piece.load[0], rel=1e-12)
            assert shard.storage.hbm <= piece.memory * (1 + 1e-12)
        places = {"rank": 1, "host": model.host_size, "all": case["topology"].world_size}[piece.scope]
        assert len(theirs.shards) == piece.count * places


def test_host_memory_is_limited_where_tables_may_spill(case: dict[str, Any]) -> None:
    model = TorchRecObjective(
        case["module"], case["sharders"], case["topology"], 512, case["limits"], spill=True
    )
    problem = model.problem()
    assert problem.limits == (min(d.storage.ddr for d in case["topology"].devices),)
    menus = {
        name: {(r.sharding_type, r.kernel, r.width): o for r, o in zip(recipes, options, strict=True)}
        for name, recipes, options in zip(problem.names, model.recipes, problem.options, strict=True)
    }
    whole = [o for o in case["spilled"] if o.sharding_type in ("table_wise", "row_wise", "table_row_wise")]
    assert len(whole) > 20
    for theirs in whole:
        key = (theirs.sharding_type, theirs.compute_kernel, int(theirs.tensor.shape[1]))
        (piece,) = menus[theirs.name][key].pieces
        assert piece.extra == (max(shard.storage.ddr for shard in theirs.shards),)
        assert piece.memory == max(shard.storage.hbm for shard in theirs.shards)
    assert not build(case).problem().limits


def test_our_objective_is_what_torchrec_scores(case: dict[str, Any]) -> None:
    for objective, field in (("total", "total"), ("total+input", "with_input")):
        model = build(case, objective)
        solution = solve(model.problem(), effort="quick")
        options = model.sharding_options(solution.choice, solution.placement)
        score = model.score(options)
        assert getattr(score, field) == pytest.approx(solution.objective, rel=1e-9)
        assert score.legal
        assert score.hbm <= solution.memory.max() * (1 + 1e-9)


def test_shards_cover_every_table_once(case: dict[str, Any]) -> None:
    model = build(case)
    problem = model.problem()
    for j in range(max(len(options) for options in problem.options)):
        choice = [min(j, len(options) - 1) for options in problem.options]
        placement = [
            [-1 if p.scope == "all" else k for p in options[c].pieces for k in range(p.count)]
            for options, c in zip(problem.options, choice, strict=True)
        ]
        if any(
            place >= (model.hosts if options[c].pieces[0].scope == "host" else 10**9)
            for options, c, places in zip(problem.options, choice, placement, strict=True)
            for place in places
        ):
            placement = [[min(p, model.hosts - 1) for p in places] for places in placement]
        for option in model.sharding_options(choice, placement):
            rows, dim = option.tensor.shape
            cells = sum(s.size[0] * s.size[1] for s in option.shards)
            copies = case["topology"].world_size if option.sharding_type == "data_parallel" else 1
            assert cells == rows * dim * copies
            corners = {(tuple(s.offset), s.rank if copies > 1 else 0) for s in option.shards if s.size[0]}
            assert len(corners) == sum(1 for s in option.shards if s.size[0])
            assert all(0 <= s.rank < case["topology"].world_size for s in option.shards)


def test_widths_follow_min_partition() -> None:
    assert widths(128, 16) == (16, 32, 64)
    assert widths(128, 128) == ()
    assert widths(48, 16) == (16, 24)
    assert widths(6, 1) == ()  # no divisor is a multiple of 4


def test_hugectr_cost_by_hand() -> None:
    model = HugeCTRObjective((1000, 10), (8.0, 3.0), 4, 2.0, 1e9, frozenset())
    # table 0 on buckets 0 and 1: 8/2 + 2 each; table 1 whole on bucket 1: 3 + 2
    cost, memory = model.cost([[0], [0, 1], [], []])
    assert cost == 8 / 2 + 2 + 3 + 2
    assert memory == (1000 / 2 + 10) * ROW_BYTES
    with pytest.raises(ValueError, match="two shards"):
        model.cost([[0, 0], [1], [], []])
    with pytest.raises(ValueError, match="power of two"):
        model.cost([[0], [0], [0], [1]])


def test_published_expert_costs_are_reproduced() -> None:
    tables = json.loads(
        (EXPERT.parent.parent / "tables" / "mlperf_dlrm_dcnv2.json").read_text(encoding="utf-8")
    )["tables"]
    rows = tuple(t["rows"] for t in tables)
    for name, case in json.loads(EXPERT.read_text(encoding="utf-8"))["plans"].items():
        replicated = replicated_tables(rows, case["dp_threshold_GB"])
        assert sorted(replicated) == case["dp_tables"], name
        model = HugeCTRObjective(
            rows,
            tuple(float(t["pooling_factor"]) for t in tables),
            case["buckets"],
            case["mem_comm_bw_ratio"] / case["mem_comm_work_ratio"],
            case["mem_cap_GB_per_bucket"] * GB,
            replicated,
        )
        assert model.cost(case["shard_matrix"])[0] == pytest.approx(case["max_cost"])


def test_hugectr_solution_is_a_plan_of_their_kind() -> None:
    model = HugeCTRObjective((10**6, 10**5, 50), (10.0, 4.0, 1.0), 4, 1.5, 4e9, frozenset({2}))
    solution = solve(model.problem(), effort="quick")
    matrix: list[list[int]] = [[] for _ in range(4)]
    for table in (0, 1):
        for bucket in solution.placement[table]:
            matrix[bucket].append(table)
    assert model.cost(matrix)[0] == pytest.approx(solution.objective)
