"""What is checked of a table's files before memory is taken for what they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codegen.runtime.tiered.native import Ints
from ir.errors import InputError
from ir.reading import clipped


def check_length(path: Path, expected: int) -> None:
    """The file is as long as the manifest says; raises InputError."""
    if not path.is_file() or path.stat().st_size != expected:
        raise InputError(f"{path} is not {expected} bytes long: it was cut or is of another table")


def read_order(path: Path, rows: int) -> Ints:
    """(rows,) the place of each row by popularity; raises InputError when the file does not list each row once."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: its header takes no memory
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {clipped(str(error))}; restore it from a copy") from None
    rank = np.full(rows, -1, np.int64)
    if ids.shape == (rows,) and ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < rows:
        rank[ids] = np.arange(rows)
    if rank.min() < 0:
        raise InputError(f"{path} does not list each of {rows} rows once; restore it from a copy")
    return rank
