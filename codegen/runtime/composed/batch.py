"""A rank's batch in parts: the features of one part have equally many rows, one a sample or one a distinct sample.

Part 0 holds what is not deduplicated; every other part is a group of features that share an inverse index
(:mod:`codegen.runtime.dedup.ikjt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codegen.runtime.dedup.ikjt import Group, InverseKeyedJaggedTensor
from codegen.runtime.towers.ids import Bags
from ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Parts:
    """One batch.

    Attributes:
        samples: of this rank.
        rows: of each part.
        inverse: of each part, (samples,) the row of each sample; None for part 0.
        bags: feature -> ids, lengths (one a row) and weights; means are sums with weights of 1 / length.
    """

    samples: int
    rows: list[int]
    inverse: list[Tensor | None]
    bags: dict[str, Bags]


def split_batch(ids: Any, groups: Sequence[Sequence[str]], mean: frozenset[str]) -> Parts:
    """A ``KeyedJaggedTensor`` in parts.

    Args:
        ids: of this rank, as they are, or deduplicated already by ``codegen.dedup.deduplicator``.
        groups: of features that are deduplicated together.
        mean: features pooled by mean.

    Raises:
        InputError: a deduplicated batch whose groups are not the plan's.
    """
    if ids.inverse_indices_or_none() is not None:
        found = InverseKeyedJaggedTensor.from_torchrec(ids)
    else:
        found = InverseKeyedJaggedTensor.from_kjt(ids, groups)
    place = {feature: group for group in found.groups for feature in group.features}
    inverse: list[Tensor | None] = [None]
    rows = [found.samples]
    for features in groups:
        if len({id(place[feature]) for feature in features}) != 1:
            raise InputError(
                f"the batch was not deduplicated as the plan says: {', '.join(features[:4])} do not share an inverse "
                "index; use codegen.dedup.deduplicator(plan), or give the batch as it is"
            )
        inverse.append(place[features[0]].inverse)
        rows.append(place[features[0]].rows)
    grouped = {feature for features in groups for feature in features}
    bags: dict[str, Bags] = {}
    for group in found.groups:
        for index, feature in enumerate(group.features):
            if feature not in grouped and group.rows != found.samples:
                raise InputError(
                    f"the batch deduplicates {feature!r}, which the plan does not; compile the plan again"
                )
            bags[feature] = _bags(group, index, feature in mean)
    return Parts(found.samples, rows, inverse, bags)


def _bags(group: Group, index: int, mean: bool) -> Bags:
    lengths = group.lengths[index]
    weights = None if group.weights is None else group.weights[index]
    if mean:
        share = lengths.to(torch.float32).reciprocal().repeat_interleave(lengths)
        weights = share if weights is None else weights * share
    return Bags(group.values[index], lengths, weights)
