"""A deduplicated batch for a model that computes on distinct rows and repeats them itself.

TorchRec repeats pooled rows by the inverse indices of a batch, as early as it has them. Where a model goes on with the
distinct rows, its collections get other indices: of a group with U distinct rows in a batch of B samples, the first U rows
that come out are the distinct ones and the rest mean nothing (:attr:`Distinct.bags`). A collection of sequences gets B rows
of which the last B - U are empty (:attr:`Distinct.sequences`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen.runtime.dedup.ikjt import InverseKeyedJaggedTensor
from ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Distinct:
    """What a rewritten model reads of a batch.

    Attributes:
        bags: for collections that pool.
        sequences: for collections that do not.
        rows: distinct rows of each group.
        inverse: of each group, (B,) the distinct row of each sample.
    """

    bags: Any
    sequences: Any
    rows: tuple[int, ...]
    inverse: tuple[Tensor, ...]


def distinct(
    ids: Any, groups: Sequence[Sequence[str]], inside: Sequence[str], others: Sequence[Sequence[str]]
) -> Distinct:
    """A ``KeyedJaggedTensor``, as it is or deduplicated already, in its two forms.

    Args:
        ids: of this rank's samples.
        groups: of features, of some of which the model repeats rows.
        inside: those features; TorchRec repeats the rows of the others.
        others: groups of which TorchRec repeats all rows.

    Raises:
        InputError: a batch that was deduplicated in another way.
    """
    if ids.inverse_indices_or_none() is not None:
        made = InverseKeyedJaggedTensor.from_torchrec(ids)
    else:
        known = set(ids.keys())
        wanted = [[f for f in group if f in known] for group in (*groups, *others)]
        made = InverseKeyedJaggedTensor.from_kjt(ids, [group for group in wanted if group])
    place = {feature: (group, i) for group in made.groups for i, feature in enumerate(group.features)}
    heads = []
    for features in groups:
        found = [place[feature][0] for feature in features if feature in place]
        if len(found) != len(features) or any(one is not found[0] for one in found):
            raise InputError(
                f"the batch does not hold {', '.join(features[:4])} under one inverse index; use "
                "codegen.dedup.deduplicator(plan), or give the batch as it is"
            )
        heads.append(found[0])
    return Distinct(
        _bags(made, place, set(inside)),
        _sequences(made, place, set(inside)),
        tuple(head.rows for head in heads),
        tuple(head.inverse for head in heads),
    )


def distinct_rows(found: Any, batch: Distinct, group: int) -> Any:
    """The distinct rows of a group in what a collection gave for one of its features."""
    rows = batch.rows[group]
    if hasattr(found, "_wait_impl"):  # a sharded collection's output that is still on its way
        found = found.wait()
    if isinstance(found, Tensor):
        return found[:rows]
    from torchrec.sparse.jagged_tensor import JaggedTensor

    return JaggedTensor(found.values(), lengths=found.lengths()[:rows], weights=found.weights_or_none())


def repeated(rows: Tensor, batch: Distinct, group: int) -> Tensor:
    """A row a sample again; its gradient adds up the samples of each row."""
    return rows.index_select(0, batch.inverse[group])


def _bags(made: InverseKeyedJaggedTensor, place: dict[str, Any], inside: set[str]) -> Any:
    inverse = []
    for key in made.keys:
        group = place[key][0]
        if key in inside:
            first = torch.zeros_like(group.inverse)
            first[: group.rows] = torch.arange(group.rows, device=first.device)
            inverse.append(first)
        else:
            inverse.append(group.inverse)
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    plain = made.to_torchrec()
    return KeyedJaggedTensor(
        keys=list(made.keys),
        values=plain.values(),
        lengths=plain.lengths(),
        weights=plain.weights_or_none(),
        stride_per_key_per_rank=plain.stride_per_key_per_rank(),
        inverse_indices=(list(made.keys), torch.stack(inverse)),
    )


def _sequences(made: InverseKeyedJaggedTensor, place: dict[str, Any], inside: set[str]) -> Any:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    whole = made.to_kjt().to_dict()
    values, lengths = [], []
    weights: list[Any] = []
    for key in made.keys:
        group, i = place[key]
        if key in inside:
            values.append(group.values[i])
            padding = group.lengths[i].new_zeros(made.samples - group.rows)
            lengths.append(torch.cat([group.lengths[i], padding]))
            weights.append(None if group.weights is None else group.weights[i])
        else:
            values.append(whole[key].values())
            lengths.append(whole[key].lengths())
            weights.append(whole[key].weights_or_none())
    weighted = all(weight is not None for weight in weights)
    return KeyedJaggedTensor(
        keys=list(made.keys),
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weighted else None,
    )
