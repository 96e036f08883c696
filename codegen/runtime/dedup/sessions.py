"""Batches of whole sessions: a step of the data loader, without which deduplication finds little.

A log is ordered by time, which scatters a session's samples; RecD clusters the samples of a session before
they are batched. Here sessions are drawn in random order and laid side by side, so training still sees
them shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ir.errors import InputError

Ints = npt.NDArray[np.int64]


def session_batches(
    sessions: npt.ArrayLike, batch: int, *, seed: int = 0, drop_last: bool = True
) -> Iterator[Ints]:
    """Sample numbers of each batch, sessions side by side and in random order.

    A session that does not fit goes on in the next batch.

    Args:
        sessions: (N,) the session of each sample.
        batch: samples of a batch.
        seed: of the order of sessions; samples of one session keep theirs.
        drop_last: leave out the last, smaller batch.

    Raises:
        InputError: ``sessions`` is not a list of integers, or ``batch`` is below 1.
    """
    of = np.asarray(sessions)
    if of.ndim != 1 or of.dtype.kind not in "iu":
        raise InputError(f"sessions must be one integer a sample, not {of.dtype} of shape {of.shape}")
    if batch < 1:
        raise InputError(f"a batch needs at least one sample, not {batch}")
    names, number = np.unique(of, return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(names))
    order = np.argsort(place[number], kind="stable")
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        if len(part) == batch or not drop_last:
            yield part
