"""Table sets of the zoo, from the project's own data files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.tables import capture_tables, load_tables
from ir.workload import Optimizer, Workload

DATA = Path(__file__).parent.parent / "data" / "tables"


def zoo_tables(
    tables: str | Sequence[Any],
    *,
    dim: int | None,
    row_cap: int | None,
    global_batch: int,
    optimizer: Optimizer,
) -> tuple[tuple[EmbeddingTable, ...], Workload]:
    """The tables of a set, widened to ``dim`` and capped at ``row_cap`` rows, and their workload.

    Args:
        tables: file of ``planner/data/tables`` (``"file.json#set"``), a path, or a list of entries as in
            :mod:`ir.tables`.

    Raises:
        InputError: the set does not exist, is faulty, or the cap is not positive.
    """
    if row_cap is not None and row_cap < 1:
        raise InputError(f"row_cap must be at least 1, not {row_cap}")
    if isinstance(tables, str):
        own = DATA / tables
        found = Path(str(own).partition("#")[0]).is_file()
        model, workload = load_tables(own if found else tables)
    else:
        model, workload = capture_tables(tables, "tables")
    records = tuple(
        replace(
            table,
            rows=table.rows if row_cap is None else min(table.rows, row_cap),
            dim=table.dim if dim is None else dim,
        )
        for table in model.tables
    )
    return records, replace(workload, global_batch=global_batch, optimizer=optimizer)
