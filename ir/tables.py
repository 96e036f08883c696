"""Models given as a list of tables in JSON: no network, no torch.

A file holds one set, ``{"tables": [...]}``, or several under ``"models"``, ``"variants"`` or
``"datasets"``, one of which is chosen as ``file.json#name``. A set is a list of tables or a mapping
that holds one (``"tables"`` or ``"features"``) and, if it likes, a ``"dim"`` for tables without one.
A table::

    {"name": "C0", "rows": 40000000, "dim": 128, "pooling_factor": 3}

``pooling_factor`` (ids per sample, default of a missing key 1) may be replaced by ``features``: the
pooling factor of each feature that looks the table up, or their names. ``shares`` names another table
of the set whose rows this feature reads. Keys of a set other than these describe it and are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from ir.dtypes import nbytes
from ir.errors import InputError, did_you_mean
from ir.ops import EmbeddingTable, Op
from ir.program import Model
from ir.reading import STRICT, as_mapping, clipped, parse_record, read_json
from ir.workload import FeatureStats, Workload

_SETS = ("models", "variants", "datasets")
_LISTS = ("tables", "features")
MAX_DIM = 2**20  # columns

Name = Annotated[str, Field(min_length=1, max_length=500)]
Pooling = Annotated[float, Field(ge=0, le=1e9)]


@dataclass(frozen=True, slots=True)
class TableEntry:
    """One entry of a table list, as written in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name
    rows: Annotated[int, Field(ge=1, le=2**50)]
    dim: Annotated[int, Field(ge=1, le=MAX_DIM)] | None = None
    pooling_factor: Pooling | None = 1.0
    features: tuple[Pooling, ...] | tuple[Name, ...] | None = None
    shares: Name | None = None
    dtype: Annotated[str, Field(pattern="^(fp32|fp16|bf16)$")] = "fp32"
    pooling: Annotated[str, Field(pattern="^(sum|mean|max|none)$")] = "sum"

    def feature_pooling(self) -> dict[str, float]:
        """Features that read this entry and the ids each brings per sample; raises InputError."""
        if self.features and isinstance(self.features[0], str):
            return {str(feature): self._pooling() for feature in self.features}
        if self.features:
            names = (
                [self.name]
                if len(self.features) == 1
                else [f"{self.name}_{i}" for i in range(len(self.features))]
            )
            return dict(zip(names, (float(x) for x in self.features), strict=True))
        return {self.name: self._pooling()}

    def _pooling(self) -> float:
        if self.pooling_factor is None:
            raise InputError(
                f'table {self.name!r} has no pooling factor; give it "pooling_factor", the mean number of '
                "ids a sample carries"
            )
        return self.pooling_factor


def load_tables(source: str | Path) -> tuple[Model, Workload]:
    """The model and workload of ``file.json`` or ``file.json#set``; raises InputError."""
    path, _, chosen = str(source).partition("#")
    data = read_json(path, "table list")
    entries, dim = _select(data, chosen, path)
    return capture_tables(entries, f"{Path(path).stem}#{chosen}" if chosen else Path(path).stem, dim=dim)


def _select(data: object, chosen: str, path: str) -> tuple[Sequence[Any], int | None]:
    """The entries of one set of a file, and the dim of its tables where the set has one."""
    if isinstance(data, list):
        data = {"tables": data}
    data = as_mapping(data, f"table list {path}")
    named: dict[str, Any] = {}
    for key in _SETS:
        named |= as_mapping(data.get(key) or {}, f"{key!r} of table list {path}")
    if not chosen:
        if not any(key in data for key in _LISTS):
            hint = (
                f"choose one of its sets, as {path}#{clipped(next(iter(named)))}"
                if named
                else 'give it a list "tables"'
            )
            raise InputError(f"{path} holds no table list of its own; {hint}")
        part: Any = data
    elif chosen not in named:
        raise InputError(
            f"{path} has no set {clipped(chosen)!r}{did_you_mean(chosen, named)}; it has "
            f"{clipped(', '.join(named)) or 'none'}"
        )
    else:
        part = named[chosen]
    if isinstance(part, list):
        return part, None
    fields = as_mapping(part, f"set {chosen or path}")
    entries = next((fields[key] for key in _LISTS if key in fields), None)
    if not isinstance(entries, list):
        raise InputError(f'{path}: set {chosen or "tables"!r} holds no list "tables"; give it one')
    return entries, fields.get("dim")


def capture_tables(tables: Sequence[Any], name: str, *, dim: int | None = None) -> tuple[Model, Workload]:
    """A model of tables alone, and the workload that the list states.

    Args:
        tables: entries (see the module's text), as mappings.
        name: of the model.
        dim: columns of the tables that state none.

    Returns:
        The model, its only ops the ids and one lookup of all tables, and the pooling factors.

    Raises:
        InputError: names the entry and the key that is missing or wrong.
    """
    if not tables:
        raise InputError(f"table list {name} is empty; give it at least one table")
    entries = [
        parse_record(TableEntry, _without_nulls(entry, at), f"{name}, table {_called(entry, at)}")
        for at, entry in enumerate(tables)
    ]
    _unique([entry.name for entry in entries], f"{name}: table")
    known = {entry.name: entry for entry in entries}
    features: dict[str, list[str]] = {
        entry.name: [] for entry in entries if _owner(entry, known) == entry.name
    }
    pooling: dict[str, float] = {}
    for entry in entries:
        stated = entry.feature_pooling()
        _unique([*pooling, *stated], f"{name}: feature")
        features[_owner(entry, known)].extend(stated)
        pooling.update(stated)
    records = tuple(_table(known[owner], tuple(names), dim) for owner, names in features.items())
    workload = Workload(
        features={feature: FeatureStats(pooling_factor=mean) for feature, mean in pooling.items()},
        origin=f"table list {name}",
    )
    return Model(name, records, _lookup(records)), workload


def _called(entry: object, at: int) -> str:
    """The place of an entry in the list, with its name where it has one."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return f"{at} ({clipped(name)!r})" if isinstance(name, str) else str(at)


def _without_nulls(entry: object, at: int) -> object:
    """An unknown ``shares`` or ``features`` may be written as null; an unknown pooling stays null."""
    if not isinstance(entry, Mapping):
        return entry
    return {
        key: value for key, value in entry.items() if value is not None or key not in ("shares", "features")
    }


def _owner(entry: TableEntry, known: Mapping[str, TableEntry]) -> str:
    """The table that an entry reads; raises InputError when it does not exist or differs in rows."""
    if entry.shares is None:
        return entry.name
    owner = known.get(entry.shares)
    if owner is None or owner.shares is not None:
        raise InputError(
            f"table {entry.name!r} shares {entry.shares!r}, which is not a table of the list"
            f"{did_you_mean(entry.shares, known)}"
        )
    if owner.rows != entry.rows:
        raise InputError(
            f"table {entry.name!r} has {entry.rows} rows but shares {owner.name!r}, which has {owner.rows}"
        )
    return owner.name


def _table(entry: TableEntry, features: tuple[str, ...], dim: int | None) -> EmbeddingTable:
    columns = entry.dim if entry.dim is not None else dim
    if isinstance(columns, bool) or not isinstance(columns, int) or not 1 <= columns <= MAX_DIM:
        raise InputError(f'table {entry.name!r} has no dim; give it "dim", the number of columns')
    return EmbeddingTable(
        name=entry.name,
        rows=entry.rows,
        dim=columns,
        features=features,
        pooling=entry.pooling,
        dtype=entry.dtype,
    )


def _unique(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{what} {name!r} appears twice; rename one")
        seen.add(name)


def _lookup(tables: Sequence[EmbeddingTable]) -> tuple[Op, ...]:
    """The ids and one lookup over all tables, for one sample; pooled outputs are fp32."""
    features = sum(len(table.features) for table in tables)
    columns = sum(table.dim * len(table.features) for table in tables)
    return (
        Op(name="ids", kind="input", out_shape=(1, features), dtype="int64"),
        Op(
            name="lookup",
            kind="lookup",
            target="table list",
            inputs=("ids",),
            out_shape=(1, columns),
            activation_bytes=math.ceil(columns * nbytes("fp32")),
            tables=tuple(table.name for table in tables),
        ),
    )
