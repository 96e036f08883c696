"""Session structure measured from batches: see :mod:`ir.sessions`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ir.errors import InputError
from ir.sessions import INVERSE_BYTES, SessionGroup, SessionStats
from ir.workload import as_jagged

Ints = npt.NDArray[np.int64]
Jagged = dict[str, tuple[Ints, Ints]]  # feature -> (ids, ids per sample)


def sessions_from_batches(
    batches: Iterable[tuple[object, Any]], *, id_bytes: int = 8, group_features: bool = True
) -> SessionStats:
    """Measure sessions.

    Args:
        batches: pairs of a batch (as :meth:`ir.workload.Workload.from_batches` takes) and the session
            of each of its samples (1-D integers); samples of a session need not be side by side.
        id_bytes: of an id; decides which features are worth a common inverse index.
        group_features: False gives every feature an index of its own.

    Raises:
        InputError: no samples, or sessions that do not match the batch.
    """
    samples = visits = 0
    same: dict[str, list[npt.NDArray[np.bool_]]] = {}
    ids: dict[str, int] = {}
    for batch, sessions in batches:
        jagged = as_jagged(batch)
        order, follows = _order(np.asarray(sessions), jagged)
        samples += len(order)
        visits += len(order) - len(follows)
        for name, (values, lengths) in jagged.items():
            same.setdefault(name, []).append(_repeats(values, lengths, order, follows))
            ids[name] = ids.get(name, 0) + len(values)
    if not samples:
        raise InputError("no samples to measure sessions from; pass at least one batch that is not empty")
    joined = {name: np.concatenate(parts) for name, parts in same.items()}
    size = samples / visits
    row_bytes = {name: ids[name] / samples * id_bytes for name in joined}
    grouped = _group(joined, row_bytes, size) if group_features else [[name] for name in joined]
    groups = tuple(
        SessionGroup(tuple(names), _rate(np.logical_and.reduce([joined[n] for n in names])))
        for names in grouped
    )
    return SessionStats(size, groups, f"measured from {samples} samples in {visits} sessions")


def _order(sessions: Ints, jagged: Jagged) -> tuple[Ints, Ints]:
    """Samples with those of a session side by side, and the positions that follow one of their session."""
    size = len(next(iter(jagged.values()))[1]) if jagged else 0
    if sessions.shape != (size,) or sessions.dtype.kind not in "iu":
        raise InputError(
            f"sessions must be {size} integers, one a sample, not {sessions.dtype} {sessions.shape}"
        )
    order = np.argsort(sessions, kind="stable")
    return order, np.flatnonzero(np.diff(sessions[order]) == 0) + 1


def _repeats(values: Ints, lengths: Ints, order: Ints, follows: Ints) -> npt.NDArray[np.bool_]:
    """For each position of ``follows``: are the ids those of the position before?"""
    here, before = order[follows], order[follows - 1]
    equal: npt.NDArray[np.bool_] = lengths[here] == lengths[before]
    start = np.cumsum(lengths) - lengths
    pairs = np.flatnonzero(equal & (lengths[here] > 0))
    count = lengths[here[pairs]]
    if len(pairs):
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        left = values[np.repeat(start[here[pairs]], count) + within]
        right = values[np.repeat(start[before[pairs]], count) + within]
        equal[pairs] = np.logical_and.reduceat(left == right, np.cumsum(count) - count)
    return equal


def _rate(flags: npt.NDArray[np.bool_]) -> float:
    return round(float(flags.mean()), 9) if len(flags) else 0.0


def _group(
    same: dict[str, npt.NDArray[np.bool_]], row_bytes: dict[str, float], size: float
) -> list[list[str]]:
    """Greedy, steadiest features first: join the group with which the bytes a sample grow least.

    Bytes of a group: its ids, less those of repeated samples, plus one inverse index.
    """
    repeated = (size - 1) / size

    def cost(width: float, stays: float) -> float:
        return width * (1 - stays * repeated) + INVERSE_BYTES

    groups: list[tuple[list[str], npt.NDArray[np.bool_], float]] = []
    for name in sorted(same, key=lambda n: (-_rate(same[n]), n)):
        alone = cost(row_bytes[name], _rate(same[name]))
        best, chosen = alone, None
        for index, (_, flags, width) in enumerate(groups):
            joint = _rate(flags & same[name])
            grows = cost(width + row_bytes[name], joint) - cost(width, _rate(flags))
            if grows < best:
                best, chosen = grows, index
        if chosen is None:
            groups.append(([name], same[name], row_bytes[name]))
        else:
            names, flags, width = groups[chosen]
            groups[chosen] = ([*names, name], flags & same[name], width + row_bytes[name])
    listed = list(same)
    return [sorted(names, key=listed.index) for names, _, _ in groups]
