"""The inverse-keyed jagged tensor: each distinct row of a feature group once, and which one each sample is.

RecD (MLSys 23) keeps, for a group of features that change together, the distinct rows and one
``inverse_lookup`` of B ints. TorchRec carries the same thing as a ``KeyedJaggedTensor`` with a stride per
key and ``inverse_indices``: its sharded collections exchange and look up the distinct rows and repeat the
pooled ones at home, so a model needs no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ir.errors import InputError

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# odd 64-bit constants of splitmix64 (Steele, Lea, Flood 2014), as signed integers
_MIX = (-4658895280553007687, -7723592293110705685)


@dataclass(frozen=True, slots=True)
class Group:
    """Distinct rows of some features and the row of each sample.

    Attributes:
        features: that share the inverse index.
        values: ids of each feature, distinct rows one after the other.
        lengths: (U,) ids of each distinct row, for each feature.
        weights: weights beside ``values``, or None.
        inverse: (B,) int64, the distinct row of each sample.
    """

    features: tuple[str, ...]
    values: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None
    inverse: Tensor

    @property
    def rows(self) -> int:
        """Distinct rows U."""
        return int(self.lengths[0].numel())


@dataclass(frozen=True, slots=True)
class InverseKeyedJaggedTensor:
    """A batch of B samples whose feature groups are deduplicated; every feature is in one group."""

    keys: tuple[str, ...]
    groups: tuple[Group, ...]
    samples: int

    @classmethod
    def from_kjt(cls, kjt: KeyedJaggedTensor, groups: Sequence[Sequence[str]]) -> InverseKeyedJaggedTensor:
        """Deduplicate ``groups`` of ``kjt``'s features; the others keep one row a sample.

        Rows are equal when the ids (and weights) of all features of the group are, in order; distinct
        rows keep the order of their first sample.

        Raises:
            InputError: a group names an unknown feature or one twice, or the batch already has a stride
                per key.
        """
        keys = tuple(kjt.keys())
        named = [feature for group in groups for feature in group]
        unknown = sorted(set(named) - set(keys))
        if unknown:
            raise InputError(
                f"the batch has no feature {unknown[0]!r}; its features are {', '.join(keys[:8])}"
            )
        if len(set(named)) != len(named) or not all(groups):
            raise InputError("a feature may be in one group only, and a group needs a feature")
        if kjt.variable_stride_per_key():
            raise InputError("the batch is already deduplicated: it has a stride per key")
        jagged = kjt.to_dict()
        made = [_distinct(tuple(group), [jagged[f] for f in group]) for group in groups]
        rest = [(key,) for key in keys if key not in set(named)]
        made += [_whole(group[0], jagged[group[0]]) for group in rest]
        return cls(keys, tuple(made), int(kjt.stride()))

    def to_kjt(self) -> KeyedJaggedTensor:
        """The batch with every sample's rows, as it was before."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        values, lengths, weights = {}, {}, {}
        for group in self.groups:
            for index, feature in enumerate(group.features):
                starts = group.lengths[index].long().cumsum(0) - group.lengths[index]
                taken, lengths[feature] = _positions(starts, group.lengths[index], group.inverse)
                values[feature] = group.values[index][taken]
                if group.weights is not None:
                    weights[feature] = group.weights[index][taken]
        return KeyedJaggedTensor(
            keys=list(self.keys),
            values=torch.cat([values[key] for key in self.keys]),
            lengths=torch.cat([lengths[key] for key in self.keys]),
            weights=torch.cat([weights[key] for key in self.keys]) if weights else None,
        )

    def to_torchrec(self) -> KeyedJaggedTensor:
        """As TorchRec carries it: a stride per key and the inverse indices of all keys."""
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        place = {f: (group, i) for group in self.groups for i, f in enumerate(group.features)}
        ordered = [place[key] for key in self.keys]
        weighted = all(group.weights is not None for group in self.groups)
        return KeyedJaggedTensor(
            keys=list(self.keys),
            values=torch.cat([group.values[i] for group, i in ordered]),
            lengths=torch.cat([group.lengths[i] for group, i in ordered]),
            weights=torch.cat([group.weights[i] for group, i in ordered if group.weights])
            if weighted
            else None,
            stride_per_key_per_rank=[[group.rows] for group, _ in ordered],
            inverse_indices=(list(self.keys), torch.stack([group.inverse for group, _ in ordered])),
        )

    @classmethod
    def from_torchrec(cls, kjt: KeyedJaggedTensor) -> InverseKeyedJaggedTensor:
        """The reverse of :meth:`to_torchrec`: keys with the same inverse indices form a group.

        Raises:
            InputError: the tensor has no inverse indices, or more ranks than one.
        """
        found = kjt.inverse_indices_or_none()
        if found is None:
            raise InputError("the batch has no inverse indices, so it is not deduplicated; use from_kjt")
        names, inverse = found
        jagged, of_key = kjt.to_dict(), dict(zip(names, inverse, strict=True))
        groups: list[list[str]] = []
        for key in kjt.keys():  # noqa: SIM118 - not a mapping
            rows = jagged[key].lengths().numel()
            for group in groups:
                same_rows = jagged[group[0]].lengths().numel() == rows
                if same_rows and torch.equal(of_key[group[0]], of_key[key]):
                    group.append(key)
                    break
            else:
                groups.append([key])
        made = tuple(
            Group(
                tuple(group),
                tuple(jagged[f].values() for f in group),
                tuple(jagged[f].lengths() for f in group),
                _weights([jagged[f] for f in group]),
                of_key[group[0]],
            )
            for group in groups
        )
        return cls(tuple(kjt.keys()), made, int(inverse.shape[1]))


def _weights(parts: Sequence[Any]) -> tuple[Tensor, ...] | None:
    found = [part.weights_or_none() for part in parts]
    return None if any(w is None for w in found) else tuple(found)


def _whole(feature: str, jagged: Any) -> Group:
    lengths = jagged.lengths()
    inverse = torch.arange(lengths.numel(), device=lengths.device)
    return Group((feature,), (jagged.values(),), (lengths,), _weights([jagged]), inverse)


def _positions(starts: Tensor, lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in ``values`` of the ids of ``rows``, and how many each has."""
    count = lengths[rows]
    within = torch.arange(int(count.sum()), device=rows.device)
    within -= torch.repeat_interleave(count.long().cumsum(0) - count, count)
    return torch.repeat_interleave(starts[rows], count) + within, count


def _distinct(features: tuple[str, ...], parts: Sequence[Any]) -> Group:
    size = parts[0].lengths().numel()
    weights = _weights(parts)
    columns = [part.values() for part in parts]
    if weights is not None:  # weights are part of a row: compare their bits
        bits = [w.view({4: torch.int32, 8: torch.int64, 2: torch.int16}[w.element_size()]) for w in weights]
    inverse, first = _unique_rows(
        [part.lengths() for part in parts],
        columns,
        bits if weights is not None else [None] * len(parts),
        size,
    )
    values, lengths, kept = [], [], []
    for index, part in enumerate(parts):
        starts = part.lengths().long().cumsum(0) - part.lengths()
        taken, count = _positions(starts, part.lengths(), first)
        values.append(part.values()[taken])
        lengths.append(count)
        if weights is not None:
            kept.append(weights[index][taken])
    return Group(
        features, tuple(values), tuple(lengths), tuple(kept) if weights is not None else None, inverse
    )


def _unique_rows(
    lengths: Sequence[Tensor], values: Sequence[Tensor], bits: Sequence[Tensor | None], size: int
) -> tuple[Tensor, Tensor]:
    """``(inverse, first)``: the distinct row of each sample, and the first sample of each distinct row.

    Rows are told apart by a 64-bit hash and then compared id by id, so a collision costs time, never a
    wrong row.
    """
    key = torch.zeros(size, dtype=torch.int64, device=lengths[0].device)
    for count, ids, extra in zip(lengths, values, bits, strict=True):
        key = _mix(key + count)
        place = torch.arange(ids.numel(), device=ids.device) - torch.repeat_interleave(
            count.long().cumsum(0) - count, count
        )
        hashed = _mix(ids.long() + _mix(place + 1))
        if extra is not None:
            hashed = _mix(hashed + extra.long())
        owner = torch.repeat_interleave(torch.arange(size, device=ids.device), count)
        key = key.index_add(0, owner, hashed)  # integer sums wrap, so the order does not matter
    _, group = torch.unique(key, return_inverse=True)
    inverse, first = _by_first(group)
    wrong = torch.zeros(size, dtype=torch.bool, device=key.device)
    for count, ids, extra in zip(lengths, values, bits, strict=True):
        wrong |= ~_same(count, ids, first[inverse])
        if extra is not None:
            wrong |= ~_same(count, extra, first[inverse])
    if bool(wrong.any()):  # two different rows with one hash: give each odd row a place of its own
        own = inverse.clone()
        own[wrong] = first.numel() + torch.arange(int(wrong.sum()), device=key.device)
        inverse, first = _by_first(own)
    return inverse, first


def _mix(x: Tensor) -> Tensor:
    for constant in _MIX:
        x = (x ^ (x >> 29)) * constant
    return x ^ (x >> 32)


def _by_first(group: Tensor) -> tuple[Tensor, Tensor]:
    """Groups renumbered in the order of their first members, and those members."""
    size = group.numel()
    _, dense = torch.unique(group, return_inverse=True)
    total = int(dense.max()) + 1 if size else 0
    first = torch.full((total,), size, dtype=torch.int64, device=group.device)
    first.scatter_reduce_(0, dense, torch.arange(size, device=group.device), "amin")
    order = torch.argsort(first)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total, device=group.device)
    return rank[dense], first[order]


def _same(count: Tensor, ids: Tensor, other: Tensor) -> Tensor:
    """Is each sample's row that of sample ``other``?"""
    starts = count.long().cumsum(0) - count
    equal: Tensor = count == count[other]
    mine = torch.arange(ids.numel(), device=ids.device)
    owner = torch.repeat_interleave(torch.arange(count.numel(), device=ids.device), count)
    theirs = (starts[other] - starts)[owner] + mine
    differs = equal[owner] & (ids != ids[theirs.clamp(0, max(ids.numel() - 1, 0))])
    return equal & ~torch.zeros_like(equal).index_put(
        (owner[differs],), torch.tensor(True, device=ids.device)
    )
