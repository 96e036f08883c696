"""Ids on the wire come back as they were, and damaged bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from codegen.runtime.ids_wire import pack, unpack
from cost_models.exchanged import packed_ids
from ir.constraints import Constraints, TableConstraint
from ir.errors import InputError
from ir.tables import capture_tables
from ir.workload import FeatureStats, Workload

_ROWS = st.sampled_from([1, 255, 256, 257, 65_536, 65_537, 2**32, 2**32 + 1, 2**40])


@st.composite
def _feature(draw: st.DrawFn, samples: int) -> tuple[int, list[int], list[int]]:
    rows = draw(_ROWS)
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, 3))] * samples
    else:
        lengths = draw(st.lists(st.sampled_from([0, 1, 2, 300]), min_size=samples, max_size=samples))
    edge = st.sampled_from([0, rows - 1])
    some = draw(st.lists(st.one_of(edge, st.integers(0, rows - 1)), min_size=1, max_size=5))
    count = sum(lengths)
    return rows, (some * (count // len(some) + 1))[:count], lengths


@given(st.data(), st.integers(0, 5), st.integers(0, 4))
def test_every_id_and_length_comes_back(data: st.DataObject, samples: int, features: int) -> None:
    made = [data.draw(_feature(samples)) for _ in range(features)]
    parts = [
        part
        for n, (rows, ids, lengths) in enumerate(made)
        for part in pack((torch.tensor(ids, dtype=torch.int64), torch.tensor(lengths)), rows, f"f{n}")
    ]
    sent = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    got = unpack(sent, samples, [rows for rows, _, _ in made])
    assert [(ids.tolist(), lengths.tolist()) for ids, lengths in got] == [(i, s) for _, i, s in made]


def test_one_id_a_sample_of_a_small_table_takes_a_byte() -> None:
    parts = pack((torch.arange(100), torch.ones(100, dtype=torch.int64)), 256, "f")
    assert sum(len(part) for part in parts) == 4 + 100


@pytest.mark.parametrize("wrong", [-1, 256])
def test_an_id_beyond_the_table_is_refused_rather_than_narrowed(wrong: int) -> None:
    with pytest.raises(InputError, match=f"'f' has the id {wrong}, beyond the 256 rows"):
        pack((torch.tensor([3, wrong]), torch.tensor([1, 1])), 256, "f")


@given(st.binary(max_size=40), st.integers(0, 6), st.lists(_ROWS, max_size=3))
def test_any_bytes_give_ids_or_a_clear_error(data: bytes, samples: int, tables: list[int]) -> None:
    try:
        got = unpack(np.frombuffer(data, np.uint8), samples, tables)
    except InputError:
        return
    assert all(len(ids) == int(lengths.sum()) and len(lengths) == samples for ids, lengths in got)


def test_the_model_counts_the_bytes_that_travel() -> None:
    """Two tables on two ranks, ids drawn with the workload's pooling, beside what the packing really makes."""
    rows, pooling, samples = {"t_small": 200, "t_large": 70_000}, {"t_small": 1, "t_large": 4}, 1024
    tables = [
        {"name": name, "rows": count, "dim": 16, "features": [name[2:]]} for name, count in rows.items()
    ]
    work = Workload(
        global_batch=samples,
        features={name[2:]: FeatureStats(pooling_factor=float(mean)) for name, mean in pooling.items()},
    )
    whole = Constraints(tables={"*": TableConstraint(sharding_types=("table_wise",))})
    plan = planner.compile(capture_tables(tables, "two")[0], "local-2", work, constraints=whole)
    random = np.random.default_rng(0)
    plain, packed = [0.0, 0.0], [0.0, 0.0]
    for table in plan.table_plans:
        lengths = torch.from_numpy(random.integers(0, 2 * pooling[table.name] + 1, samples))
        ids = torch.from_numpy(random.integers(0, rows[table.name], int(lengths.sum())))
        rank = table.shards[0].rank
        plain[rank] += 8 * len(ids) + 4 * samples
        packed[rank] += sum(map(len, pack((ids, lengths), rows[table.name], table.name)))
    counted = packed_ids(plan.table_plans, plan.topology, plan.workload)
    assert counted == pytest.approx(max(packed) / max(plain), rel=0.03)
