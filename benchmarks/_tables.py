"""Table sets: the files in ``planner/data/tables`` and any file in their format."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "planner" / "data" / "tables"
DEFAULT_DIM = 64  # for sets whose source gives none (kdd12); said in the row's name by the caller
META_DIM = 32  # AutoShard draws 16 or 32 for the 856-table set, DreamShard sets 16; one value for all tables
META_LOOKUPS = 13535.0  # look-ups a sample over all tables: 887,017,990 / 65,536 (dlrm_datasets, 2021 file)
META_SIGMA = 1.2  # spread of the log-normal surrogate; puts table 44's published 194 inside the support


@dataclass(frozen=True, slots=True)
class Table:
    """One embedding table: rows, columns, mean look-ups a sample."""

    name: str
    rows: int
    dim: int
    pooling: float


def load(path: str | Path) -> dict[str, list[Table]]:
    """Every set of a file, by name.

    Raises:
        ValueError: a file without a list of tables, or a table without rows.
    """
    path = Path(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    sets = {name: _read(raw, name) for name, raw in _sets(data, path.stem)}
    if not sets:
        raise ValueError(f"{path}: no list of tables (expected 'tables', 'models', 'variants' or 'datasets')")
    return sets


def builtin(name: str) -> dict[str, list[Table]]:
    """Sets of one of the project's files, named without ``.json``."""
    return load(FOLDER / f"{name}.json")


def _sets(data: Any, stem: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    if isinstance(data, list):
        yield stem, data
        return
    if isinstance(data.get("tables"), list):
        yield stem, data["tables"]
    for group in ("models", "variants", "datasets"):
        for name, value in data.get(group, {}).items():
            if isinstance(value, list):
                yield name, value
                continue
            tables = value.get("tables") or value.get("features")
            if tables:
                dim = value.get("dim")
                yield name, [{"dim": dim, **t} if t.get("dim") is None and dim else t for t in tables]


def _read(raw: list[dict[str, Any]], name: str) -> list[Table]:
    if raw and all(t.get("dim") is None and t.get("pooling_factor") is None for t in raw) and len(raw) > 100:
        return _surrogate(raw)
    tables = []
    for i, t in enumerate(raw):
        rows = t.get("rows")
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(
                f"set {name!r}: table {t.get('name', i)!r} has rows {rows!r}; it needs at least 1"
            )
        pooling = t.get("pooling_factor") or 1.0
        tables.append(
            Table(str(t.get("name", f"t{i}")), rows, int(t.get("dim") or DEFAULT_DIM), float(pooling))
        )
    return tables


def _surrogate(raw: list[dict[str, Any]]) -> list[Table]:
    """SYNTHETIC dims and pooling for a set that has only rows (the 856 tables).

    Mean pooling is log-normal over the tables that are looked up (rows > 1), scaled so that it adds up to
    the published look-ups a sample; tables with one row get 1 look-up. One dim for all.
    """
    rng = random.Random(856)
    draws = [math.exp(rng.gauss(0.0, META_SIGMA)) if t["rows"] > 1 else 0.0 for t in raw]
    idle = sum(1 for t in raw if t["rows"] <= 1)
    scale = (META_LOOKUPS - idle) / sum(draws)
    return [
        Table(t["name"], t["rows"], META_DIM, max(1.0, round(draw * scale, 3)))
        for t, draw in zip(raw, draws, strict=True)
    ]


def synthetic(count: int, seed: int = 0) -> list[Table]:
    """A SYNTHETIC set: log-uniform rows from 10^3 to 10^8, dims 16 to 256, long-tailed pooling."""
    rng = random.Random(seed)
    return [
        Table(
            f"s{i}",
            int(10 ** rng.uniform(3, 8)),
            rng.choice((16, 32, 64, 64, 128, 128, 256)),
            round(max(1.0, min(300.0, math.exp(rng.gauss(1.5, 1.3)))), 2),
        )
        for i in range(count)
    ]
