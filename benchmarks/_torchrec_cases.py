"""The cases of ``vs_torchrec.py``, from cheap to dear, and the file that keeps what was measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._tables import FOLDER, Table, builtin, load

DCNV2 = "mlperf_dlrm_dcnv2"
RANKS = (8, 16, 64, 128)
CONSTANTS = ("default", "h100")


@dataclass(frozen=True, slots=True)
class Spec:
    """One case: a table set on a number of ranks with TorchRec's default or an H100's constants."""

    name: str
    tables: tuple[Table, ...]
    ranks: int
    constants: str
    standard: bool = False

    @property
    def key(self) -> str:
        """Names the case and what its tables are, so that a stored result of other tables is not used."""
        shapes = [(t.name, t.rows, t.dim, t.pooling) for t in self.tables]
        digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]
        return f"{self.name} {self.ranks} {self.constants} {digest}"

    @property
    def expense(self) -> int:
        """Grows with what the rival's planner has to do: shards times proposals."""
        return len(self.tables) ** 2 * self.ranks


def _specs(file: str, name: str, cases: Iterable[tuple[int, str]], standard: bool = True) -> list[Spec]:
    tables = tuple(builtin(file)[name])
    return [Spec(name, tables, ranks, constants, standard) for ranks, constants in cases]


def quick() -> list[Spec]:
    """Two cases."""
    return _specs(DCNV2, DCNV2, [(8, "default"), (16, "h100")])


def check() -> list[Spec]:
    """Small and middle cases for the comparison of the twin with the untouched planner.

    They reach the grid search (few tables), tables kept in host memory (452 GB on 16 ranks of 32 GB), proposals
    that do not fit, dims from 8 to 256 and several hosts.
    """
    cases = _specs("deeprecsys_models", "ncf", [(16, "default")])
    cases += _specs("hugectr_embark_models", "7table_470B_hotness20", [(64, "h100")])
    cases += _specs("deeprecsys_models", "rm1", [(16, "h100")])
    cases += _specs(DCNV2, DCNV2, [(8, "default"), (16, "h100"), (64, "default")])
    cases += _specs("criteo_terabyte_variants", "uncapped_T0", [(16, "default")])
    return cases + _specs("nvidia_synthetic_models", "tiny", [(16, "default")])


def standard() -> list[Spec]:
    """The cases that the README's figures are about."""
    terabyte, nvidia, hugectr = (
        "criteo_terabyte_variants",
        "nvidia_synthetic_models",
        "hugectr_embark_models",
    )
    cases = _specs(DCNV2, DCNV2, [(r, c) for r in RANKS for c in CONSTANTS])
    cases += _specs("criteo_kaggle", "criteo_kaggle", [(8, "default"), (16, "h100")])
    cases += _specs(terabyte, "mlperf_v1_cap40M", [(16, "default"), (64, "h100")])
    cases += _specs(terabyte, "uncapped_T0", [(64, "h100")])
    cases += _specs("deeprecsys_models", "rm2", [(16, "h100")])
    cases += _specs(nvidia, "tiny", [(16, "h100")]) + _specs(nvidia, "small", [(16, "default")])
    cases += _specs(hugectr, "180table_70B_hotness80", [(16, "h100")])
    return sorted(cases, key=lambda spec: spec.expense)


def full() -> list[Spec]:
    """The standard cases, then every table set on 8, 16, 64 and 128 ranks with both constants."""
    cases = {spec.key: spec for spec in standard()}
    more: dict[str, Spec] = {}
    shapes: dict[tuple[tuple[int, int, float], ...], str] = {}
    for file in (FOLDER / f"{DCNV2}.json", *sorted(FOLDER.glob("*.json"))):
        for name, tables in load(file).items():
            # One set is listed in two files; its tables are named differently there.
            shape = tuple((t.rows, t.dim, t.pooling) for t in tables)
            if shapes.setdefault(shape, name) != name:
                continue
            for spec in _specs(file.stem, name, [(r, c) for r in RANKS for c in CONSTANTS], False):
                more.setdefault(spec.key, spec)
    rest = [spec for key, spec in more.items() if key not in cases]
    return [*cases.values(), *sorted(rest, key=lambda spec: spec.expense)]


def of_file(path: Path, ranks: list[int]) -> list[Spec]:
    """Cases of a file in the format of ``planner/data/tables``."""
    return [
        Spec(name, tuple(tables), r, constants)
        for name, tables in load(path).items()
        for r in ranks
        for constants in CONSTANTS
    ]


class Store:
    """Results by case in a file of JSON lines; each is written as it is measured, the last one counts."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line) if line.endswith("}") else {}  # a line cut short is left out
                if "key" in record:
                    self.known[record["key"]] = record

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Keep a result."""
        self.known[key] = {"key": key, **record}
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.known[key], allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
