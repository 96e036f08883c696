"""The benchmark's fast twin of TorchRec's planner against the planner itself, step by step and whole."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchrec")

from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology, proposers
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.planner.utils import reset_shard_rank

from benchmarks import _torchrec_proposals as ours
from benchmarks._tables import Table
from benchmarks._torchrec_cases import Spec, Store
from benchmarks._torchrec_placing import Placer
from benchmarks._torchrec_rival import (
    Case,
    build_module,
    default_plan,
    plan_text,
    tuned_constraints,
    tuned_plans,
)
from benchmarks._torchrec_space import Pricing, Space
from benchmarks._torchrec_twin import Twin
from cost_models.adapters.torchrec import reserve

TABLES = [
    Table("a", 40_000_000, 64, 7.0),
    Table("b", 900, 64, 1.0),
    Table("c", 1_000_003, 32, 20.5),
    Table("d", 13, 128, 3.0),  # fewer rows than ranks
    Table("e", 25_000_000, 128, 1.0),
    Table("f", 40_000_000, 64, 7.0),  # equal to the first: ties
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("torchrec").setLevel(logging.ERROR)


def make_case(tables: list[Table], hbm_gb: float, world: int = 8, local: int = 4) -> Case:
    topology = Topology(
        world_size=world, compute_device="cuda", local_world_size=local, hbm_cap=int(hbm_gb * 10**9)
    )
    limits = {t.name: ParameterConstraints(pooling_factors=[t.pooling]) for t in tables}
    return Case(build_module(tables), [EmbeddingBagCollectionSharder()], topology, 4096, limits)


def both_spaces(case: Case, min_partition: int | None = 16) -> tuple[list[Any], Space]:
    """TorchRec's own priced search space, and the twin's."""
    constraints = tuned_constraints(case, min_partition)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = EmbeddingEnumerator(case.topology, case.batch_size, constraints).enumerate(
            case.module, case.sharders
        )
    return theirs, Pricing(case).space(constraints)


def reserved(case: Case) -> Any:
    return reserve(case.module, case.sharders, case.topology, case.batch_size, case.constraints)


@pytest.mark.parametrize("min_partition", [16, None])
def test_every_shard_has_its_price_and_size(min_partition: int | None) -> None:
    case = make_case(TABLES, 32)
    theirs, space = both_spaces(case, min_partition)
    assert len(theirs) == len(space.options)
    for option, priced in zip(theirs, space.options, strict=True):
        assert (option.fqn, option.sharding_type) == (priced.option.fqn, priced.option.sharding_type)
        rebuilt = priced.ranked(case, [0] * len(priced.shards))
        for shard, again, unit in zip(option.shards, rebuilt.shards, priced.each(), strict=True):
            assert (shard.size, shard.offset) == (again.size, again.offset)
            assert shard.perf.total == unit.total
            assert shard.perf.total + shard.perf.input_dist_comms == unit.extra
            assert (shard.storage.hbm, shard.storage.ddr, shard.storage.ssd) == unit.storage


def test_proposals_come_in_torchrecs_order() -> None:
    case = make_case(TABLES, 8)
    theirs, space = both_spaces(case)
    limit = reserved(case)
    capacity = Placer(limit).capacity
    few_theirs, few = both_spaces(make_case(TABLES[:2], 8))
    pairs = [
        (proposers.GreedyProposer(), ours.greedy(space, space.depth), theirs, space),
        (proposers.GreedyProposer(use_depth=False), ours.greedy(space, space.breadth), theirs, space),
        (proposers.UniformProposer(), ours.uniform(space, space.depth), theirs, space),
        (proposers.UniformProposer(use_depth=False), ours.uniform(space, space.breadth), theirs, space),
        (proposers.DynamicProgrammingProposer(), ours.dynamic_programming(space, capacity), theirs, space),
        (proposers.GridSearchProposer(), ours.grid(few), few_theirs, few),
    ]
    for proposer, sequence, options, numbered in pairs:
        numbers = {id(option): number for number, option in enumerate(options)}
        proposer.load(list(options))
        wanted = []
        while proposal := proposer.propose():
            wanted.append([numbers[id(option)] for option in proposal])
            proposer.feedback(partitionable=False, plan=proposal, storage_constraint=limit)
        found = [list(map(int, proposal)) for proposal in sequence]
        assert len(wanted) > 5, type(proposer)
        assert found == wanted, type(proposer)
        assert len(found[0]) == len(numbered.tables)


@pytest.mark.parametrize(("world", "local", "hbm_gb"), [(8, 4, 3.0), (8, 8, 2.0), (12, 4, 40.0)])
def test_placements_are_those_of_the_partitioner(world: int, local: int, hbm_gb: float) -> None:
    """Random choices of options; with 2 and 3 GB a rank some fit, some do not."""
    case = make_case(TABLES, hbm_gb, world, local)
    theirs, space = both_spaces(case)
    limit = reserved(case)
    placer, partitioner, rng = Placer(limit), GreedyPerfPartitioner(), random.Random(world)
    fitted = 0
    for _ in range(150):
        choice = [rng.choice(options) for options in space.tables]
        rng.shuffle(choice)
        proposal = [theirs[number] for number in choice]
        try:
            plan = partitioner.partition(proposal, limit)
            wanted = [[shard.rank for shard in option.shards] for option in plan]
            fitted += 1
        except PlannerError:
            wanted = None
        reset_shard_rank(proposal)
        assert placer.place([space.options[number] for number in choice]) == wanted
    assert fitted > 10
    assert fitted < 150 or hbm_gb > 3


@pytest.mark.parametrize(("count", "hbm_gb"), [(2, 40.0), (6, 3.0), (6, 40.0)])
def test_plans_and_ratings_are_those_of_the_planner(count: int, hbm_gb: float) -> None:
    case = make_case(TABLES[:count], hbm_gb)
    twin = Twin(case)
    assert plan_text(twin.default().total) == plan_text(default_plan(case).total)
    for width in (16, None):
        (theirs,) = tuned_plans(case, (width,))
        (mine,) = twin.tuned((width,))
        assert mine.ratings == theirs.ratings
        assert plan_text(mine.total) == plan_text(theirs.total)
        assert plan_text(mine.with_input) == plan_text(theirs.with_input)


def test_no_plan_where_the_planner_has_none() -> None:
    case = make_case([Table("huge", 10**12, 128, 1.0)], 1.0)
    assert default_plan(case).total is None
    assert Twin(case).default().total is None


def test_a_stopped_planner_says_so() -> None:
    stopped = default_plan(make_case(TABLES, 40.0), limit=0.01)
    assert not stopped.whole
    assert stopped.total is None
    assert 0.0 < stopped.cpu_seconds < 5.0


def test_results_are_kept_for_their_tables_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    spec = Spec("set", tuple(TABLES), 8, "h100")
    Store(path).put(spec.key, {"rival": 1})
    Store(path).put(spec.key, {"rival": 2})
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    assert Store(path).known == {spec.key: {"key": spec.key, "rival": 2}}
    other = Spec("set", (*TABLES[:-1], Table("f", 40_000_001, 64, 7.0)), 8, "h100")
    assert other.key not in Store(path).known
    assert json.loads(path.read_text().splitlines()[0])["rival"] == 1
