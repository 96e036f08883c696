"""Which rank holds which token of each sequence: the 2N-chunk and round-robin layouts.

A prompt of T tokens is cut into 2N chunks C_0..C_{2N-1} and rank i takes C_i and C_{2N-1-i}: early chunks
see few keys under a causal mask and late chunks many, so every pair costs the same. New tokens are cut
that way whatever lies in the cache. Decoding places one token a sequence, round robin, one rank further
each step, so that caches grow evenly.
Source: "Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783, sections 3.4 and 3.5.

Nothing is padded: chunks of one sequence differ by one token at most, and the longer ones go to the ranks
that hold the fewest tokens so far, so ranks differ by one token at most over the whole batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ir.errors import InputError

Owners = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placement:
    """Consecutive tokens of each sequence of a batch, and the rank that holds each.

    Attributes:
        world_size: N, ranks.
        owners: per sequence, the rank of each token, in order.
        starts: per sequence, the position of the first of these tokens; those before it lie elsewhere.

    Every rank knows the whole placement, so message sizes never travel. On a rank, tokens are packed by
    sequence, and by position within a sequence.
    """

    world_size: int
    owners: tuple[Owners, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise InputError(f"a placement needs at least one rank, not {self.world_size}")
        if len(self.owners) != len(self.starts):
            raise InputError(f"{len(self.owners)} sequences have {len(self.starts)} starts; give one each")
        for sequence, owner in enumerate(self.owners):
            if len(owner) and not (owner.min() >= 0 and owner.max() < self.world_size):
                raise InputError(
                    f"sequence {sequence} has a token on rank {owner.max() if owner.min() >= 0 else owner.min()}; "
                    f"ranks go from 0 to {self.world_size - 1}"
                )
        _check_lengths(self.starts, "start")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(len(owner) for owner in self.owners)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Tokens by rank and sequence, shape (world_size, sequences)."""
        columns = [np.bincount(owner, minlength=self.world_size) for owner in self.owners]
        return np.array(columns, dtype=np.int64).reshape(-1, self.world_size).T

    def rows(self, rank: int) -> int:
        """Tokens that ``rank`` holds."""
        return int(self.counts[rank].sum())

    def positions(self, rank: int, sequence: int) -> Positions:
        """Positions within ``sequence`` of the tokens that ``rank`` holds, ascending."""
        return np.flatnonzero(self.owners[sequence] == rank) + self.starts[sequence]

    def index(self, rank: int) -> Positions:
        """Where the tokens of ``rank`` lie in the packed batch of all ranks, in the rank's own order.

        ``packed[placement.index(rank)]`` is the rank's part.
        """
        flat = np.concatenate(self.owners) if self.owners else np.zeros(0, np.int32)
        return np.flatnonzero(flat == rank)

    def extend(self, new: Placement) -> Placement:
        """These tokens followed by ``new``; raises InputError when ``new`` does not start where these end."""
        if new.world_size != self.world_size or len(new.owners) != len(self.owners):
            raise InputError(
                f"cannot extend {len(self.owners)} sequences on {self.world_size} ranks by "
                f"{len(new.owners)} sequences on {new.world_size} ranks; both must be the same"
            )
        ends = tuple(s + n for s, n in zip(self.starts, self.lengths, strict=True))
        for sequence, (end, start) in enumerate(zip(ends, new.starts, strict=True)):
            if end != start:
                raise InputError(
                    f"sequence {sequence} has {end} tokens but its new tokens start at {start}; "
                    f"place them with starts={end}"
                )
        joined = tuple(np.concatenate(pair) for pair in zip(self.owners, new.owners, strict=True))
        longer = Placement(self.world_size, joined, self.starts)
        longer.__dict__["counts"] = self.counts + new.counts  # no second pass over a long cache
        return longer

    @property
    def digest(self) -> int:
        """63 bits of a SHA-256 of the placement, to compare between ranks."""
        state = hashlib.sha256(repr((self.world_size, self.starts, self.lengths)).encode())
        for owner in self.owners:
            state.update(owner.tobytes())
        return int.from_bytes(state.digest()[:8], "big") >> 1


def _check_lengths(lengths: Sequence[int], what: str) -> None:
    for sequence, length in enumerate(lengths):
        if length < 0:
            raise InputError(f"sequence {sequence} has {what} {length}; it must be 0 or more")


def _starts(starts: Sequence[int] | None, sequences: int) -> tuple[int, ...]:
    return tuple(int(start) for start in starts) if starts is not None else (0,) * sequences


def balanced(lengths: Sequence[int], world_size: int, starts: Sequence[int] | None = None) -> Placement:
    """The load-balanced layout of a prefill: 2N chunks a sequence, rank i holds chunks i and 2N-1-i.

    Args:
        lengths: new tokens of each sequence, 0 or more; need not be divisible by 2N.
        world_size: N, ranks.
        starts: cached tokens of each sequence, default 0.

    Raises:
        InputError: a negative length or start, no ranks, or counts that differ.
    """
    _check_lengths(lengths, "length")
    if world_size < 1:
        raise InputError(f"a placement needs at least one rank, not {world_size}")
    chunk_rank = np.concatenate([np.arange(world_size), np.arange(world_size)[::-1]]).astype(np.int32)
    load = np.zeros(world_size, np.int64)
    owners = []
    for length in lengths:
        base, extra = divmod(int(length), 2 * world_size)
        sizes = np.full(2 * world_size, base, np.int64)
        load += 2 * base
        for _ in range(extra):
            spare = np.flatnonzero(sizes == base)
            chunk = spare[np.argmin(load[chunk_rank[spare]])]
            sizes[chunk] += 1
            load[chunk_rank[chunk]] += 1
        owners.append(np.repeat(chunk_rank, sizes))
    return Placement(world_size, tuple(owners), _starts(starts, len(owners)))


def contiguous(lengths: Sequence[int], world_size: int, starts: Sequence[int] | None = None) -> Placement:
    """N consecutive parts a sequence, without regard to the causal mask: what :func:`balanced` improves on."""
    _check_lengths(lengths, "length")
    owners = []
    for length in lengths:
        base, extra = divmod(int(length), world_size)
        sizes = base + (np.arange(world_size) < extra)
        owners.append(np.repeat(np.arange(world_size, dtype=np.int32), sizes))
    return Placement(world_size, tuple(owners), _starts(starts, len(owners)))


def round_robin(starts: Sequence[int], world_size: int, step: int) -> Placement:
    """One new token a sequence at decode step ``step``: sequence b goes to rank (b + step) mod N.

    Args:
        starts: tokens that each sequence has already.
        world_size: N, ranks.
        step: 0 for the first decoded token.

    Raises:
        InputError: a negative start or step, or no ranks.
    """
    if step < 0 or world_size < 1:
        raise InputError(
            f"decode needs a step of 0 or more and a rank, not step {step} on {world_size} ranks"
        )
    owners = tuple(np.array([(b + step) % world_size], np.int32) for b in range(len(starts)))
    return Placement(world_size, owners, _starts(starts, len(owners)))


def empty(sequences: int, world_size: int) -> Placement:
    """No token yet of any of ``sequences`` sequences."""
    return Placement(world_size, (np.zeros(0, np.int32),) * sequences, (0,) * sequences)
