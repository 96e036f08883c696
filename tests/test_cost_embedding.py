"""Embedding costs against hand arithmetic, a message-by-message simulation and physical sanity."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.calibration import GPU, Calibration
from cost_models.embedding import PHASES, phase_overheads, unit_seconds
from ir.ops import EmbeddingTable
from ir.sharding import ShardingOption, even_widths, units
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.workload import FeatureStats, Workload
from planner.presets import preset

IDEAL = replace(
    GPU,
    row_efficiency=1.0,
    cache_speedup=1.0,
    fabric_efficiency=1.0,
    network_efficiency=1.0,
    kernel_seconds=0.0,
    collective_seconds=0.0,
)
TIER = MemoryTier("hbm", 10**12, 1e12, 1e12, granule=32)
DEVICE = Device("d", "gpu", {"fp32": 1e12}, (TIER,))


def cluster(hosts: int, per_host: int, intra: float = 1e11, inter: float = 1e10) -> Topology:
    return Topology(
        "test",
        DEVICE,
        (Level("host", per_host, Link("nvlink", intra)), Level("cluster", hosts, Link("ib", inter))),
    )


def table(rows: int = 1_000_000, dim: int = 128, pooling: str = "sum") -> EmbeddingTable:
    return EmbeddingTable("t", rows, dim, ("f",), pooling=pooling)


def load(batch: int = 1024, pool: float = 10.0, **more: object) -> Workload:
    return Workload(batch, {"f": FeatureStats(pool)}, optimizer="sgd", **more)  # type: ignore[arg-type]


def option(kind: str, dim: int = 128) -> ShardingOption:
    parts = 4 if kind in ("column_wise", "table_column_wise") else 2 if kind == "grid_shard" else 1
    widths = even_widths(dim, parts)
    assert widths is not None
    return ShardingOption(kind, widths)  # type: ignore[arg-type]


KINDS = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)


def first_unit(kind: str, topo: Topology, of: EmbeddingTable):  # type: ignore[no-untyped-def]
    chosen = option(kind, of.dim)
    return chosen, units(chosen, of.rows, topo.world_size, topo.host_size)[0]


def price(
    kind: str,
    topo: Topology,
    workload: Workload,
    calibration: Calibration = IDEAL,
    mode: str = "train",
    of: EmbeddingTable | None = None,
) -> dict[str, float]:
    of = of or table()
    chosen, unit = first_unit(kind, topo, of)
    return unit_seconds(of, chosen, unit, topo, workload, calibration, mode)  # type: ignore[arg-type]


def test_table_wise_by_hand() -> None:
    """2 hosts of 2; batch 1024, 10 ids a sample, rows of 512 bytes, memory of 1e12 bytes/s."""
    seconds = price("table_wise", cluster(2, 2), load())
    ids = 10_240
    assert seconds["lookup_forward"] == pytest.approx((ids * (8 + 512) + 1024 * 512) / 1e12)
    # 20 bits: three radix passes of (8 + 4) bytes, read and written; each distinct row read and written
    moved = 2 * 3 * ids * 12 + ids * 512 + 2 * ids * 512
    assert seconds["lookup_backward"] == pytest.approx(moved / 1e12)
    # a quarter stays, a quarter goes to the neighbour, half to the other host
    assert seconds["output_dist"] == pytest.approx(max(1024 * 512 / 4 / 1e11, 1024 * 512 / 2 / 1e10))
    assert seconds["input_dist"] == pytest.approx((ids * 8 + 1024 * 4) / 2 / 1e10)
    assert seconds["gradient_dist"] == seconds["output_dist"]


def test_row_wise_by_hand() -> None:
    seconds = price("row_wise", cluster(1, 4), load())
    assert seconds["lookup_forward"] == pytest.approx((2560 * 520 + 1024 * 512) / 1e12)
    assert seconds["output_dist"] == pytest.approx(3 / 4 * 1024 * 512 / 1e11)


def test_data_parallel_by_hand() -> None:
    seconds = price("data_parallel", cluster(1, 4), load(), of=table(rows=1000))
    assert seconds["input_dist"] == seconds["output_dist"] == 0
    assert seconds["lookup_forward"] == pytest.approx((2560 * 520 + 256 * 512) / 1e12)
    assert seconds["gradient_dist"] == pytest.approx(2 * 3 / 4 * 1000 * 512 / 1e11)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["table_wise", "table_row_wise"]),
    st.floats(1e10, 1e12),
    st.floats(1e9, 1e11),
)
def test_output_exchange_equals_message_simulation(
    hosts: int, per_host: int, kind: str, intra: float, inter: float
) -> None:
    """The holder of rank 0's host sends every message of the exchange; ports add up their bytes."""
    topo = cluster(hosts, per_host, intra, inter)
    batch, world = 1536, hosts * per_host
    share = batch / world * 512  # outputs of one rank's samples
    rounds: list[Counter[tuple[str, int]]] = [Counter()]
    if kind == "table_wise":
        for target in range(1, world):
            rounds[0]["fabric" if target < per_host else "nic", 0] += share  # type: ignore[assignment]
    else:
        rounds.append(Counter())
        for source in range(per_host):
            for place in range(per_host):
                if place != source:  # partial sums for the samples of everyone at that place
                    rounds[0]["fabric", source] += share * hosts  # type: ignore[assignment]
            for other in range(1, hosts):
                rounds[1]["nic", source] += share  # type: ignore[assignment]
                assert other
    speed = {"fabric": intra, "nic": inter}
    simulated = sum(max((v / speed[k] for (k, _), v in r.items()), default=0.0) for r in rounds)
    assert price(kind, topo, load(batch))["output_dist"] == pytest.approx(simulated)


@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 8), st.integers(1, 4))
def test_seconds_are_linear_in_a_large_batch(kind: str, hosts: int, per_host: int, times: int) -> None:
    topo = cluster(hosts, per_host)
    huge = table(rows=2**40)  # so many rows that a batch never exhausts them
    one = price(kind, topo, load(65536), of=huge)
    more = price(kind, topo, load(65536 * times), of=huge)
    phases = PHASES if kind != "data_parallel" else ("input_dist", "lookup_forward", "output_dist")
    for phase in phases:
        assert more[phase] == pytest.approx(times * one[phase])


@given(
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(1, 8),
    st.sampled_from(["memory", "intra", "inter"]),
    st.floats(1.0, 20.0),
)
def test_more_bandwidth_is_never_slower(
    kind: str, hosts: int, per_host: int, what: str, factor: float
) -> None:
    slow = cluster(hosts, per_host)
    if what == "memory":
        tier = replace(TIER, read_bandwidth=1e12 * factor, write_bandwidth=1e12 * factor)
        fast = replace(slow, device=replace(DEVICE, tiers=(tier,)))
    else:
        fast = cluster(hosts, per_host, **{what: {"intra": 1e11, "inter": 1e10}[what] * factor})
    before, after = price(kind, slow, load()), price(kind, fast, load())
    assert all(after[phase] <= before[phase] * (1 + 1e-12) for phase in PHASES)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_has_no_backward_phases(kind: str) -> None:
    seconds = price(kind, cluster(2, 4), load(), mode="inference")
    assert seconds["gradient_dist"] == seconds["lookup_backward"] == 0.0
    training = price(kind, cluster(2, 4), load())
    assert seconds["lookup_forward"] == training["lookup_forward"] > 0


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_repeated_ids_are_cheaper(a: float, b: float) -> None:
    low, high = sorted((a, b))
    seconds = [
        price("table_wise", cluster(1, 4), Workload(1024, {"f": FeatureStats(10.0, unique_fraction=u)}), GPU)
        for u in (low, high)
    ]
    for phase in ("lookup_forward", "lookup_backward"):
        assert seconds[0][phase] <= seconds[1][phase] * (1 + 1e-12)


def test_optimizer_state_traffic_is_ordered() -> None:
    backward = [
        price("table_wise", cluster(1, 2), replace(load(), optimizer=name))["lookup_backward"]
        for name in ("sgd", "rowwise_adagrad", "adagrad", "adam")
    ]
    assert backward == sorted(backward)
    rows = 10_240 * 2 / 1e12
    assert [round((b - backward[0]) / rows) for b in backward] == [0, 4, 512, 1024]


def test_narrow_rows_cost_whole_sectors() -> None:
    narrow = price("table_wise", cluster(1, 1), load(), of=table(dim=4), mode="inference")
    assert narrow["lookup_forward"] == pytest.approx((10_240 * (8 + 32) + 1024 * 16) / 1e12)


def test_column_shards_exchange_what_the_whole_table_does() -> None:
    topo = cluster(2, 4)
    chosen = option("column_wise")
    parts = units(chosen, 1_000_000, 8, 4)
    priced = [unit_seconds(table(), chosen, unit, topo, load(), IDEAL, "train") for unit in parts]
    whole = price("table_wise", topo, load())
    assert sum(p["output_dist"] for p in priced) == pytest.approx(whole["output_dist"])
    # each shard needs all the ids
    assert sum(p["input_dist"] for p in priced) == pytest.approx(4 * whole["input_dist"])


def test_a_sequence_travels_row_by_row() -> None:
    pooled = price("table_wise", cluster(1, 4), load(pool=7.0))
    sequence = price("table_wise", cluster(1, 4), load(pool=7.0), of=table(pooling="none"))
    assert sequence["output_dist"] == pytest.approx(7 * pooled["output_dist"])


def test_one_rank_exchanges_nothing() -> None:
    seconds = price("table_wise", cluster(1, 1), load())
    assert seconds["input_dist"] == seconds["output_dist"] == seconds["gradient_dist"] == 0.0
    assert phase_overheads(cluster(1, 1), load(), GPU, "train")["output_dist"] == 0.0


def test_overheads_grow_with_the_network() -> None:
    inside = phase_overheads(preset("h100-1x8"), load(), GPU, "train")
    across = phase_overheads(preset("h100-8x8"), load(), GPU, "train")
    assert tuple(inside) == PHASES
    for phase in ("input_dist", "output_dist", "gradient_dist"):
        assert across[phase] > inside[phase] > 0
