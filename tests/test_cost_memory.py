"""Memory against published sizes and closed forms."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from cost_models.memory import dense_memory, unit_memory
from ir.ops import EmbeddingTable, Op
from ir.program import Model
from ir.sharding import ShardingOption, units
from ir.workload import FeatureStats, Workload
from planner.presets import preset

DCN = json.loads(files("planner").joinpath("data", "tables", "mlperf_dlrm_dcnv2.json").read_text())
TABLES = [EmbeddingTable(t["name"], t["rows"], t["dim"], (t["name"],)) for t in DCN["tables"]]


def total(kind: str, widths: tuple[int, ...], optimizer: str) -> dict[str, int]:
    """Bytes by purpose over all ranks, empty row blocks not counted."""
    topo = preset("h100-2x4")
    load = Workload(1024, {}, optimizer=optimizer)  # type: ignore[arg-type]
    chosen = ShardingOption(kind, widths)  # type: ignore[arg-type]
    used: dict[str, int] = {}
    for table in TABLES:
        for unit in units(chosen, table.rows, 8, 4):
            full = max(block.rows for block in unit.blocks)
            for purpose, size in unit_memory(table, chosen, unit, topo, load, "train").items():
                held = sum(block.rows for block in unit.blocks) / full
                used[purpose] = used.get(purpose, 0) + round(size * held)
    return used


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        ("table_wise", (128,)),
        ("column_wise", (32, 32, 64)),
        ("row_wise", (128,)),
        ("table_row_wise", (128,)),
        ("grid_shard", (64, 64)),
    ],
)
def test_dcnv2_weights_are_the_published_97_gib_however_they_are_split(
    kind: str, widths: tuple[int, ...]
) -> None:
    used = total(kind, widths, "adagrad")
    assert used["weights"] / 2**30 == pytest.approx(DCN["fp32_GiB"], abs=0.001)
    assert used["optimizer"] == pytest.approx(used["weights"])
    assert "gradients" not in used


def test_optimizer_state_by_rule() -> None:
    rows = sum(table.rows for table in TABLES)
    assert total("table_wise", (128,), "sgd")["optimizer"] == 0
    assert total("table_wise", (128,), "rowwise_adagrad")["optimizer"] == 4 * rows
    assert total("table_wise", (128,), "adam")["optimizer"] == 8 * 128 * rows


def test_data_parallel_keeps_a_dense_gradient_and_no_exchange_buffers_of_the_whole_batch() -> None:
    topo, table = preset("h100-1x4"), TABLES[3]
    load = Workload(4096, {"C3": FeatureStats(2.0)}, optimizer="sgd")
    copied = ShardingOption("data_parallel", (128,))
    used = unit_memory(table, copied, units(copied, table.rows, 4, 4)[0], topo, load, "train")
    assert used["gradients"] == used["weights"] == table.rows * 512
    assert used["io"] == 1024 * (2 * 8 + 4 + 2 * 512)


def test_io_holds_the_global_batch() -> None:
    topo, table = preset("h100-1x4"), TABLES[3]
    load = Workload(4096, {"C3": FeatureStats(2.0)}, optimizer="sgd")
    whole = ShardingOption("table_wise", (128,))
    unit = units(whole, table.rows, 4, 4)[0]
    assert unit_memory(table, whole, unit, topo, load, "inference")["io"] == 4096 * (2 * 8 + 4 + 512)
    assert unit_memory(table, whole, unit, topo, load, "train")["io"] == 4096 * (2 * 8 + 4 + 2 * 512)


def test_dense_part_by_hand() -> None:
    op = Op("fc", "gemm", flops=200.0, params=110, activation_bytes=40.0, gemm=(10, 10))
    model = Model("m", (EmbeddingTable("t", 10, 16, ("f", "g")),), (op,))
    load = Workload(1000, {})
    used = dense_memory(model, load, preset("h100-1x4"), "train")
    assert used == {
        "dense_weights": 440,
        "dense_gradients": 440,
        "dense_optimizer": 880,
        "activations": 250 * (40 + 2 * 2 * 16 * 4),
    }
    assert sum(dense_memory(model, load, preset("h100-1x4"), "inference").values()) < sum(used.values())
