"""The compressed exchange on real gloo processes, against the unsharded tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codegen.compressed import codecs_registry
from codegen.execution import losses_of
from codegen.runtime.compressed_exchange import pieces_of
from codegen.runtime.launch import launch
from ir.compression import Compression
from ir.errors import InputError
from ir.reading import parse_record
from planner.verify_composition import check_composition
from tests.plans import Decision, Table, make_plan

TARGETS = str(Path(__file__).parent / "exchange_targets.py")


def section(codecs: dict[str, tuple[str, float]], decay: dict[str, Any] | None = None) -> dict[str, Any]:
    """A section that gives each table (of the targets) a codec and a relative bound, both directions."""
    tables = [
        {
            "table": table,
            "direction": direction,
            "codec": codec,
            "bound": bound,
            "table_class": "wide",
            "ratio": 2.0,
            "error": bound * bound / 3,
            "budget": 1.0,
            "link": 0.0,
            "coding": 0.0,
            "uncompressed": 1.0,
            "verdict": "",
        }
        for table, (codec, bound) in codecs.items()
        for direction in ("forward", "backward")
    ]
    exchanges = [
        {"direction": direction, "uncompressed": 1.0, "link": 0.5, "coding": 0.1, "used": True}
        for direction in ("forward", "backward")
    ]
    return {"engine": "exchange", "decay": decay or {}, "tables": tables, "exchanges": exchanges}


@pytest.mark.parametrize(("ranks", "sparse"), [(2, True), (4, False)])
def test_uncompressed_equals_the_unsharded_tables(ranks: int, sparse: bool) -> None:
    for found in launch(f"{TARGETS}:compare", ranks, {"compression": None, "sparse": sparse}):
        assert found["forward"] <= 1e-6
        assert found["backward"] <= 1e-5  # of sums over up to 40 samples


@pytest.mark.parametrize("ranks", [2, 4])
def test_compressed_stays_within_the_bound(ranks: int) -> None:
    codecs = {"a": ("eb_lz_entropy", 0.05), "b": ("eb_lz", 0.1), "c": ("eb_entropy", 0.02)}
    decay = {"start": 4.0, "steps": 2, "stages": 2}
    answers = launch(f"{TARGETS}:compare", ranks, {"compression": section(codecs, decay)})
    assert max(found["forward"] for found in answers) > 1e-3  # it did compress
    assert max(found["backward"] for found in answers) > 1e-4
    for found in answers:
        assert found["forward_bound"] <= 1
        assert found["backward_bound"] <= 1


def test_lossless_and_plain_tables_in_one_exchange() -> None:
    for found in launch(
        f"{TARGETS}:compare", 2, {"compression": section({"a": ("lz", 0.0), "c": ("none", 0.0)})}
    ):
        assert found["forward"] <= 1e-6
        assert found["backward"] <= 1e-5


def test_damage_on_the_way_is_an_error_where_it_arrives() -> None:
    first, second = launch(f"{TARGETS}:damage", 2)
    assert first == "fine"
    assert "damaged" in second


def test_ranks_that_disagree_say_so() -> None:
    assert all("the ranks disagree" in answer for answer in launch(f"{TARGETS}:disagree", 2, timeout=60.0))


TABLES = [Table("a", 61, 24), Table("b", 40, 8, ("x", "y")), Table("c", 37, 16)]
DECLARED = [[t.name, t.rows, t.dim, t.features or (f"f_{t.name}",), t.pooling, t.dtype] for t in TABLES]


def trained(
    tmp_path: Path, ranks: int, codecs: dict[str, tuple[str, float]], engine: str, kinds: dict[str, Decision]
) -> list[dict[str, Any]]:
    """Three steps of ``plan.apply`` on real processes."""
    plan = make_plan(TABLES, kinds, 1, ranks, batch=16 * ranks, optimizer="adagrad")
    asked = parse_record(Compression, section(codecs) | {"engine": engine}, "section")
    plan = replace(plan, decisions=replace(plan.decisions, compression=asked))
    plan.save(tmp_path / "plan.json")
    return launch(f"{TARGETS}:train", ranks, {"path": str(tmp_path / "plan.json"), "tables": DECLARED})


WHOLE = {"a": Decision("table_wise", (0,)), "b": Decision("table_wise", (1,))}
KINDS = WHOLE | {"c": Decision("column_wise", (1, 0))}


@pytest.mark.parametrize("ranks", [2, 4])
def test_apply_without_loss_trains_as_the_unsharded_model(ranks: int, tmp_path: Path) -> None:
    kinds = KINDS if ranks == 2 else WHOLE | {"c": Decision("data_parallel")}
    lossless = {name: ("lz", 0.0) for name in "abc" if kinds[name].sharding_type != "data_parallel"}
    for found in trained(tmp_path, ranks, lossless, "exchange", kinds):
        assert found["kind"] == "CompressedModel"
        assert max(found[f"outputs_{step}"] for step in range(3)) <= 1e-6
        assert found["weights"] <= 1e-6


def test_apply_with_error_bounds_trains_near_it(tmp_path: Path) -> None:
    codecs = dict.fromkeys("abc", ("eb_lz_entropy", 0.01))
    answers = trained(tmp_path, 2, codecs, "exchange", KINDS)
    assert max(found["outputs_0"] for found in answers) > 1e-6
    assert max(found["outputs_2"] for found in answers) <= 0.02


@pytest.mark.parametrize(("codec", "least", "most"), [("fp16", 1e-7, 2e-3), ("int8", 1e-6, 2e-2)])
def test_fixed_rate_codecs_run_in_torchrec(codec: str, least: float, most: float, tmp_path: Path) -> None:
    """Outputs differ from the unsharded ones by that codec's rounding: not at all would mean that none ran."""
    for found in trained(tmp_path, 2, dict.fromkeys("abc", (codec, 0.0)), "torchrec", KINDS):
        assert found["kind"] == "ShardedModel"
        assert least < found["outputs_0"] < most


def test_what_torchrec_would_replace_silently_is_refused() -> None:
    plan = make_plan(TABLES, KINDS | {"c": Decision("row_wise")}, 1, 2)

    def asking(codec: str, engine: str = "torchrec") -> Any:
        asked = parse_record(Compression, section({"a": (codec, 0.0)}) | {"engine": engine}, "section")
        return replace(plan, decisions=replace(plan.decisions, compression=asked))

    with pytest.raises(InputError, match="sums over row blocks"):
        codecs_registry(asking("int8"), "cpu")
    with pytest.raises(InputError, match="no fixed size"):
        codecs_registry(asking("lz", "exchange"), "cpu")
    assert codecs_registry(plan, "cpu") is None
    with pytest.raises(InputError, match="'c' is row_wise"):
        pieces_of(plan)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_vectors_and_gradients_travel_in_the_type_of_the_workload(dtype: str, tmp_path: Path) -> None:
    """A plain plan: what arrives is of the type, both ways, and within its rounding of the unsharded model.

    A row that is split over ranks arrives as a sum in the type of two that were rounded.
    """
    tables = [Table(name, 61, 16) for name in "abc"]
    kinds = WHOLE | {"b": Decision("column_wise", (1, 0)), "c": Decision("row_wise")}
    plan = make_plan(tables, kinds, 1, 2, batch=16, optimizer="sgd")
    plan = replace(plan, workload=replace(plan.workload, exchange_dtype=dtype))  # type: ignore[arg-type]
    plan.save(tmp_path / "plan.json")
    declared = [[t.name, t.rows, t.dim, (f"f_{t.name}",), t.pooling, t.dtype] for t in tables]
    name = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    sent = {"path": str(tmp_path / "plan.json"), "tables": declared, "dtype": name}
    assert dtype in losses_of(plan)
    for found in launch(f"{TARGETS}:narrow", 2, sent):
        assert found["gradient_type"] == found["output_type"] == 0.0
        assert 0.1 < found["gradient"] <= 1.001
        assert 0.1 < found["output"] <= 3.0


def test_a_type_of_the_workload_that_torchrec_cannot_send() -> None:
    plan = make_plan(TABLES, KINDS | {"c": Decision("row_wise")}, 1, 2)
    for dtype, why in (("fp8", "no fp8 kernel"), ("int8", "sums over row blocks")):
        asking = replace(plan, workload=replace(plan.workload, exchange_dtype=dtype))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"cannot travel as {dtype}: .*{why}"):
            codecs_registry(asking, "cpu")
        assert any(f"cannot travel as {dtype}" in fault for fault in check_composition(asking))
