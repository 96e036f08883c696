"""Ids on the wire: the bytes one rank sends another to say which rows each of its samples looks up.

Per feature, little endian::

    i32 how, lengths, ids

``how`` of 0 or more is the length of every sample, and no lengths follow; -1, -2 and -4 are bytes of each length.
An id takes the least of 1, 2, 4 and 8 bytes that holds every row of its table, which both ranks know. On a slow
link this is what ids of 8 bytes and lengths of 4 cost most: a sample's only id of a table of 1,000 rows travels in 2 bytes
instead of 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ir.errors import InputError
from ir.ids import id_width

Ids = tuple[Tensor, Tensor]  # ids, and how many of them each sample has
Bytes = npt.NDArray[np.uint8]

_HOW = np.dtype("<i4")
_UNSIGNED = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


def pack(ids: Ids, rows: int, feature: str) -> list[Bytes]:
    """The bytes of one feature, in parts.

    Args:
        ids: int ids (n,) and lengths (samples,) whose sum is n.
        rows: of the feature's table.
        feature: its name, for the message.

    Raises:
        InputError: an id that the table has no row for; narrowed it would be another row's.
    """
    values, lengths = (np.ascontiguousarray(part.numpy()) for part in ids)
    if len(values) and not (values.min() >= 0 and values.max() < rows):
        wrong = values[(values < 0) | (values >= rows)][0]
        raise InputError(f"feature {feature!r} has the id {wrong}, beyond the {rows} rows of its table")
    narrow = values.astype(_UNSIGNED[id_width(rows)]).view(np.uint8)
    most = int(lengths.max(initial=0))
    if most >= 2**31:
        raise InputError(f"feature {feature!r} has a sample of {most} ids; at most {2**31 - 1} travel")
    if most == int(lengths.min(initial=most)):
        return [np.array([most], _HOW).view(np.uint8), narrow]
    width = id_width(most + 1)
    return [np.array([-width], _HOW).view(np.uint8), lengths.astype(_UNSIGNED[width]).view(np.uint8), narrow]


def unpack(data: Bytes, samples: int, tables: Sequence[int]) -> list[Ids]:
    """Ids and lengths (int64) of each feature.

    Args:
        data: what one rank sent.
        samples: of that rank.
        tables: rows of the table of each feature.

    Raises:
        InputError: the bytes do not fit ``samples`` and ``tables``.
    """
    found, at = [], 0
    for rows in tables:
        how, at = int(_taken(data, at, _HOW, 1)[0]), at + _HOW.itemsize
        if how >= 0:
            lengths = np.full(samples, how, np.int64)
        elif -how in _UNSIGNED:
            lengths = _taken(data, at, _UNSIGNED[-how], samples).astype(np.int64)
            at += samples * -how
        else:
            raise _damaged()
        kind, count = _UNSIGNED[id_width(rows)], int(lengths.sum())
        ids = _taken(data, at, kind, count).astype(np.int64)
        at += count * kind.itemsize
        found.append((torch.from_numpy(ids), torch.from_numpy(lengths)))
    if at != len(data):
        raise _damaged()
    return found


def _taken(data: Bytes, at: int, kind: np.dtype[np.generic], count: int) -> npt.NDArray[np.generic]:
    part = data[at : at + count * kind.itemsize]
    if len(part) != count * kind.itemsize:
        raise _damaged()
    return part.view(kind)


def _damaged() -> InputError:
    return InputError(
        "ids and lengths that a rank received do not fit together; the ranks hold different plans"
    )
