"""Tiers in TorchRec's words: its own planner, its own parameter code and FBGEMM's own limits take what is emitted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection
from torchrec.distributed.batched_embedding_kernel import _populate_ssd_tbe_params
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner import Topology as RivalTopology
from torchrec.distributed.utils import add_params_from_parameter_sharding

from codegen.torchrec import to_torchrec
from codegen.torchrec_tiers import CACHE_WAYS, check_tiers, tier_constraints, tier_kernel, tier_notes
from ir.errors import InputError
from ir.plan import Plan
from ir.tier_plan import RowCache, RowRange, TableTiers
from planner.presets import preset
from tests.plans import Decision, Table, make_plan
from tests.torchrec_models import Small

ROWS, DIM = 10_000, 16
ALL = "all"


def whole(tier: str, cache: int = 0, policy: str = "lru", depth: int = 1) -> TableTiers:
    held = RowCache(cache, policy, 0.9) if cache else None  # type: ignore[arg-type]
    return TableTiers((RowRange(tier, ROWS, 1.0),), held, depth)


def split(*parts: tuple[str, int]) -> TableTiers:
    share = 1 / len(parts)
    return TableTiers(tuple(RowRange(tier, rows, share) for tier, rows in parts))


TIERS: dict[str, TableTiers | None] = {
    "hbm": None,
    "ddr": whole("ddr", depth=0),
    "cached": whole("ddr", cache=1500),
    "split": split(("hbm", 500), ("ddr", 9500)),
    "cxl": split(("ddr", 4000), ("cxl", 6000)),
    "nand": whole("nand", cache=2000, policy="lfu"),
    ALL: split(("hbm", 640), ("ddr", 4360), ("nand", 5000)),
    "bare": whole("nand", depth=0),
}
KERNELS = {
    "hbm": ("fused", None),
    "ddr": ("fused_uvm", None),
    "cached": ("fused_uvm_caching", 0.15),
    "split": ("fused_uvm_caching", 0.05),
    "cxl": ("fused_uvm", None),
    "nand": ("key_value", 0.2),
    ALL: ("key_value", 0.064),
    "bare": ("key_value", CACHE_WAYS / ROWS),
}


def tables() -> list[Table]:
    return [Table(name, ROWS, DIM) for name in TIERS]


def plan(optimizer: str = "rowwise_adagrad", **changes: Any) -> Plan:
    made = make_plan(
        tables(), {t.name: Decision("table_wise", (i % 2,)) for i, t in enumerate(tables())}, 1, 2
    )
    placed = tuple(
        replace(t, tiers=TIERS[t.name], memory={"weights": ROWS * DIM * 4, "optimizer": ROWS * 4}, **changes)
        for t in made.table_plans
    )
    return replace(
        made,
        table_plans=placed,
        topology=preset("h100-cxl-nand-1x2"),
        workload=replace(made.workload, optimizer=optimizer),  # type: ignore[arg-type]
    )


def module() -> Small:
    return Small([(t.name, t.rows, t.dim, (f"f_{t.name}",), "sum", "fp32") for t in tables()])


def test_every_table_gets_its_kernel_and_torchrec_has_it() -> None:
    emitted = to_torchrec(plan(), module(), device="cuda", storage="/mnt/nvme@local_rank").plan["ebc"]
    known = EmbeddingBagCollectionSharder().compute_kernels("table_wise", "cuda")
    for name, (kernel, factor) in KERNELS.items():
        assert emitted[name].compute_kernel == kernel
        assert kernel in known
        found = emitted[name].cache_params
        assert (found.load_factor if found else None) == pytest.approx(factor) if factor else found is None


def test_torchrecs_own_code_turns_it_into_the_kernels_arguments() -> None:
    """The cache of the emitted key-value table has as many rows as the plan's, rounded down to whole sets."""
    emitted = to_torchrec(plan(), module(), device="cuda", storage="/mnt/nvme@local_rank").plan["ebc"]
    arguments = add_params_from_parameter_sharding({}, emitted["nand"])
    assert arguments["cache_load_factor"] == pytest.approx(0.2)
    assert arguments["cache_algorithm"].name == "LFU"
    assert arguments["prefetch_pipeline"] is True
    assert arguments["ssd_storage_directory"] == "/mnt/nvme@local_rank"

    table = SimpleNamespace(
        local_rows=ROWS,
        local_cols=DIM,
        name="nand",
        get_weight_init_min=lambda: -0.01,
        get_weight_init_max=lambda: 0.01,
    )
    grouped = SimpleNamespace(  # what the function reads of a GroupedEmbeddingConfig
        fused_params={**arguments, "ssd_storage_directory": "/mnt/nvme"},
        data_type=module().ebc.embedding_bag_configs()[0].data_type,
        is_using_virtual_table=lambda: False,
        embedding_tables=(table,),
    )
    found = _populate_ssd_tbe_params(grouped)
    assert found["cache_sets"] == 2000 // CACHE_WAYS
    layered = add_params_from_parameter_sharding({}, emitted[ALL])
    assert layered["l2_cache_size"] == 1  # 4,360 rows of 68 bytes, in whole gigabytes


def test_torchrecs_planner_accepts_the_constraints_and_keeps_the_kernels() -> None:
    constraints = tier_constraints(plan(), storage="/mnt/nvme")
    rival = EmbeddingShardingPlanner(
        topology=RivalTopology(world_size=2, compute_device="cuda", hbm_cap=80 * 2**30, ddr_cap=2**40),
        constraints=constraints,
    )
    configs = module().ebc.embedding_bag_configs()
    with torch.device("meta"):
        collection = EmbeddingBagCollection(tables=list(configs), device=torch.device("meta"))
    found = rival.plan(collection, [EmbeddingBagCollectionSharder()]).plan[""]
    assert {name: found[name].compute_kernel for name in TIERS} == {n: k for n, (k, _) in KERNELS.items()}
    assert found["cached"].cache_params.load_factor == pytest.approx(0.15)
    assert found["nand"].key_value_params.ssd_storage_directory == "/mnt/nvme"


def test_notes_say_where_torchrec_differs_from_the_plan() -> None:
    notes = dict(note.split(": ", 1) for note in tier_notes(plan()))
    assert set(notes) == {"table 'split'", "table 'cxl'", f"table {ALL!r}", "table 'bare'"}
    assert "500 hottest rows" in notes["table 'split'"]
    assert "does not tell ddr from cxl" in notes["table 'cxl'"]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_optimizers_that_fbgemm_refuses_are_refused_with_the_table(optimizer: str) -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.tbe.ssd import SSDTableBatchedEmbeddingBags

    theirs = {"sgd": EmbOptimType.EXACT_SGD, "adagrad": EmbOptimType.EXACT_ADAGRAD}[optimizer]
    with pytest.raises(AssertionError, match="not supported by SSD"):
        SSDTableBatchedEmbeddingBags(
            [(10, 4)], [0], cache_sets=1, ssd_storage_directory="/tmp", optimizer=theirs
        )
    with pytest.raises(InputError, match=rf"table 'nand' .* rowwise_adagrad but not {optimizer}"):
        check_tiers(plan(optimizer), device="cuda")


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(InputError, match="GPUs only; run it on the CPU with"):
        to_torchrec(plan(), module(), device="cpu")
    with pytest.raises(InputError, match="holds fp32 and fp16 only"):
        check_tiers(plan(dtype="bf16"), device="cuda")
    with pytest.raises(InputError, match="name the folder of the drive"):
        to_torchrec(plan(), module(), device="cuda")
    good = plan()
    wide = tuple(
        replace(t, shards=tuple(replace(s, cols=32) for s in t.shards)) if t.name == "bare" else t
        for t in good.table_plans
    )
    with pytest.raises(InputError, match=r"rank 1 holds key-value tables of \[16, 32\] columns"):
        check_tiers(replace(good, table_plans=wide), device="cuda")


def test_tables_in_device_memory_are_as_before() -> None:
    made = plan()
    inside = replace(made.tables["hbm"], tiers=split(("hbm", ROWS)))
    assert tier_kernel(inside, made).kernel == "fused"
    assert not tier_notes(replace(made, table_plans=(inside,)))
