"""The compressed exchange on real gloo processes, against the unsharded tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codegen.runtime.launch import launch

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
